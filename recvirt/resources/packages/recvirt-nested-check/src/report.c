/* The report: for people, or as JSON (docs/nested-check.md has its schema). */
#include <string.h>

#include "nested.h"

static const char *const STATES[] = { "ok", "info", "warn", "fail", "skip" };

void print_human(FILE *out, const struct facts *facts, const struct verdict *verdict)
{
    (void)facts;
    fprintf(out, "recvirt-nested-check %s\n", VERSION);
    for (size_t i = 0; i < verdict->count; i++) {
        const struct check *check = &verdict->checks[i];

        fprintf(out, "[%-4s] %-16s %s\n", STATES[check->state], check->name, check->text);
        if (check->next[0])
            fprintf(out, "       %-16s next: %s\n", "", check->next);
    }
    fprintf(out, "%s (status %d, %s)\n", verdict->text, verdict->status, verdict->word);
}

/* ---- JSON: a comma goes before every value but the first of its object or list ---- */

static bool first = true;

static void string(FILE *out, const char *text)
{
    putc('"', out);
    for (; *text; text++) {
        unsigned char c = (unsigned char)*text;

        if (c == '"' || c == '\\')
            fprintf(out, "\\%c", c);
        else if (c < 32 || c > 126)
            fprintf(out, "\\u%04x", c);
        else
            putc(c, out);
    }
    putc('"', out);
}

static void key(FILE *out, const char *name)
{
    if (!first)
        putc(',', out);
    first = false;
    if (name) {
        string(out, name);
        putc(':', out);
    }
}

static void open_bracket(FILE *out, const char *name, char bracket)
{
    key(out, name);
    putc(bracket, out);
    first = true;
}

static void close_bracket(FILE *out, char bracket)
{
    putc(bracket, out);
    first = false;
}

static void put_text(FILE *out, const char *name, const char *text)
{
    key(out, name);
    if (text && *text)
        string(out, text);
    else
        fputs("null", out);
}

static void put_tri(FILE *out, const char *name, tri value)
{
    key(out, name);
    fputs(value == YES ? "true" : value == NO ? "false" : "null", out);
}

static void put_number(FILE *out, const char *name, int64_t value)
{
    key(out, name);
    if (value < 0)
        fputs("null", out);
    else
        fprintf(out, "%lld", (long long)value);
}

static void put_hex(FILE *out, const char *name, uint64_t value)
{
    key(out, name);
    fprintf(out, "\"%016llx\"", (unsigned long long)value);
}

static void put_module(FILE *out, const struct module *module)
{
    open_bracket(out, module->name, '{');
    put_tri(out, "loaded", module->loaded);
    open_bracket(out, "parameters", '{');
    for (size_t i = 0; i < module->count; i++)
        put_text(out, module->parameters[i].name, module->parameters[i].value);
    close_bracket(out, '}');
    close_bracket(out, '}');
}

static void put_l2(FILE *out, const struct l2_result *l2)
{
    static const char *const states[] = { "skipped", "proved", "emulated", "failed", "timeout" };

    open_bracket(out, NULL, '{');
    put_text(out, "mode", l2->mode);
    put_text(out, "state", states[l2->state]);
    put_text(out, "error", l2->error);
    if (l2->state != L2_SKIPPED) {
        put_number(out, "rounds", l2->rounds);
        put_hex(out, "nonce", l2->nonce);
        put_hex(out, "answer", l2->answer);
        put_hex(out, "expected", l2->expected);
        put_number(out, "port_accesses", l2->io_seen);
        put_number(out, "device_writes", l2->mmio_seen);
        put_number(out, "nanoseconds", (int64_t)l2->nanoseconds);
        open_bracket(out, "kvm_counted", '{');
        put_number(out, "exits", l2->counted.exits);
        put_number(out, "io_exits", l2->counted.io_exits);
        put_number(out, "mmio_exits", l2->counted.mmio_exits);
        put_number(out, "halt_exits", l2->counted.halt_exits);
        close_bracket(out, '}');
    }
    close_bracket(out, '}');
}

static void put_processor(FILE *out, const struct facts *facts)
{
    open_bracket(out, "cpu", '{');
    put_text(out, "vendor", facts->vendor);
    put_text(out, "model", facts->model);
    put_text(out, "extension", facts->extension);
    put_tri(out, "offered", facts->flag);
    put_tri(out, "used_by_kernel", facts->kernel_flag);
    put_tri(out, "locked_by_firmware", facts->locked);
    close_bracket(out, '}');
    open_bracket(out, "hypervisor", '{');
    put_tri(out, "present", facts->hypervisor);
    put_text(out, "signature", facts->signature);
    put_text(out, "second_signature", facts->second_signature);
    put_text(out, "name", facts->signature[0] ? facts->hypervisor_name : "");
    close_bracket(out, '}');
    open_bracket(out, "machine", '{');
    put_text(out, "vendor", facts->provider);
    put_text(out, "product", facts->product);
    close_bracket(out, '}');
}

static void put_kvm(FILE *out, const struct facts *facts, const struct device *device)
{
    static const char *const states[] = { "usable", "absent", "no-permission", "unusable", "not-tried" };

    open_bracket(out, "features", '{');
    for (size_t i = 0; i < facts->feature_count; i++)
        put_tri(out, facts->features[i].name, facts->features[i].present);
    close_bracket(out, '}');
    put_text(out, "features_source", facts->feature_count ? facts->features[0].source : "");
    open_bracket(out, "modules", '{');
    put_module(out, &facts->kvm);
    put_module(out, &facts->kvm_intel);
    put_module(out, &facts->kvm_amd);
    put_module(out, &facts->kvm_pvm);
    close_bracket(out, '}');
    open_bracket(out, "device", '{');
    put_text(out, "state", states[device->state]);
    put_number(out, "api_version", device->api_version > 0 ? device->api_version : -1);
    put_tri(out, "offers_extension", device->offers_extension);
    put_text(out, "error", device->error);
    close_bracket(out, '}');
}

void print_json(FILE *out, const struct facts *facts, const struct device *device, const struct l2_result *real,
                const struct l2_result *lng, const struct verdict *verdict)
{
    first = true;
    open_bracket(out, NULL, '{');
    put_number(out, "version", SCHEMA_VERSION);
    put_text(out, "program", VERSION);
    put_text(out, "verdict", verdict->word);
    put_number(out, "status", verdict->status);
    put_text(out, "text", verdict->text);
    put_tri(out, "deeper", verdict->deeper);
    put_processor(out, facts);
    put_kvm(out, facts, device);
    open_bracket(out, "l2", '[');
    put_l2(out, real);
    put_l2(out, lng);
    close_bracket(out, ']');
    open_bracket(out, "checks", '[');
    for (size_t i = 0; i < verdict->count; i++) {
        open_bracket(out, NULL, '{');
        put_text(out, "name", verdict->checks[i].name);
        put_text(out, "state", STATES[verdict->checks[i].state]);
        put_text(out, "text", verdict->checks[i].text);
        put_text(out, "next", verdict->checks[i].next);
        close_bracket(out, '}');
    }
    close_bracket(out, ']');
    close_bracket(out, '}');
    putc('\n', out);
}
