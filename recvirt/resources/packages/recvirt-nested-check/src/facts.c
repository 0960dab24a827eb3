/* What can be known without starting a guest: processor, hypervisor, KVM's modules, features. */
#include <string.h>

#include "nested.h"

static const char *const KVM_PARAMETERS[] = { "nx_huge_pages", "ignore_msrs", "halt_poll_ns", "tdp_mmu" };
static const char *const INTEL_PARAMETERS[] = { "nested", "ept", "vpid", "unrestricted_guest", "enable_shadow_vmcs",
                                                "enable_apicv", "enlightened_vmcs", "flexpriority", "pml",
                                                "preemption_timer", "eptad" };
static const char *const AMD_PARAMETERS[] = { "nested", "npt", "avic", "vgif", "vls", "vnmi", "nrips", "lbrv" };

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

static void fill_module(struct module *module, const char *name, const char *const *parameters, size_t count)
{
    char path[160];

    module->name = name;
    snprintf(path, sizeof path, "/sys/module/%s", name);
    module->loaded = exists(path);
    module->count = count;
    for (size_t i = 0; i < count; i++) {
        module->parameters[i].name = parameters[i];
        snprintf(path, sizeof path, "/sys/module/%s/parameters/%s", name, parameters[i]);
        if (read_text(path, module->parameters[i].value, sizeof module->parameters[i].value) < 0)
            module->parameters[i].value[0] = '\0';
    }
}

static void four_letters(char *at, uint32_t value)
{
    memcpy(at, &value, 4);
}

static void clean(char *text)
{
    char *to = text;

    for (const char *from = text; *from; from++)
        if ((unsigned char)*from >= ' ' && (unsigned char)*from < 127 && !(*from == ' ' && (to == text || to[-1] == ' ')))
            *to++ = *from;
    while (to > text && to[-1] == ' ')
        to--;
    *to = '\0';
}

static void read_processor(struct facts *facts)
{
    static char flags[8192];
    struct registers r;

    if (cpuid(0, 0, &r)) {
        four_letters(facts->vendor, r.ebx);
        four_letters(facts->vendor + 4, r.edx);
        four_letters(facts->vendor + 8, r.ecx);
    } else if (!cpuinfo_line("vendor_id", facts->vendor, sizeof facts->vendor)) {
        strcpy(facts->vendor, "unknown");
    }
    clean(facts->vendor);
    cpuinfo_line("model name", facts->model, sizeof facts->model);
    clean(facts->model);
    if (cpuid(1, 0, &r)) {
        facts->flag = (r.ecx >> 5) & 1;
        facts->hypervisor = (r.ecx >> 31) & 1;
        facts->extension = facts->flag == YES ? "vmx" : NULL;
    }
    if (facts->flag != YES && cpuid(0x80000001, 0, &r) && (r.ecx >> 2) & 1) {
        facts->flag = YES;
        facts->extension = "svm";
    }
    if (!cpuinfo_line("flags", flags, sizeof flags))
        return;
    if (facts->flag == UNKNOWN) { /* no CPUID dump below --root: the kernel's word is all there is */
        facts->extension = has_word(flags, "vmx") ? "vmx" : has_word(flags, "svm") ? "svm" : NULL;
        facts->flag = facts->extension != NULL;
        facts->hypervisor = has_word(flags, "hypervisor");
    }
    facts->kernel_flag = facts->extension && has_word(flags, facts->extension);
}

static void read_lock(struct facts *facts)
{
    uint64_t value;

    if (facts->extension && !strcmp(facts->extension, "vmx") && read_msr(0x3a, &value)) /* IA32_FEATURE_CONTROL */
        facts->locked = (value & 1) && !(value & 4);
    if (facts->extension && !strcmp(facts->extension, "svm") && read_msr(0xc0010114, &value)) /* VM_CR.SVMDIS */
        facts->locked = (value >> 4) & 1;
}

static bool signature_at(uint32_t leaf, char *text)
{
    struct registers r;

    if (!cpuid(leaf, 0, &r) || !r.ebx)
        return false;
    four_letters(text, r.ebx);
    four_letters(text + 4, r.ecx);
    four_letters(text + 8, r.edx);
    text[12] = '\0';
    clean(text);
    return text[0] != '\0';
}

static void read_hypervisor(struct facts *facts)
{
    /* KVM with Hyper-V's interface for Windows guests shows that first and its own at the next 0x100. */
    if (facts->hypervisor != NO && signature_at(0x40000000, facts->signature) &&
        signature_at(0x40000100, facts->second_signature) && !strcmp(facts->second_signature, facts->signature))
        facts->second_signature[0] = '\0';
    facts->hypervisor_name = hypervisor_name(facts->second_signature[0] ? facts->second_signature : facts->signature);
    read_text("/sys/class/dmi/id/sys_vendor", facts->provider, sizeof facts->provider);
    read_text("/sys/class/dmi/id/product_name", facts->product, sizeof facts->product);
    clean(facts->provider);
    clean(facts->product);
}

static void add_feature(struct facts *facts, const char *name, tri present, const char *source)
{
    struct feature *feature = &facts->features[facts->feature_count++];

    feature->name = name;
    feature->present = present;
    feature->source = present == UNKNOWN ? "" : source;
}

/* Intel tells these by MSR (SDM volume 3, appendix A.3); the kernel repeats them as "vmx flags" in /proc/cpuinfo. */
static void intel_features(struct facts *facts)
{
    static const struct {
        const char *name;
        unsigned bits[2]; /* of the secondary controls' allowed settings; both are needed */
        const char *words[2];
    } table[] = {
        { "ept", { 1, 1 }, { "ept", "ept" } },
        { "vpid", { 5, 5 }, { "vpid", "vpid" } },
        { "unrestricted_guest", { 7, 7 }, { "unrestricted_guest", "unrestricted_guest" } },
        { "shadow_vmcs", { 14, 14 }, { "shadow_vmcs", "shadow_vmcs" } },
        { "apicv", { 8, 9 }, { "vapic_reg", "vid" } },
    };
    static char words[2048];
    uint64_t primary, secondary = 0;
    bool by_msr = read_msr(0x482, &primary); /* IA32_VMX_PROCBASED_CTLS: bit 63 allows the secondary controls */
    bool by_cpuinfo = cpuinfo_line("vmx flags", words, sizeof words);
    struct registers r;
    tri offered = UNKNOWN;

    if (by_msr && (primary >> 63))
        by_msr = read_msr(0x48b, &secondary); /* IA32_VMX_PROCBASED_CTLS2 */
    for (size_t i = 0; i < COUNT(table); i++) {
        tri present = UNKNOWN;

        if (by_msr)
            present = ((secondary >> (32 + table[i].bits[0])) & 1) && ((secondary >> (32 + table[i].bits[1])) & 1);
        else if (by_cpuinfo)
            present = has_word(words, table[i].words[0]) && has_word(words, table[i].words[1]);
        add_feature(facts, table[i].name, present, by_msr ? "msr" : "cpuinfo");
    }
    /* Hyper-V's own VMCS: recommended in leaf 0x40000004, versions in 0x4000000a (Hypervisor TLFS, feature discovery). */
    if (!strcmp(facts->signature, "Microsoft Hv"))
        offered = cpuid(0x40000004, 0, &r) && ((r.eax >> 14) & 1) && cpuid(0x4000000a, 0, &r) && (r.eax & 0xffff);
    else if (facts->signature[0] || facts->hypervisor == NO)
        offered = NO;
    add_feature(facts, "enlightened_vmcs", offered, "cpuid");
}

/* AMD tells these by CPUID 0x8000000a, edx (APM volume 2, appendix B); /proc/cpuinfo has them among the flags. */
static void amd_features(struct facts *facts)
{
    static const struct {
        const char *name;
        unsigned bit;
        const char *word;
    } table[] = {
        { "npt", 0, "npt" },
        { "nrip_save", 3, "nrip_save" },
        { "flush_by_asid", 6, "flushbyasid" },
        { "decode_assists", 7, "decodeassists" },
        { "avic", 13, "avic" },
        { "vls", 15, "v_vmsave_vmload" },
        { "vgif", 16, "vgif" },
        { "x2avic", 18, "x2avic" },
        { "vnmi", 25, "vnmi" },
    };
    static char flags[8192];
    struct registers r;
    bool by_cpuid = cpuid(0x8000000a, 0, &r);
    bool by_cpuinfo = cpuinfo_line("flags", flags, sizeof flags);

    for (size_t i = 0; i < COUNT(table); i++) {
        tri present = UNKNOWN;

        if (by_cpuid)
            present = (r.edx >> table[i].bit) & 1;
        else if (by_cpuinfo)
            present = has_word(flags, table[i].word);
        add_feature(facts, table[i].name, present, by_cpuid ? "cpuid" : "cpuinfo");
    }
}

void gather_facts(struct facts *facts)
{
    memset(facts, 0, sizeof *facts);
    facts->flag = facts->kernel_flag = facts->locked = facts->hypervisor = UNKNOWN;
    read_processor(facts);
    read_lock(facts);
    read_hypervisor(facts);
    fill_module(&facts->kvm, "kvm", KVM_PARAMETERS, COUNT(KVM_PARAMETERS));
    fill_module(&facts->kvm_intel, "kvm_intel", INTEL_PARAMETERS, COUNT(INTEL_PARAMETERS));
    fill_module(&facts->kvm_amd, "kvm_amd", AMD_PARAMETERS, COUNT(AMD_PARAMETERS));
    fill_module(&facts->kvm_pvm, "kvm_pvm", NULL, 0);
    if (facts->extension && !strcmp(facts->extension, "vmx"))
        intel_features(facts);
    else if (facts->extension)
        amd_features(facts);
}

const struct module *vendor_module(const struct facts *facts)
{
    if (facts->extension)
        return !strcmp(facts->extension, "vmx") ? &facts->kvm_intel : &facts->kvm_amd;
    if (facts->kvm_intel.loaded)
        return &facts->kvm_intel;
    return facts->kvm_amd.loaded ? &facts->kvm_amd : NULL;
}

const char *parameter_value(const struct module *module, const char *name)
{
    for (size_t i = 0; module && i < module->count; i++)
        if (!strcmp(module->parameters[i].name, name))
            return module->parameters[i].value;
    return "";
}

tri feature_present(const struct facts *facts, const char *name)
{
    for (size_t i = 0; i < facts->feature_count; i++)
        if (!strcmp(facts->features[i].name, name))
            return facts->features[i].present;
    return UNKNOWN;
}
