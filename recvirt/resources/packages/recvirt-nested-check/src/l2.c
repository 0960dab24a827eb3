/*
 * The tiny guests: makes a virtual machine for each, runs it, and checks what it answers. The child process that does so
 * (device.c) writes what it sees into shared memory.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <unistd.h>

#include "kvm.h"

#define MEMORY_BYTES 0x10000u
#define CODE_ADDRESS 0x1000u
#define PAGE_MAP_L4 0x2000u
#define NONCE_PAGE 0x8000u
#define NONCE_VIRTUAL 0x40000000u
#define DEVICE_VIRTUAL 0x80000000u
#define DEVICE_PHYSICAL 0xd0000000u
#define LEAF 0x52435654u /* a CPUID leaf of our own: "RCVT" */
#define PORT_NONCE 0x5c0
#define PORT_STATE 0x5c4
#define PORT_ANSWER 0x5c8

extern const unsigned char guest_real[], guest_real_end[], guest_long[], guest_long_end[];

struct machine {
    int device, vm, vcpu, stats;
    unsigned char *memory;
    struct kvm_run *run;
    struct kvm_cpuid2 *cpuid;
};

struct secrets {
    uint64_t nonce;
    uint32_t ebx, edx;
};

/* ---- a machine ---- */

static bool failed(struct l2_result *result, const char *what)
{
    snprintf(result->error, sizeof result->error, "%s: %s", what, strerror(errno));
    return false;
}

#define STEP(expression, what)                                        \
    do {                                                              \
        snprintf(result->step, sizeof result->step, "%s", what);      \
        if ((expression) < 0)                                         \
            return failed(result, what);                              \
    } while (0)

static bool create_machine(struct machine *machine, struct l2_result *result)
{
    struct kvm_userspace_memory_region region = { .memory_size = MEMORY_BYTES };
    uint64_t identity_map = 0xfffbc000;
    int run_bytes;

    STEP(machine->device = open(DEVICE, O_RDWR | O_CLOEXEC), "open " DEVICE);
    STEP(machine->vm = ioctl(machine->device, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
    /* Intel without unrestricted guests needs these pages for real mode; elsewhere they are ignored. */
    STEP(ioctl(machine->vm, KVM_SET_IDENTITY_MAP_ADDR, &identity_map), "KVM_SET_IDENTITY_MAP_ADDR");
    STEP(ioctl(machine->vm, KVM_SET_TSS_ADDR, 0xfffbd000ul), "KVM_SET_TSS_ADDR");
    machine->memory = mmap(NULL, MEMORY_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (machine->memory == MAP_FAILED)
        return failed(result, "memory for the guest");
    region.userspace_addr = (uintptr_t)machine->memory;
    STEP(ioctl(machine->vm, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION");
    STEP(machine->vcpu = ioctl(machine->vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
    STEP(run_bytes = ioctl(machine->device, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE");
    machine->run = mmap(NULL, (size_t)run_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, machine->vcpu, 0);
    if (machine->run == MAP_FAILED)
        return failed(result, "mmap of the virtual CPU");
    machine->stats = ioctl(machine->vcpu, KVM_GET_STATS_FD, NULL); /* since Linux 5.14; absent is no fault */
    return true;
}

static bool set_cpuid(struct machine *machine, struct l2_result *result, const struct secrets *secrets)
{
    struct kvm_cpuid_entry2 ours = { .function = LEAF, .ebx = secrets->ebx, .edx = secrets->edx };
    struct kvm_cpuid2 *table = supported_cpuid(machine->device);

    STEP(table ? 0 : -1, "KVM_GET_SUPPORTED_CPUID");
    table->entries[table->nent++] = ours;
    STEP(ioctl(machine->vcpu, KVM_SET_CPUID2, table), "KVM_SET_CPUID2");
    free(table);
    return true;
}

static void map(struct machine *machine, uint32_t table, unsigned index, uint64_t value)
{
    memcpy(machine->memory + table + 8 * index, &value, sizeof value);
}

/* Four levels: the code where it lies, the nonce's page and the device's page each at an address of their own. */
static void make_page_tables(struct machine *machine)
{
    enum { PRESENT = 1, WRITABLE = 2, LARGE = 0x80, L3 = 0x3000, CODE_L2 = 0x4000, NONCE_L2 = 0x5000, NONCE_L1 = 0x6000, DEVICE_L2 = 0x7000 };

    map(machine, PAGE_MAP_L4, 0, L3 | PRESENT | WRITABLE);
    map(machine, L3, 0, CODE_L2 | PRESENT | WRITABLE);
    map(machine, L3, NONCE_VIRTUAL >> 30, NONCE_L2 | PRESENT | WRITABLE);
    map(machine, L3, DEVICE_VIRTUAL >> 30, DEVICE_L2 | PRESENT | WRITABLE);
    map(machine, CODE_L2, 0, LARGE | PRESENT | WRITABLE);
    map(machine, NONCE_L2, 0, NONCE_L1 | PRESENT | WRITABLE);
    map(machine, NONCE_L1, 0, NONCE_PAGE | PRESENT | WRITABLE);
    map(machine, DEVICE_L2, 0, DEVICE_PHYSICAL | LARGE | PRESENT | WRITABLE);
}

static void enter_long_mode(struct kvm_sregs *sregs)
{
    struct kvm_segment code = { .limit = 0xffffffff, .selector = 8, .type = 11, .present = 1, .s = 1, .l = 1, .g = 1 };
    struct kvm_segment data = { .limit = 0xffffffff, .selector = 16, .type = 3, .present = 1, .s = 1, .db = 1, .g = 1 };

    sregs->cr3 = PAGE_MAP_L4;
    sregs->cr4 = 1u << 5;                              /* PAE */
    sregs->cr0 = 1u | (1u << 4) | (1u << 5) | (1u << 31); /* PE, ET, NE, PG */
    sregs->efer = (1u << 8) | (1u << 10);              /* LME, LMA */
    sregs->cs = code;
    sregs->ds = sregs->es = sregs->fs = sregs->gs = sregs->ss = data;
}

static bool load_guest(struct machine *machine, struct l2_result *result, bool long_mode, const struct secrets *secrets)
{
    struct kvm_regs regs = { .rip = CODE_ADDRESS, .rflags = 2, .rsi = result->rounds, .rdi = LEAF };
    struct kvm_sregs sregs;

    STEP(ioctl(machine->vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
    sregs.cs.base = sregs.cs.selector = 0;
    if (long_mode) {
        memcpy(machine->memory + CODE_ADDRESS, guest_long, (size_t)(guest_long_end - guest_long));
        memcpy(machine->memory + NONCE_PAGE, &secrets->nonce, sizeof secrets->nonce);
        make_page_tables(machine);
        enter_long_mode(&sregs);
        regs.r8 = NONCE_VIRTUAL;
        regs.r9 = DEVICE_VIRTUAL;
    } else {
        memcpy(machine->memory + CODE_ADDRESS, guest_real, (size_t)(guest_real_end - guest_real));
    }
    STEP(ioctl(machine->vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
    STEP(ioctl(machine->vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
    return true;
}

/* ---- what the guest should say ---- */

struct model {
    uint64_t state;
    uint32_t round; /* counts down */
    bool long_mode;
};

static void one_round(struct model *model, const struct secrets *secrets)
{
    if (model->long_mode) {
        model->state += ((uint64_t)secrets->ebx << 32) | secrets->edx;
        model->state = (model->state << 13) | (model->state >> 51);
    } else {
        uint32_t state = (uint32_t)model->state + secrets->ebx;

        model->state = ((state << 7) | (state >> 25)) ^ secrets->edx;
    }
    model->state ^= model->round--;
}

/* The state that the guest tells next, at the first round from here whose number is a multiple of 16. */
static uint32_t next_state(struct model *model, const struct secrets *secrets)
{
    bool tells;

    do {
        tells = model->round % 16 == 0;
        one_round(model, secrets);
    } while (!tells && model->round);
    return (uint32_t)model->state;
}

/* ---- the run ---- */

struct answers {
    uint64_t port, device;
    unsigned port_parts;
    bool device_told;
};

static bool on_io(struct machine *machine, struct l2_result *result, struct model *model, const struct secrets *secrets,
                  struct answers *answers)
{
    struct kvm_run *run = machine->run;
    unsigned char *data = (unsigned char *)run + run->io.data_offset;
    uint32_t value;

    result->io_seen++;
    if (run->io.size != 4 || run->io.count != 1) {
        snprintf(result->error, sizeof result->error, "the guest used port 0x%x in a way it does not", run->io.port);
        return false;
    }
    memcpy(&value, data, sizeof value);
    if (run->io.direction == KVM_EXIT_IO_IN && run->io.port == PORT_NONCE) {
        value = (uint32_t)secrets->nonce;
        memcpy(data, &value, sizeof value);
        return true;
    }
    if (run->io.direction == KVM_EXIT_IO_OUT && run->io.port == PORT_STATE) {
        uint32_t expected = model->round ? next_state(model, secrets) : ~value;

        if (value == expected)
            return true;
        snprintf(result->error, sizeof result->error, "a wrong intermediate state: 0x%08x instead of 0x%08x", value, expected);
        return false;
    }
    if (run->io.direction == KVM_EXIT_IO_OUT && run->io.port == PORT_ANSWER && answers->port_parts < 2) {
        answers->port |= (uint64_t)value << (32 * answers->port_parts++);
        return true;
    }
    snprintf(result->error, sizeof result->error, "access to a port that the guest does not use: 0x%x", run->io.port);
    return false;
}

static bool explain_exit(const struct kvm_run *run, struct l2_result *result)
{
    const char *note = "";
    unsigned long long detail = 0;

    if (run->exit_reason == KVM_EXIT_FAIL_ENTRY) {
        note = ": the processor refused to enter the guest, reason";
        detail = run->fail_entry.hardware_entry_failure_reason;
    } else if (run->exit_reason == KVM_EXIT_INTERNAL_ERROR) {
        note = ": internal error of KVM, kind";
        detail = run->internal.suberror;
    } else if (run->exit_reason == KVM_EXIT_SHUTDOWN) {
        note = ": the guest crashed (triple fault)";
    }
    snprintf(result->error, sizeof result->error, "KVM_RUN ended with exit reason %u%s 0x%llx", run->exit_reason, note, detail);
    return false;
}

static bool run_to_halt(struct machine *machine, struct l2_result *result, struct model *model,
                        const struct secrets *secrets, struct answers *answers)
{
    struct kvm_run *run = machine->run;

    for (;;) {
        if (ioctl(machine->vcpu, KVM_RUN, 0) < 0) {
            if (errno == EINTR || errno == EAGAIN)
                continue;
            return failed(result, "KVM_RUN");
        }
        switch (run->exit_reason) {
        case KVM_EXIT_HLT:
            return true;
        case KVM_EXIT_IO:
            if (!on_io(machine, result, model, secrets, answers))
                return false;
            snprintf(result->step, sizeof result->step, "KVM_RUN, after %u port accesses", result->io_seen);
            break;
        case KVM_EXIT_MMIO:
            result->mmio_seen++;
            if (run->mmio.phys_addr != DEVICE_PHYSICAL || !run->mmio.is_write || run->mmio.len != 8) {
                snprintf(result->error, sizeof result->error, "access to unused memory at 0x%llx",
                         (unsigned long long)run->mmio.phys_addr);
                return false;
            }
            memcpy(&answers->device, run->mmio.data, 8);
            answers->device_told = true;
            break;
        case KVM_EXIT_INTR:
            break;
        default:
            return explain_exit(run, result);
        }
    }
}

static bool check_answers(struct machine *machine, struct l2_result *result, const struct answers *answers, bool long_mode)
{
    uint64_t in_memory;

    result->answer = answers->port;
    memcpy(&in_memory, machine->memory + NONCE_PAGE + 8, sizeof in_memory);
    if (answers->port != result->expected || answers->port_parts != (long_mode ? 2u : 1u)) {
        snprintf(result->error, sizeof result->error, "the guest's answer is wrong");
        return false;
    }
    if (long_mode && (in_memory != result->expected || !answers->device_told || answers->device != result->expected)) {
        snprintf(result->error, sizeof result->error, "the answer %s is wrong",
                 in_memory != result->expected ? "in the guest's memory" : "at the guest's device");
        return false;
    }
    return true;
}

/* Every CPUID and every port access must be an exit that KVM counted; else no processor ran the guest. */
static enum l2_state check_counters(struct l2_result *result)
{
    const struct counters *counted = &result->counted;

    if (counted->exits < 0 && counted->io_exits < 0)
        return L2_PROVED; /* a kernel before 5.14 does not tell; the answer stands */
    if (counted->exits >= (int64_t)result->rounds + result->io_seen && counted->io_exits >= (int64_t)result->io_seen)
        return L2_PROVED;
    snprintf(result->error, sizeof result->error, "right answer, but KVM counts %lld exits (%lld for ports) instead of %u (%u)",
             (long long)counted->exits, (long long)counted->io_exits, result->rounds + result->io_seen, result->io_seen);
    return L2_EMULATED;
}

static int64_t difference(int64_t before, int64_t after)
{
    return before < 0 || after < 0 ? -1 : after - before;
}

static bool run_machine(struct machine *machine, struct l2_result *result, const struct secrets *secrets, bool long_mode)
{
    struct model model = { secrets->nonce, result->rounds, long_mode };
    struct answers answers = { 0 };
    struct counters before, after;
    uint64_t started;

    before = read_counters(machine->stats);
    snprintf(result->step, sizeof result->step, "KVM_RUN");
    started = now_nanoseconds();
    if (!run_to_halt(machine, result, &model, secrets, &answers))
        return false;
    result->nanoseconds = now_nanoseconds() - started;
    after = read_counters(machine->stats);
    result->counted.exits = difference(before.exits, after.exits);
    result->counted.io_exits = difference(before.io_exits, after.io_exits);
    result->counted.mmio_exits = difference(before.mmio_exits, after.mmio_exits);
    result->counted.halt_exits = difference(before.halt_exits, after.halt_exits);
    while (model.round)
        one_round(&model, secrets);
    result->expected = model.state;
    snprintf(result->step, sizeof result->step, "checking the answer");
    return check_answers(machine, result, &answers, long_mode);
}

static void boot(void *shared)
{
    struct l2_result *result = shared;
    struct machine machine = { .stats = -1 };
    bool long_mode = result->mode[0] == 'l';
    struct secrets secrets;

    if (getrandom(&secrets, sizeof secrets, 0) != (ssize_t)sizeof secrets) {
        failed(result, "getrandom");
        return;
    }
    if (!long_mode)
        secrets.nonce = (uint32_t)secrets.nonce;
    result->nonce = secrets.nonce;
    if (HOOK("hang"))
        pause();
    if (HOOK("die"))
        abort();
    if (!create_machine(&machine, result) || !set_cpuid(&machine, result, &secrets) ||
        !load_guest(&machine, result, long_mode, &secrets))
        return;
    if (HOOK("lie"))
        secrets.edx ^= 1;
    if (!run_machine(&machine, result, &secrets, long_mode))
        return;
    if (HOOK("count-nothing"))
        result->counted.exits = result->counted.io_exits = 0;
    result->error[0] = '\0';
    result->state = check_counters(result);
}

void run_l2(struct l2_result *result, bool long_mode, uint32_t rounds, unsigned timeout_seconds)
{
    struct l2_result *shared;
    enum ended how;

    memset(result, 0, sizeof *result);
    result->mode = long_mode ? "long" : "real";
    result->state = L2_FAILED;
    result->rounds = rounds;
    result->counted = (struct counters){ -1, -1, -1, -1 };
    strcpy(result->step, "start");
    strcpy(result->error, "the process that runs the guest died");
    shared = shared_copy(result, sizeof *result);
    how = guarded(boot, shared, timeout_seconds);
    *result = *shared;
    munmap(shared, sizeof *shared);
    if (how == KILLED_BY_CLOCK) {
        result->state = L2_TIMEOUT;
        snprintf(result->error, sizeof result->error, "silent for %u s (at: %s)", timeout_seconds, result->step);
    } else if (how == DIED) {
        result->state = L2_FAILED;
        snprintf(result->error, sizeof result->error, "the process that runs the guest died (at: %s)", result->step);
    }
}
