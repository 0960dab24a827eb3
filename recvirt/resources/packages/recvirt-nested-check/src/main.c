/* recvirt-nested-check: what nested virtualization this virtual machine has, proved by running an L2. */
#include <errno.h>
#include <getopt.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "nested.h"

struct options {
    bool json, boot;
    unsigned timeout_seconds;
    uint32_t rounds;
    const char *answer_for, *initramfs, *base, *release;
};

enum { OPTION_ROOT = 256, OPTION_ANSWER, OPTION_INITRAMFS, OPTION_BASE, OPTION_RELEASE, OPTION_ROUNDS };

static const struct option LONG_OPTIONS[] = {
    { "help", no_argument, NULL, 'h' },
    { "version", no_argument, NULL, 'V' },
    { "json", no_argument, NULL, 'j' },
    { "no-boot", no_argument, NULL, 'n' },
    { "timeout", required_argument, NULL, 't' },
    { "rounds", required_argument, NULL, OPTION_ROUNDS },
    { "root", required_argument, NULL, OPTION_ROOT },
    { "answer-for", required_argument, NULL, OPTION_ANSWER },
    { "write-initramfs", required_argument, NULL, OPTION_INITRAMFS },
    { "base", required_argument, NULL, OPTION_BASE },
    { "kernel-release", required_argument, NULL, OPTION_RELEASE },
    { NULL, 0, NULL, 0 },
};

static void print_help(FILE *out)
{
    fputs("Usage: recvirt-nested-check [OPTION]...\n"
          "Tell what nested virtualization this virtual machine has, and prove it by running tiny guests (L2) under KVM.\n"
          "\n"
          "  -j, --json                  print the report as one JSON object\n"
          "  -n, --no-boot               only look, start no L2\n"
          "  -t, --timeout=SECONDS       give each L2 this long (1 to 3600, default 10)\n"
          "      --rounds=COUNT          CPUID exits an L2 makes (1 to 100000000, default 1000)\n"
          "      --root=DIRECTORY        judge another machine by a copy of its /proc and /sys (and `cpuid -1 -r`\n"
          "                              as DIRECTORY/cpuid); starts no L2\n"
          "      --write-initramfs=FILE  write an initramfs for an L2, with KVM's modules of the running kernel\n"
          "      --kernel-release=NAME   ... of this kernel instead\n"
          "      --base=FILE             ... on top of this archive (default /usr/lib/recvirt/l2-initramfs.cpio)\n"
          "      --answer-for=NONCE      print what an L2 with that initramfs must answer to recvirt.nonce=NONCE\n"
          "  -h, --help                  this text\n"
          "  -V, --version               the version\n"
          "\n"
          "Exit status:\n"
          "   0  nested virtualization works, an L2 proved it (with --no-boot: nothing is missing)\n"
          "   1  the check itself failed\n"
          "   2  wrong options\n"
          "  10  the processor of this machine has neither VMX nor SVM, or they are locked\n"
          "  11  there is no /dev/kvm\n"
          "  12  /dev/kvm may not be opened by this user\n"
          "  13  KVM is there, but no L2 proved itself\n"
          "  14  L2s run, but can't be hypervisors themselves (nested=0)\n"
          "\n"
          "Example: recvirt-nested-check --json | jq -e '.verdict == \"works\"'\n",
          out);
}

static unsigned long number(const char *option, const char *text, unsigned long least, unsigned long most)
{
    char *end;
    unsigned long value;

    errno = 0;
    value = strtoul(text, &end, 10);
    if (errno || *end || text[0] < '0' || text[0] > '9' || value < least || value > most) {
        fprintf(stderr, "recvirt-nested-check: --%s takes a whole number from %lu to %lu, not '%s'\n", option, least, most, text);
        exit(EXIT_USAGE);
    }
    return value;
}

static void set_root(const char *directory)
{
    struct stat found;

    if (stat(directory, &found) || !S_ISDIR(found.st_mode)) {
        fprintf(stderr, "recvirt-nested-check: --root: '%s' is not a directory\n", directory);
        exit(EXIT_USAGE);
    }
    root_dir = directory;
}

static void parse(int count, char **words, struct options *options)
{
    int option;

    while ((option = getopt_long(count, words, "jnt:hV", LONG_OPTIONS, NULL)) != -1) {
        switch (option) {
        case 'j': options->json = true; break;
        case 'n': options->boot = false; break;
        case 't': options->timeout_seconds = (unsigned)number("timeout", optarg, 1, 3600); break;
        case OPTION_ROUNDS: options->rounds = (uint32_t)number("rounds", optarg, 1, 100000000); break;
        case OPTION_ROOT: set_root(optarg); options->boot = false; break;
        case OPTION_ANSWER: options->answer_for = optarg; break;
        case OPTION_INITRAMFS: options->initramfs = optarg; break;
        case OPTION_BASE: options->base = optarg; break;
        case OPTION_RELEASE: options->release = optarg; break;
        case 'h': print_help(stdout); exit(0);
        case 'V': puts("recvirt-nested-check " VERSION); exit(0);
        default: fputs("recvirt-nested-check --help lists the options\n", stderr); exit(EXIT_USAGE);
        }
    }
    if (optind < count) {
        fprintf(stderr, "recvirt-nested-check: '%s' is one word too many\n", words[optind]);
        exit(EXIT_USAGE);
    }
}

/* Without opening it: of another machine, or when no guest is wanted. */
static void look_at_device(struct device *device)
{
    memset(device, 0, sizeof *device);
    device->offers_extension = UNKNOWN;
    device->state = exists("/dev/kvm") ? DEVICE_NOT_TRIED : DEVICE_ABSENT;
    if (device->state == DEVICE_ABSENT)
        strcpy(device->error, strerror(ENOENT));
}

static void not_started(struct l2_result *result, const char *why)
{
    result->state = L2_FAILED;
    result->counted = (struct counters){ -1, -1, -1, -1 };
    snprintf(result->error, sizeof result->error, "%s", why);
}

int main(int count, char **words)
{
    struct options options = { .boot = true, .timeout_seconds = 10, .rounds = 1000 };
    struct l2_result real = { .mode = "real" }, lng = { .mode = "long" };
    static struct facts facts;
    static struct verdict verdict;
    struct device device;

    options.base = "/usr/lib/recvirt/l2-initramfs.cpio";
    parse(count, words, &options);
    if (options.answer_for) {
        printf("%016llx\n", (unsigned long long)answer_for(options.answer_for));
        return 0;
    }
    if (options.initramfs)
        return write_initramfs(options.initramfs, options.base, options.release);
    gather_facts(&facts);
    if (*root_dir)
        look_at_device(&device);
    else
        probe_device(&device, options.timeout_seconds);
    if (options.boot && device.state == DEVICE_USABLE) {
        run_l2(&real, false, options.rounds, options.timeout_seconds);
        /* What hung once hangs again: the second wait is spared. */
        if (real.state == L2_TIMEOUT)
            not_started(&lng, "not started, because the real-mode guest fell silent");
        else
            run_l2(&lng, true, options.rounds, options.timeout_seconds);
    }
    judge(&facts, &device, &real, &lng, &verdict);
    if (options.json)
        print_json(stdout, &facts, &device, &real, &lng, &verdict);
    else
        print_human(stdout, &facts, &verdict);
    if (fflush(stdout) || ferror(stdout)) {
        perror("recvirt-nested-check");
        return EXIT_INTERNAL;
    }
    return verdict.status;
}
