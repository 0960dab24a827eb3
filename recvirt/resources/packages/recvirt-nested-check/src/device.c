/*
 * /dev/kvm itself, KVM's statistics, and the clock that whatever touches them is under: each guest and each probe is a
 * child process that is killed when it takes too long, because a /dev/kvm that hangs must not hang the check.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "kvm.h"

/* ---- a child under a clock ---- */

enum ended guarded(void (*work)(void *), void *shared, unsigned seconds)
{
    uint64_t deadline = now_nanoseconds() + (uint64_t)seconds * 1000000000u;
    struct timespec nap = { 0, 2000000 };
    pid_t parent = getpid(), child;
    int status;

    fflush(NULL);
    child = fork();
    if (child < 0)
        return DIED;
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (getppid() == parent)
            work(shared);
        _exit(0);
    }
    for (;;) {
        pid_t got = waitpid(child, &status, WNOHANG);

        if (got == child)
            return WIFEXITED(status) && WEXITSTATUS(status) == 0 ? ENDED : DIED;
        if (now_nanoseconds() > deadline)
            break;
        nanosleep(&nap, NULL);
    }
    kill(child, SIGKILL);
    /* A child stuck inside the kernel may never die; it is not waited for longer than this. */
    for (int i = 0; i < 500 && waitpid(child, &status, WNOHANG) == 0; i++)
        nanosleep(&nap, NULL);
    return KILLED_BY_CLOCK;
}

void *shared_copy(const void *from, size_t size)
{
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

    if (memory == MAP_FAILED) {
        perror("recvirt-nested-check: mmap");
        exit(EXIT_INTERNAL);
    }
    memcpy(memory, from, size);
    return memory;
}

/* ---- the device ---- */

struct kvm_cpuid2 *supported_cpuid(int device)
{
    struct kvm_cpuid2 *table = calloc(1, sizeof *table + MAX_CPUID * sizeof(struct kvm_cpuid_entry2));

    if (table) {
        table->nent = MAX_CPUID - 1; /* one is kept for our own leaf */
        if (ioctl(device, KVM_GET_SUPPORTED_CPUID, table) == 0)
            return table;
    }
    free(table);
    return NULL;
}

static tri offers_extension(int device)
{
    struct kvm_cpuid2 *table = supported_cpuid(device);
    tri offered = NO;

    if (!table)
        return UNKNOWN;
    for (uint32_t i = 0; i < table->nent; i++) {
        const struct kvm_cpuid_entry2 *entry = &table->entries[i];

        if ((entry->function == 1 && ((entry->ecx >> 5) & 1)) || (entry->function == 0x80000001 && ((entry->ecx >> 2) & 1)))
            offered = YES;
    }
    free(table);
    return offered;
}

static void probe(void *shared)
{
    struct device *device = shared;
    int fd = open(DEVICE, O_RDWR | O_CLOEXEC), vm;

    if (HOOK("hang") || HOOK("die")) { /* these guests need no KVM */
        device->state = DEVICE_USABLE;
        return;
    }
    if (fd < 0) {
        device->state = errno == ENOENT || errno == ENODEV || errno == ENXIO ? DEVICE_ABSENT
                        : errno == EACCES || errno == EPERM                  ? DEVICE_NO_PERMISSION
                                                                             : DEVICE_UNUSABLE;
        snprintf(device->error, sizeof device->error, "open: %s", strerror(errno));
        return;
    }
    device->api_version = ioctl(fd, KVM_GET_API_VERSION, 0);
    if (device->api_version != KVM_API_VERSION) {
        snprintf(device->error, sizeof device->error, "KVM_GET_API_VERSION gave %d, not %d", device->api_version,
                 KVM_API_VERSION);
        return;
    }
    vm = ioctl(fd, KVM_CREATE_VM, 0);
    if (vm < 0) {
        snprintf(device->error, sizeof device->error, "KVM_CREATE_VM: %s", strerror(errno));
        return;
    }
    device->offers_extension = offers_extension(fd);
    device->error[0] = '\0';
    device->state = DEVICE_USABLE;
}

void probe_device(struct device *device, unsigned timeout_seconds)
{
    struct device *shared;

    memset(device, 0, sizeof *device);
    device->state = DEVICE_UNUSABLE;
    device->offers_extension = UNKNOWN;
    strcpy(device->error, "the probe died");
    shared = shared_copy(device, sizeof *device);
    if (guarded(probe, shared, timeout_seconds) == KILLED_BY_CLOCK)
        snprintf(shared->error, sizeof shared->error, "no answer within %u s", timeout_seconds);
    *device = *shared;
    munmap(shared, sizeof *shared);
}

/* ---- KVM's own statistics: Documentation/virt/kvm/api.rst, KVM_GET_STATS_FD ---- */

static int64_t one_counter(int fd, const struct kvm_stats_header *header, const char *name)
{
    size_t step = sizeof(struct kvm_stats_desc) + header->name_size;
    _Alignas(8) char buffer[512];
    int64_t value;

    for (uint32_t i = 0; i < header->num_desc && step < sizeof buffer; i++) {
        struct kvm_stats_desc *found = (struct kvm_stats_desc *)buffer;

        if (pread(fd, buffer, step, (off_t)(header->desc_offset + i * step)) != (ssize_t)step)
            return -1;
        buffer[step - 1] = '\0';
        if (strcmp(found->name, name))
            continue;
        if (pread(fd, &value, sizeof value, (off_t)header->data_offset + found->offset) != (ssize_t)sizeof value)
            return -1;
        return value;
    }
    return -1;
}

struct counters read_counters(int fd)
{
    struct counters none = { -1, -1, -1, -1 }, found;
    struct kvm_stats_header header;

    if (fd < 0 || pread(fd, &header, sizeof header, 0) != (ssize_t)sizeof header)
        return none;
    found.exits = one_counter(fd, &header, "exits");
    found.io_exits = one_counter(fd, &header, "io_exits");
    found.mmio_exits = one_counter(fd, &header, "mmio_exits");
    found.halt_exits = one_counter(fd, &header, "halt_exits");
    return found;
}
