/*
 * Writes an initramfs for an L2: the archive of this package, and behind it a second one with KVM's modules of a kernel.
 * The kernel unpacks joined archives one after the other. Format "newc": the kernel's early-userspace/buffer-format.rst.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <unistd.h>

#include "nested.h"

#define MAX_MODULES 24

struct wanted {
    char path[200];        /* below the modules' directory, as modules.dep has it */
    const char *extension; /* the processor that needs it: vmx, svm, or any */
};

struct plan {
    struct wanted modules[MAX_MODULES];
    size_t count;
};

struct bytes {
    char *data;
    size_t size;
};

static int complain(const char *what)
{
    fprintf(stderr, "recvirt-nested-check: %s: %s\n", what, strerror(errno));
    return EXIT_INTERNAL;
}

static bool slurp(FILE *in, struct bytes *out)
{
    size_t room = 0;

    for (;;) {
        size_t got;

        if (out->size == room) {
            char *larger = realloc(out->data, room += 1 << 20);

            if (!larger)
                return false;
            out->data = larger;
        }
        got = fread(out->data + out->size, 1, room - out->size, in);
        if (got == 0)
            return !ferror(in);
        out->size += got;
    }
}

static bool read_file(const char *path, struct bytes *out)
{
    FILE *in = fopen(path, "rb");
    bool good = in && slurp(in, out);

    if (in)
        fclose(in);
    return good;
}

/* zstd -dc < path. False when there is no such program: then the kernel must unpack the module itself. */
static bool unpack_with(const char *program, const char *path, struct bytes *out)
{
    int pipe_ends[2], status;
    FILE *in;
    bool good;
    pid_t child;

    if (pipe(pipe_ends) < 0)
        return false;
    child = fork();
    if (child == 0) {
        dup2(pipe_ends[1], 1);
        close(pipe_ends[0]);
        if (!freopen("/dev/null", "w", stderr))
            _exit(127);
        execlp(program, program, "-dc", "--", path, (char *)NULL);
        _exit(127);
    }
    close(pipe_ends[1]);
    in = fdopen(pipe_ends[0], "rb");
    good = in && slurp(in, out);
    if (in)
        fclose(in);
    if (child < 0 || waitpid(child, &status, 0) != child || !good || !WIFEXITED(status) || WEXITSTATUS(status) != 0) {
        out->size = 0;
        return false;
    }
    return true;
}

static bool ends_with(const char *text, const char *end)
{
    size_t a = strlen(text), b = strlen(end);

    return a >= b && !strcmp(text + a - b, end);
}

static bool is_wanted(const char *path, const char *module)
{
    const char *base = strrchr(path, '/');
    char with_dashes[64], with_underscores[64];

    base = base ? base + 1 : path;
    snprintf(with_dashes, sizeof with_dashes, "kvm-%s.ko", module);
    snprintf(with_underscores, sizeof with_underscores, "kvm_%s.ko", module);
    return !strncmp(base, with_dashes, strlen(with_dashes)) || !strncmp(base, with_underscores, strlen(with_underscores));
}

static void want(struct plan *plan, const char *path, const char *extension)
{
    for (size_t i = 0; i < plan->count; i++)
        if (!strcmp(plan->modules[i].path, path)) {
            if (strcmp(plan->modules[i].extension, extension))
                plan->modules[i].extension = "any";
            return;
        }
    if (plan->count < MAX_MODULES) {
        snprintf(plan->modules[plan->count].path, sizeof plan->modules[0].path, "%s", path);
        plan->modules[plan->count++].extension = extension;
    }
}

/* A line of modules.dep: "the module: what it needs ...", to be loaded from the right to the left. */
static void want_line(struct plan *plan, char *line, const char *extension)
{
    char *words[MAX_MODULES], *save = NULL;
    size_t count = 0;

    for (char *word = strtok_r(line, ": ", &save); word && count < MAX_MODULES; word = strtok_r(NULL, ": ", &save))
        words[count++] = word;
    while (count > 0)
        want(plan, words[--count], extension);
}

static int make_plan(struct plan *plan, const char *directory)
{
    static const char *const vendors[][2] = { { "intel", "vmx" }, { "amd", "svm" } };
    char path[512], *save = NULL;
    struct bytes text = { 0 };

    snprintf(path, sizeof path, "%s/modules.dep", directory);
    if (!read_file(path, &text) || !(text.data = realloc(text.data, text.size + 1)))
        return complain(path);
    text.data[text.size] = '\0';
    for (char *line = strtok_r(text.data, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
        char module[200];
        size_t length = strcspn(line, ":");

        snprintf(module, sizeof module, "%.*s", (int)length, line);
        for (size_t i = 0; i < 2; i++)
            if (is_wanted(module, vendors[i][0]))
                want_line(plan, line, vendors[i][1]);
    }
    free(text.data);
    return 0;
}

/* ---- newc ---- */

static void pad(FILE *out, size_t written)
{
    while (written++ % 4)
        putc(0, out);
}

static void member(FILE *out, const char *name, unsigned mode, const char *data, size_t size)
{
    static unsigned inode = 1000; /* apart from those of the first archive */
    size_t name_size = strlen(name) + 1;

    fprintf(out, "070701%08x%08x%08x%08x%08x%08x%08lx%08x%08x%08x%08x%08lx%08x", inode++, mode, 0u, 0u, 1u, 0u,
            (unsigned long)size, 0u, 0u, 0u, 0u, (unsigned long)name_size, 0u);
    fwrite(name, 1, name_size, out);
    pad(out, 110 + name_size);
    fwrite(data, 1, size, out);
    pad(out, size);
}

static int put_module(FILE *out, FILE *list, const char *directory, const struct wanted *wanted)
{
    static const char *const packers[][2] = { { ".zst", "zstd" }, { ".xz", "xz" }, { ".gz", "gzip" } };
    const char *base = strrchr(wanted->path, '/');
    char full[768], name[256], member_name[300];
    struct bytes data = { 0 };
    bool plain = false;

    snprintf(full, sizeof full, "%s/%s", directory, wanted->path);
    snprintf(name, sizeof name, "%s", base ? base + 1 : wanted->path);
    for (size_t i = 0; i < 3 && !plain; i++)
        if (ends_with(name, packers[i][0]) && unpack_with(packers[i][1], full, &data)) {
            name[strlen(name) - strlen(packers[i][0])] = '\0';
            plain = true;
        }
    if (!plain && !read_file(full, &data)) {
        free(data.data);
        return complain(full);
    }
    snprintf(member_name, sizeof member_name, "modules/%s", name);
    member(out, member_name, S_IFREG | 0644, data.data, data.size);
    fprintf(list, "%s %s\n", wanted->extension, name);
    free(data.data);
    return 0;
}

static int put_archives(FILE *out, const struct bytes *base, const char *directory, const struct plan *plan)
{
    char *text = NULL;
    size_t size = 0;
    FILE *list = open_memstream(&text, &size);
    int status = 0;

    if (!list)
        return complain("memory");
    fwrite(base->data, 1, base->size, out);
    for (size_t i = 0; i < plan->count && !status; i++)
        status = put_module(out, list, directory, &plan->modules[i]);
    fclose(list);
    if (!status) {
        member(out, "modules/list", S_IFREG | 0644, text, size);
        member(out, "TRAILER!!!", 0, "", 0);
    }
    free(text);
    return status;
}

int write_initramfs(const char *output, const char *base_path, const char *release)
{
    char directory[400], partial[512];
    struct plan plan = { .count = 0 };
    struct bytes base = { 0 };
    struct utsname running;
    FILE *out;
    int status;

    if (!release && uname(&running) == 0)
        release = running.release;
    snprintf(directory, sizeof directory, "%s/lib/modules/%s", root_dir, release);
    status = make_plan(&plan, directory);
    if (status)
        return status;
    if (!read_file(base_path, &base))
        return complain(base_path);
    snprintf(partial, sizeof partial, "%s.part", output);
    out = fopen(partial, "wb");
    if (!out)
        return complain(partial);
    status = put_archives(out, &base, directory, &plan);
    if ((ferror(out) | fclose(out)) && !status)
        status = complain(partial);
    if (!status && rename(partial, output) < 0)
        status = complain(output);
    if (status)
        unlink(partial);
    free(base.data);
    return status;
}
