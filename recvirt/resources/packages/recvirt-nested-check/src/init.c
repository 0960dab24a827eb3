/*
 * The first and only process of an L2 (or of an L1 under an emulator): says on the console what machine this is,
 * answers the nonce of its kernel command line, loads KVM's modules if it has them, runs recvirt-nested-check, and
 * powers off. docs/nested-check.md lists the words.
 */
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/klog.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#include "nested.h"

#define WORD "RECVIRT-L2 "
#define COMPRESSED 4 /* MODULE_INIT_COMPRESSED_FILE of linux/module.h */

static char command_line[4096];

static void say(const char *text)
{
    printf(WORD "%s\n", text);
    fflush(stdout);
}

/* The value of "key=value" on the command line, "" when it is not there. */
static const char *option(const char *key, char *buffer, size_t size)
{
    size_t length = strlen(key);

    buffer[0] = '\0';
    for (const char *at = command_line; *at; at += strcspn(at, " "), at += strspn(at, " "))
        if (!strncmp(at, key, length) && at[length] == '=') {
            at += length + 1;
            snprintf(buffer, size, "%.*s", (int)strcspn(at, " "), at);
            return buffer;
        }
    return buffer;
}

static void prepare(void)
{
    int console;

    mkdir("/proc", 0755);
    mount("proc", "/proc", "proc", 0, NULL);
    mount("sysfs", "/sys", "sysfs", 0, NULL);
    mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
    console = open("/dev/console", O_RDWR);
    if (console >= 0) {
        dup2(console, 0);
        dup2(console, 1);
        dup2(console, 2);
    }
    read_text("/proc/cmdline", command_line, sizeof command_line);
    klogctl(6, NULL, 0); /* the kernel's messages no longer go to the console: they would cut our lines */
}

static void tell_machine(void)
{
    static char flags[8192];
    char nonce[200];
    struct registers r;
    struct utsname kernel;
    char signature[13] = "none";

    cpuinfo_line("flags", flags, sizeof flags);
    if (cpuid(0x40000000, 0, &r)) {
        memcpy(signature, &r.ebx, 4);
        memcpy(signature + 4, &r.ecx, 4);
        memcpy(signature + 8, &r.edx, 4);
        signature[12] = '\0';
    }
    uname(&kernel);
    printf(WORD "kernel %s\n", kernel.release);
    printf(WORD "cpu vmx=%s svm=%s hypervisor=%s\n", has_word(flags, "vmx") ? "yes" : "no",
           has_word(flags, "svm") ? "yes" : "no", signature);
    if (*option("recvirt.nonce", nonce, sizeof nonce))
        printf(WORD "nonce %s answer %016llx\n", nonce, (unsigned long long)answer_for(nonce));
    fflush(stdout);
}

/* "kvm_intel.nested=1" on the command line becomes the parameter "nested=1" of kvm-intel.ko, as with modprobe. */
static void module_parameters(const char *file, char *buffer, size_t size)
{
    char name[128];
    size_t used = 0, length = 0;

    buffer[0] = '\0';
    for (; file[length] && file[length] != '.' && length < sizeof name - 2; length++)
        name[length] = file[length] == '-' ? '_' : file[length];
    name[length++] = '.';
    name[length] = '\0';
    for (const char *at = command_line; *at; at += strcspn(at, " "), at += strspn(at, " "))
        if (!strncmp(at, name, length)) {
            int added = snprintf(buffer + used, size - used, "%.*s ", (int)(strcspn(at, " ") - length), at + length);

            if (added < 0 || (size_t)added >= size - used)
                return;
            used += (size_t)added;
        }
}

static void load_module(const char *file)
{
    char path[300], parameters[1024];
    const char *end = strrchr(file, '.');
    int fd, flags = end && strcmp(end, ".ko") ? COMPRESSED : 0;

    snprintf(path, sizeof path, "/modules/%s", file);
    module_parameters(file, parameters, sizeof parameters);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || (syscall(SYS_finit_module, fd, parameters, flags) < 0 && errno != EEXIST))
        printf(WORD "module %s failed: %s\n", file, strerror(errno));
    else
        printf(WORD "module %s loaded %s\n", file, parameters);
    fflush(stdout);
    if (fd >= 0)
        close(fd);
}

static void load_modules(void)
{
    static char list[4096], flags[8192];
    char *save = NULL;

    if (read_text("/modules/list", list, sizeof list) < 0)
        return;
    cpuinfo_line("flags", flags, sizeof flags);
    for (char *line = strtok_r(list, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
        char *file = strchr(line, ' ');

        if (!file)
            continue;
        *file++ = '\0';
        if (!strcmp(line, "any") || has_word(flags, line))
            load_module(file);
    }
}

/* One line of JSON after the word, and the exit status on a line of its own. */
static void check(void)
{
    char timeout[16], rounds[16];
    int status = -1;
    pid_t child;

    if (!*option("recvirt.timeout", timeout, sizeof timeout))
        strcpy(timeout, "60");
    if (!*option("recvirt.rounds", rounds, sizeof rounds))
        strcpy(rounds, "1000");
    printf(WORD "check ");
    fflush(stdout);
    child = fork();
    if (child == 0) {
        execl("/recvirt-nested-check", "recvirt-nested-check", "--json", "--timeout", timeout, "--rounds", rounds, (char *)NULL);
        _exit(127);
    }
    while (waitpid(child, &status, 0) < 0 && errno == EINTR)
        ;
    printf(WORD "status %d\n", WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
    fflush(stdout);
}

int main(void)
{
    char value[16];

    prepare();
    say("start");
    tell_machine();
    load_modules();
    if (strcmp(option("recvirt.check", value, sizeof value), "0"))
        check();
    say("end");
    tcdrain(1);
    sync();
    reboot(strcmp(option("recvirt.end", value, sizeof value), "reboot") ? RB_POWER_OFF : RB_AUTOBOOT);
    for (;;)
        pause();
}
