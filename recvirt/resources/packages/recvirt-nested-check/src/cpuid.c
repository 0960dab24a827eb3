/* CPUID and MSRs: of this processor, or of another machine's dump below --root. */
#include <cpuid.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "nested.h"

/* A line of "cpuid -1 -r":  0x00000000 0x00: eax=0x0000000d ebx=0x756e6547 ecx=0x6c65746e edx=0x49656e69 */
static bool from_dump(uint32_t leaf, uint32_t subleaf, struct registers *out)
{
    static char text[65536];
    char *save = NULL;

    if (read_text("/cpuid", text, sizeof text) < 0)
        return false;
    for (char *line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
        struct registers found;
        uint32_t l, s;

        if (sscanf(line, " %x %x: eax=%x ebx=%x ecx=%x edx=%x", &l, &s, &found.eax, &found.ebx, &found.ecx,
                   &found.edx) == 6 && l == leaf && s == subleaf) {
            *out = found;
            return true;
        }
    }
    return false;
}

static bool is_guest(void)
{
    uint32_t a, b, c, d;

    __cpuid(1, a, b, c, d);
    return (c >> 31) & 1;
}

bool cpuid(uint32_t leaf, uint32_t subleaf, struct registers *out)
{
    struct registers top;

    if (*root_dir)
        return from_dump(leaf, subleaf, out);
    /* Hypervisor leaves exist only in a guest; elsewhere a processor answers them with another leaf's data. */
    if ((leaf >> 16) == 0x4000 && !is_guest())
        return false;
    __cpuid(leaf & 0xffffff00, top.eax, top.ebx, top.ecx, top.edx);
    if ((leaf & 0xff) > (top.eax & 0xff) || (top.eax & 0xffffff00) != (leaf & 0xffffff00)) {
        if ((leaf & 0xff) != 0)
            return false;
    }
    __cpuid_count(leaf, subleaf, out->eax, out->ebx, out->ecx, out->edx);
    return true;
}

/* A line of the dump:  0x0000048b 0x007cffff00000000 */
static bool msr_from_dump(uint32_t index, uint64_t *out)
{
    char text[8192], *save = NULL;

    if (read_text("/msr", text, sizeof text) < 0)
        return false;
    for (char *line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
        unsigned found;
        unsigned long long value;

        if (sscanf(line, " %x %llx", &found, &value) == 2 && found == index) {
            *out = value;
            return true;
        }
    }
    return false;
}

bool read_msr(uint32_t index, uint64_t *out)
{
    ssize_t got;
    int fd;

    if (*root_dir)
        return msr_from_dump(index, out);
    fd = open("/dev/cpu/0/msr", O_RDONLY | O_CLOEXEC); /* the msr module; root only */
    if (fd < 0)
        return false;
    got = pread(fd, out, sizeof *out, (off_t)index);
    close(fd);
    return got == (ssize_t)sizeof *out;
}
