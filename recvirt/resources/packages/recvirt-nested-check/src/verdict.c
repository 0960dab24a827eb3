/* From facts to a judgement: one line a matter, the next step for whatever is missing, and an exit status. */
#include <stdarg.h>
#include <string.h>

#include "nested.h"

static struct check *add(struct verdict *verdict, const char *name, enum check_state state, const char *format, ...)
    __attribute__((format(printf, 4, 5)));

static struct check *add(struct verdict *verdict, const char *name, enum check_state state, const char *format, ...)
{
    struct check *check = &verdict->checks[verdict->count++];
    va_list arguments;

    check->name = name;
    check->state = state;
    check->next[0] = '\0';
    va_start(arguments, format);
    vsnprintf(check->text, sizeof check->text, format, arguments);
    va_end(arguments);
    return check;
}

static void next(struct check *check, const char *text)
{
    snprintf(check->next, sizeof check->next, "%s", text);
}

static const char *upper(const struct facts *facts)
{
    return facts->extension && !strcmp(facts->extension, "vmx") ? "VMX" : "SVM";
}

static void judge_cpu(const struct facts *facts, struct verdict *verdict)
{
    struct check *check;

    if (facts->flag != YES) {
        check = add(verdict, "cpu", CHECK_FAIL, "%s%s%s: neither VMX nor SVM", facts->vendor, facts->model[0] ? ", " : "",
                    facts->model);
        enable_hint(facts, check->next, sizeof check->next);
    } else if (facts->locked == YES) {
        check = add(verdict, "cpu", CHECK_FAIL, "%s, %s: %s is there, but the firmware has switched it off", facts->vendor,
                    facts->model, upper(facts));
        next(check, "turn virtualization on in the firmware's setup (of the VM, or of the machine), then switch off and on");
    } else if (facts->kernel_flag == NO) {
        check = add(verdict, "cpu", CHECK_WARN, "%s, %s: %s is there, but this kernel does not use it", facts->vendor,
                    facts->model, upper(facts));
        next(check, "look for \"VMX\" or \"SVM\" in the kernel's log (dmesg); a firmware lock and clearcpuid= do this");
    } else {
        add(verdict, "cpu", CHECK_OK, "%s, %s: %s", facts->vendor, facts->model, upper(facts));
    }
}

static void judge_hypervisor(const struct facts *facts, struct verdict *verdict)
{
    char machine[sizeof facts->provider + sizeof facts->product + 16];

    snprintf(machine, sizeof machine, "machine: %s%s%s", facts->provider[0] ? facts->provider : "unknown",
             facts->product[0] ? ", " : "", facts->product);
    if (facts->hypervisor == NO)
        add(verdict, "hypervisor", CHECK_INFO, "none: this is not a virtual machine; %s", machine);
    else
        add(verdict, "hypervisor", CHECK_INFO, "%s (%s%s%s); %s", facts->hypervisor_name,
            facts->signature[0] ? facts->signature : "no signature", facts->second_signature[0] ? ", " : "",
            facts->second_signature, machine);
}

static void judge_module(const struct facts *facts, struct verdict *verdict)
{
    const struct module *module = vendor_module(facts);
    struct check *check;

    if (!module) {
        if (facts->kvm_pvm.loaded)
            add(verdict, "module", CHECK_WARN, "kvm_pvm is loaded: it runs only guests whose kernel was made for it");
        else
            add(verdict, "module", CHECK_SKIP, "there is no KVM module for a processor without VMX and SVM");
        return;
    }
    if (module->loaded && facts->kvm.loaded) {
        add(verdict, "module", CHECK_OK, "%s is loaded", module->name);
        return;
    }
    check = add(verdict, "module", facts->flag == YES ? CHECK_FAIL : CHECK_SKIP, "%s is not loaded", module->name);
    if (facts->flag == YES)
        snprintf(check->next, sizeof check->next, "modprobe %s; if that fails, dmesg says why", module->name);
}

static void judge_paging(const struct facts *facts, struct verdict *verdict)
{
    const struct module *module = vendor_module(facts);
    const char *name = module == &facts->kvm_intel ? "ept" : "npt";
    const char *huge = parameter_value(&facts->kvm, "nx_huge_pages");
    struct check *check;

    if (!module || !module->loaded)
        return;
    if (parse_flag(parameter_value(module, name)) == YES) {
        add(verdict, "paging", CHECK_OK, "%s is on: L2s have page tables in hardware", name);
    } else if (feature_present(facts, name) == NO) {
        check = add(verdict, "paging", CHECK_WARN, "%s is not offered to this VM: L2s run, slowly", name);
        snprintf(check->next, sizeof check->next, "the hypervisor below must show %s to this VM (QEMU: -cpu host; libvirt: "
                 "host-passthrough)", name);
    } else {
        check = add(verdict, "paging", CHECK_WARN, "%s is off: L2s run, slowly", name);
        snprintf(check->next, sizeof check->next, "load %s with %s=1 (a file in /etc/modprobe.d, or %s.%s=1 at boot)",
                 module->name, name, module->name, name);
    }
    if (parse_flag(huge) == YES)
        add(verdict, "nx_huge_pages", CHECK_INFO, "on: a mitigation (iTLB multihit) that splits L2s' huge pages");
}

static void judge_acceleration(const struct facts *facts, struct verdict *verdict)
{
    struct check *check = NULL;
    size_t used = 0;

    for (size_t i = 0; i < facts->feature_count; i++) {
        const struct feature *feature = &facts->features[i];
        const char *word = feature->present == YES ? "yes" : feature->present == NO ? "no" : "unknown";
        int length;

        if (!check)
            check = add(verdict, "features", CHECK_INFO, "%s", "");
        length = snprintf(check->text + used, sizeof check->text - used, "%s%s %s", used ? ", " : "", feature->name, word);
        if (length < 0 || (size_t)length >= sizeof check->text - used)
            break;
        used += (size_t)length;
    }
}

static void judge_enlightened(const struct facts *facts, struct verdict *verdict)
{
    const char *value = parameter_value(&facts->kvm_intel, "enlightened_vmcs");
    struct check *check;

    if (feature_present(facts, "enlightened_vmcs") != YES)
        return;
    if (parse_flag(value) == YES) {
        add(verdict, "enlightened_vmcs", CHECK_OK, "in use: Hyper-V's fast way to a nested guest");
        return;
    }
    check = add(verdict, "enlightened_vmcs", CHECK_WARN, "offered by Hyper-V, but not in use: L2 exits are slow");
    next(check, "the kernel needs HYPERV built in, and kvm_intel.enlightened_vmcs=1");
}

static void judge_device(const struct device *device, const struct facts *facts, struct verdict *verdict)
{
    struct check *check;

    switch (device->state) {
    case DEVICE_USABLE:
        add(verdict, "device", CHECK_OK, "/dev/kvm opens and makes virtual machines (API %d)", device->api_version);
        break;
    case DEVICE_ABSENT:
        check = add(verdict, "device", CHECK_FAIL, "there is no /dev/kvm (%s)", device->error);
        if (facts->flag == YES)
            snprintf(check->next, sizeof check->next, "modprobe %s; if that fails, dmesg says why", vendor_module(facts)->name);
        break;
    case DEVICE_NO_PERMISSION:
        check = add(verdict, "device", CHECK_FAIL, "/dev/kvm may not be opened (%s)", device->error);
        next(check, "run this as root, or join the group: adduser NAME kvm, then log in again");
        break;
    case DEVICE_UNUSABLE:
        check = add(verdict, "device", CHECK_FAIL, "/dev/kvm is of no use (%s)", device->error);
        next(check, "see dmesg; another hypervisor (VirtualBox, VMware) may hold the processor");
        break;
    case DEVICE_NOT_TRIED:
        add(verdict, "device", CHECK_SKIP, "/dev/kvm was not opened");
        break;
    }
}

static void judge_l2(const struct l2_result *l2, const struct facts *facts, struct verdict *verdict)
{
    const char *name = l2->mode[0] == 'l' ? "l2-long" : "l2-real";
    const char *what = l2->mode[0] == 'l' ? "a 64-bit guest with its own page tables" : "a real-mode guest";
    uint64_t exits = (uint64_t)l2->rounds + l2->io_seen + l2->mmio_seen;
    struct check *check;

    switch (l2->state) {
    case L2_SKIPPED:
        add(verdict, name, CHECK_SKIP, "%s was not started", what);
        break;
    case L2_PROVED:
        check = add(verdict, name, CHECK_OK, "%s answered its nonce after %u CPUID exits and %u port accesses, %llu ns an exit", what,
                    l2->rounds, l2->io_seen, (unsigned long long)(l2->nanoseconds / (exits ? exits : 1)));
        if (l2->counted.exits >= 0) {
            size_t used = strlen(check->text);

            snprintf(check->text + used, sizeof check->text - used, "; KVM counted %lld exits", (long long)l2->counted.exits);
        }
        break;
    case L2_EMULATED:
        if (l2->mode[0] == 'r' && vendor_module(facts) == &facts->kvm_intel &&
            parse_flag(parameter_value(&facts->kvm_intel, "unrestricted_guest")) != YES) {
            add(verdict, name, CHECK_INFO, "%s: %s (KVM interprets real mode: unrestricted_guest is off)", what, l2->error);
            break;
        }
        check = add(verdict, name, CHECK_FAIL, "%s: %s", what, l2->error);
        next(check, "KVM interpreted the guest, no processor ran it: a real guest would hang; treat /dev/kvm as absent");
        break;
    case L2_FAILED:
    case L2_TIMEOUT:
        check = add(verdict, name, CHECK_FAIL, "%s failed: %s", what, l2->error);
        if (facts->flag == YES)
            next(check, "see dmesg for lines of kvm; the hypervisor below must support nested guests of this processor");
        else
            next(check, "this /dev/kvm can't run guests; programs that use it will fail or hang: treat it as absent");
        break;
    }
}

static void judge_deeper(const struct facts *facts, const struct device *device, struct verdict *verdict)
{
    const struct module *module = vendor_module(facts);
    tri parameter = parse_flag(parameter_value(module, "nested"));
    struct check *check;

    verdict->deeper = parameter == NO || device->offers_extension == NO ? NO
                      : device->offers_extension == YES                ? YES
                                                                       : parameter;
    if (!module || !module->loaded)
        verdict->deeper = facts->flag == YES ? UNKNOWN : NO;
    if (facts->flag != YES && device->offers_extension != YES)
        return;
    if (verdict->deeper == YES) {
        add(verdict, "deeper", CHECK_OK, "L2s can be hypervisors too (nested=%s)", parameter == YES ? "Y" : "unknown");
    } else if (verdict->deeper == NO && module) {
        check = add(verdict, "deeper", CHECK_FAIL, "L2s can't be hypervisors (nested=%s, KVM %s)",
                    parameter == YES ? "Y" : parameter == NO ? "N" : "unknown",
                    device->offers_extension == NO ? "does not offer the flag" : "was not asked");
        if (parameter == YES)
            snprintf(check->next, sizeof check->next, "see dmesg: %s was loaded with nested, but switched it off", module->name);
        else
            snprintf(check->next, sizeof check->next,
                     "load %s with nested=1: put \"options %s nested=1\" into a file in /etc/modprobe.d and reload it, or "
                     "boot with %s.nested=1", module->name, module->name, module->name);
    }
}

static void conclude(struct verdict *verdict, int status, const char *word, const char *text)
{
    verdict->status = status;
    verdict->word = word;
    snprintf(verdict->text, sizeof verdict->text, "%s", text);
}

static void decide(const struct facts *facts, const struct device *device, const struct l2_result *real,
                   const struct l2_result *lng, struct verdict *verdict)
{
    /* Real mode may be interpreted (Intel without unrestricted guests); the 64-bit guest may not. */
    bool proved = lng->state == L2_PROVED && (real->state == L2_PROVED || real->state == L2_EMULATED);
    bool skipped = lng->state == L2_SKIPPED;

    if (proved && verdict->deeper == NO)
        conclude(verdict, EXIT_NOT_DEEPER, "not-deeper", "L2s run here, but can't be hypervisors themselves");
    else if (proved)
        conclude(verdict, EXIT_WORKS, "works", "nested virtualization works: an L2 ran and proved itself");
    else if (facts->flag != YES || facts->locked == YES)
        conclude(verdict, EXIT_NO_CPU, "no-cpu-support", "the processor of this machine can't run virtual machines");
    else if (device->state == DEVICE_ABSENT)
        conclude(verdict, EXIT_NO_DEVICE, "no-device", "KVM is not there");
    else if (device->state == DEVICE_NO_PERMISSION)
        conclude(verdict, EXIT_NO_PERMISSION, "no-permission", "KVM may not be used by this user");
    else if (!skipped || device->state == DEVICE_UNUSABLE)
        conclude(verdict, EXIT_L2_FAILED, "l2-failed", "KVM is there, but no L2 proved itself");
    else if (verdict->deeper == NO)
        conclude(verdict, EXIT_NOT_DEEPER, "not-deeper", "L2s of this machine can't be hypervisors themselves");
    else
        conclude(verdict, EXIT_WORKS, "not-proved", "nothing is missing, but no L2 was started to prove it");
}

void judge(const struct facts *facts, const struct device *device, const struct l2_result *real,
           const struct l2_result *lng, struct verdict *verdict)
{
    memset(verdict, 0, sizeof *verdict);
    judge_cpu(facts, verdict);
    judge_hypervisor(facts, verdict);
    judge_module(facts, verdict);
    judge_paging(facts, verdict);
    judge_acceleration(facts, verdict);
    judge_enlightened(facts, verdict);
    judge_device(device, facts, verdict);
    judge_l2(real, facts, verdict);
    judge_l2(lng, facts, verdict);
    judge_deeper(facts, device, verdict);
    decide(facts, device, real, lng, verdict);
}
