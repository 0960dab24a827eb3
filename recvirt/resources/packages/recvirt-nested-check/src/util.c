/* Small helpers: text files below --root, words, the nonce's answer. */
#include <fcntl.h>
#include <limits.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "nested.h"

const char *root_dir = "";

static bool under_root(const char *path, char *buffer, size_t size)
{
    int length = snprintf(buffer, size, "%s%s", root_dir, path);

    return length > 0 && (size_t)length < size;
}

long read_text(const char *path, char *buffer, size_t size)
{
    char full[PATH_MAX];
    size_t used = 0;
    ssize_t got;
    int fd;

    buffer[0] = '\0';
    if (!under_root(path, full, sizeof full))
        return -1;
    fd = open(full, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    while (used < size - 1 && (got = read(fd, buffer + used, size - 1 - used)) > 0)
        used += (size_t)got;
    close(fd);
    while (used > 0 && (buffer[used - 1] == '\n' || buffer[used - 1] == ' '))
        used--;
    buffer[used] = '\0';
    return (long)used;
}

bool exists(const char *path)
{
    char full[PATH_MAX];

    return under_root(path, full, sizeof full) && access(full, F_OK) == 0;
}

tri parse_flag(const char *text)
{
    if (!strcmp(text, "Y") || !strcmp(text, "1"))
        return YES;
    if (!strcmp(text, "N") || !strcmp(text, "0"))
        return NO;
    return UNKNOWN;
}

bool has_word(const char *list, const char *word)
{
    size_t length = strlen(word);

    for (const char *at = list; (at = strstr(at, word)) != NULL; at += length) {
        bool starts = at == list || at[-1] == ' ';

        if (starts && (at[length] == ' ' || at[length] == '\0'))
            return true;
    }
    return false;
}

bool cpuinfo_line(const char *key, char *buffer, size_t size)
{
    static char text[16384];
    size_t length = strlen(key);

    buffer[0] = '\0';
    if (read_text("/proc/cpuinfo", text, sizeof text) < 0)
        return false;
    for (char *line = text; line && *line; line = strchr(line, '\n') ? strchr(line, '\n') + 1 : NULL) {
        char *end = strchr(line, '\n');
        char *value = memchr(line, ':', end ? (size_t)(end - line) : strlen(line));

        if (line[0] == '\n')
            return false; /* the end of the first processor */
        if (!value || strncmp(line, key, length) || (line[length] != '\t' && line[length] != ':' && line[length] != ' '))
            continue;
        if (line[length] == ' ' && line[length + 1] != ':') /* "vmx" is not "vmx flags" */
            continue;
        value += value[1] == ' ' ? 2 : 1;
        snprintf(buffer, size, "%.*s", end ? (int)(end - value) : (int)strlen(value), value);
        return true;
    }
    return false;
}

uint64_t answer_for(const char *nonce)
{
    uint64_t hash = 0xcbf29ce484222325u;

    for (; *nonce; nonce++) {
        hash ^= (unsigned char)*nonce;
        hash *= 0x100000001b3u;
    }
    return hash;
}

uint64_t now_nanoseconds(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}
