/* recvirt-nested-check: what the parts share. Facts flow one way: cpuid -> facts, l2 -> verdict -> report. */
#ifndef RECVIRT_NESTED_H
#define RECVIRT_NESTED_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#define SCHEMA_VERSION 1

/* Exit statuses, part of the interface: docs/nested-check.md and the manual page list them. */
enum {
    EXIT_WORKS = 0,          /* an L2 ran and proved itself (or, without a boot, nothing was found missing) */
    EXIT_INTERNAL = 1,       /* the check itself failed */
    EXIT_USAGE = 2,          /* wrong options */
    EXIT_NO_CPU = 10,        /* the processor of this VM has neither VMX nor SVM */
    EXIT_NO_DEVICE = 11,     /* there is no /dev/kvm */
    EXIT_NO_PERMISSION = 12, /* /dev/kvm may not be opened by this user */
    EXIT_L2_FAILED = 13,     /* KVM is there, but no L2 proved itself */
    EXIT_NOT_DEEPER = 14,    /* an L2 runs, but can't be a hypervisor itself */
};

typedef enum { UNKNOWN = -1, NO = 0, YES = 1 } tri;

/* util.c */
extern const char *root_dir; /* "" or the --root directory; put before every path that is read */
long read_text(const char *path, char *buffer, size_t size); /* length without the last newline, -1: not readable */
bool exists(const char *path);
tri parse_flag(const char *text); /* Y, 1, N, 0 */
bool has_word(const char *list, const char *word);
bool cpuinfo_line(const char *key, char *buffer, size_t size); /* the first processor's line of /proc/cpuinfo */
uint64_t answer_for(const char *nonce); /* FNV-1a of the text, 64 bits: what an L2 makes of its nonce */
uint64_t now_nanoseconds(void);

/* cpuid.c */
struct registers {
    uint32_t eax, ebx, ecx, edx;
};
bool cpuid(uint32_t leaf, uint32_t subleaf, struct registers *out);
bool read_msr(uint32_t index, uint64_t *out);

/* facts.c */
#define MAX_PARAMETERS 12
#define MAX_FEATURES 10

struct parameter {
    const char *name;
    char value[24]; /* "" when the module has no such parameter, or is not loaded */
};

struct module {
    const char *name;
    bool loaded;
    size_t count;
    struct parameter parameters[MAX_PARAMETERS];
};

struct feature {
    const char *name;
    tri present;
    const char *source; /* cpuid, msr, cpuinfo, or "" */
};

struct facts {
    char vendor[13];
    char model[80];
    const char *extension; /* "vmx", "svm", or NULL */
    tri flag;              /* CPUID offers the extension */
    tri kernel_flag;       /* /proc/cpuinfo shows it: the kernel hides what firmware has locked */
    tri locked;            /* firmware switched the extension off (MSR), where that can be read */
    tri hypervisor;        /* this is a virtual machine */
    char signature[13];
    char second_signature[13]; /* of a second interface, as KVM below Hyper-V's */
    const char *hypervisor_name;
    char provider[64]; /* DMI: sys_vendor */
    char product[64];  /* DMI: product_name */
    struct module kvm, kvm_intel, kvm_amd;
    struct module kvm_pvm; /* an out-of-tree way for processors without VMX and SVM */
    size_t feature_count;
    struct feature features[MAX_FEATURES];
};
void gather_facts(struct facts *facts);
const struct module *vendor_module(const struct facts *facts); /* kvm_intel or kvm_amd, NULL for neither */
const char *parameter_value(const struct module *module, const char *name); /* "" when unknown */
tri feature_present(const struct facts *facts, const char *name);

/* device.c */
enum device_state { DEVICE_USABLE, DEVICE_ABSENT, DEVICE_NO_PERMISSION, DEVICE_UNUSABLE, DEVICE_NOT_TRIED };
struct device {
    enum device_state state;
    int api_version;
    tri offers_extension; /* KVM would give VMX or SVM to an L2 (KVM_GET_SUPPORTED_CPUID) */
    char error[160];
};

void probe_device(struct device *device, unsigned timeout_seconds);

/* l2.c */
enum l2_state { L2_SKIPPED, L2_PROVED, L2_EMULATED, L2_FAILED, L2_TIMEOUT };
struct counters {
    int64_t exits, io_exits, mmio_exits, halt_exits; /* -1: this kernel does not tell */
};
struct l2_result {
    const char *mode; /* "real" or "long" */
    enum l2_state state;
    uint32_t rounds;
    uint64_t nonce, answer, expected;
    uint32_t io_seen, mmio_seen;
    struct counters counted; /* difference over the run */
    uint64_t nanoseconds;
    char step[64]; /* what was under way last */
    char error[200];
};
void run_l2(struct l2_result *result, bool long_mode, uint32_t rounds, unsigned timeout_seconds);

/* hints.c */
const char *hypervisor_name(const char *signature);
void enable_hint(const struct facts *facts, char *buffer, size_t size); /* how to get VMX or SVM into this VM */

/* verdict.c */
#define MAX_CHECKS 16
enum check_state { CHECK_OK, CHECK_INFO, CHECK_WARN, CHECK_FAIL, CHECK_SKIP };
struct check {
    const char *name;
    enum check_state state;
    char text[320];
    char next[420]; /* the next step for a person, "" when none is needed */
};
struct verdict {
    int status;
    const char *word; /* stable, for scripts */
    char text[160];
    tri deeper;
    size_t count;
    struct check checks[MAX_CHECKS];
};
void judge(const struct facts *facts, const struct device *device, const struct l2_result *real,
           const struct l2_result *lng, struct verdict *verdict);

/* report.c */
void print_human(FILE *out, const struct facts *facts, const struct verdict *verdict);
void print_json(FILE *out, const struct facts *facts, const struct device *device, const struct l2_result *real,
                const struct l2_result *lng, const struct verdict *verdict);

/* initramfs.c */
int write_initramfs(const char *output, const char *base, const char *release);

#endif
