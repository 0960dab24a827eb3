/*
 * What an L2 costs its L1: runs a tiny real-mode guest through /dev/kvm and times its exits.
 *
 * As process 1 of an initramfs it mounts /dev, loads the modules listed in /modules/order and powers off at its end; started
 * by hand it only measures. Under QEMU's -icount with shift=0 a nanosecond is an instruction, so the figures repeat exactly.
 *
 * Two kinds of exit:
 *   cpuid  handled inside KVM: time of a run of EXITS times CPUID and one OUT, less that of a run of one OUT, by EXITS
 *   io     an OUT that user space handles: time of EXITS runs of one OUT each, by EXITS
 * Batches are short so that most of them see no timer tick; the median leaves the others out.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define EXITS 100
#define BATCHES 400
#define WARM_UP 20
#define PORT 0x10
#define CODE 0x1000
#define MEMORY 0x10000

/* SI holds how many CPUIDs come before the OUT: CPUID itself overwrites AX to DX. 16-bit code at 0000:1000. */
static const uint8_t guest[] = {
    0x85, 0xf6,       /* 1000: test si, si */
    0x74, 0x07,       /*       jz 100b */
    0x31, 0xc0,       /* 1004: xor ax, ax */
    0x0f, 0xa2,       /*       cpuid */
    0x4e,             /*       dec si */
    0x75, 0xf9,       /*       jnz 1004 */
    0xe6, PORT,       /* 100b: out 0x10, al */
    0xeb, 0xf1,       /*       jmp 1000 */
};

static int vcpu;
static struct kvm_run *run;

static void fail(const char *what)
{
    printf("L2-EXIT error %s: %s\n", what, strerror(errno));
    fflush(stdout);
    if (getpid() == 1)
        reboot(RB_POWER_OFF);
    exit(1);
}

static int need(int result, const char *what)
{
    if (result < 0)
        fail(what);
    return result;
}

static uint64_t now(void)
{
    struct timespec at;

    clock_gettime(CLOCK_MONOTONIC_RAW, &at);
    return (uint64_t)at.tv_sec * 1000000000u + (uint64_t)at.tv_nsec;
}

static void load_modules(void)
{
    FILE *order = fopen("/modules/order", "r");
    char name[256];

    if (!order)
        return;
    while (fgets(name, sizeof name, order)) {
        char path[300];
        int file;

        name[strcspn(name, "\n")] = 0;
        snprintf(path, sizeof path, "/modules/%s", name);
        file = need(open(path, O_RDONLY | O_CLOEXEC), path);
        if (syscall(SYS_finit_module, file, "", 0) < 0 && errno != EEXIST && errno != EOPNOTSUPP)
            fail(path);
        close(file);
    }
    fclose(order);
}

static void make_guest(void)
{
    struct kvm_userspace_memory_region region = { .guest_phys_addr = 0, .memory_size = MEMORY };
    static struct {
        struct kvm_cpuid2 head;
        struct kvm_cpuid_entry2 entries[100];
    } cpuid = { .head.nent = 100 };
    struct kvm_sregs sregs;
    struct kvm_regs regs = { .rip = CODE, .rflags = 2 };
    int device = need(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm");
    int vm = need(ioctl(device, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
    int size = need(ioctl(device, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE");
    uint8_t *memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

    if (memory == MAP_FAILED)
        fail("memory");
    memcpy(memory + CODE, guest, sizeof guest);
    region.userspace_addr = (uintptr_t)memory;
    need(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION");
    vcpu = need(ioctl(vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
    run = mmap(NULL, (size_t)size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
    if (run == MAP_FAILED)
        fail("kvm_run");
    need(ioctl(device, KVM_GET_SUPPORTED_CPUID, &cpuid), "KVM_GET_SUPPORTED_CPUID");
    need(ioctl(vcpu, KVM_SET_CPUID2, &cpuid), "KVM_SET_CPUID2");
    need(ioctl(vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    need(ioctl(vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
    need(ioctl(vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
}

static void run_to_out(void)
{
    if (ioctl(vcpu, KVM_RUN, 0) < 0)
        fail("KVM_RUN");
    if (run->exit_reason != KVM_EXIT_IO || run->io.port != PORT) {
        printf("L2-EXIT error exit reason %u\n", run->exit_reason);
        fflush(stdout);
        reboot(RB_POWER_OFF);
        exit(1);
    }
}

/* Runs the guest up to its next OUT with `count` CPUIDs before it; returns the time. */
static uint64_t time_cpuids(unsigned count)
{
    struct kvm_regs regs;
    uint64_t start;

    need(ioctl(vcpu, KVM_GET_REGS, &regs), "KVM_GET_REGS");
    regs.rsi = count;
    need(ioctl(vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
    start = now();
    run_to_out();
    return now() - start;
}

static uint64_t time_outs(void)
{
    uint64_t start = now();

    for (int i = 0; i < EXITS; i++)
        run_to_out();
    return now() - start;
}

static int by_value(const void *one, const void *other)
{
    double a = *(const double *)one, b = *(const double *)other;

    return (a > b) - (a < b);
}

static void report(const char *kind, double *samples)
{
    qsort(samples, BATCHES, sizeof *samples, by_value);
    printf("L2-EXIT %s median %.2f low %.2f high %.2f\n", kind, samples[BATCHES / 2], samples[BATCHES / 20],
           samples[BATCHES - 1 - BATCHES / 20]);
}

int main(void)
{
    static double cpuid[BATCHES], io[BATCHES];

    if (getpid() == 1) {
        need(mount("devtmpfs", "/dev", "devtmpfs", 0, ""), "devtmpfs");
        load_modules();
    }
    make_guest();
    run_to_out();
    for (int i = -WARM_UP; i < BATCHES; i++) {
        double many = (double)time_cpuids(EXITS), none = (double)time_cpuids(0), outs = (double)time_outs();

        if (i >= 0) {
            cpuid[i] = (many - none) / EXITS;
            io[i] = outs / EXITS;
        }
    }
    report("cpuid", cpuid);
    report("io", io);
    printf("L2-EXIT end\n");
    fflush(stdout);
    if (getpid() == 1)
        reboot(RB_POWER_OFF);
    return 0;
}
