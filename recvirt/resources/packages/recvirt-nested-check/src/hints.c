/* Who the hypervisor and the provider are, and how each gives VMX or SVM to a virtual machine. */
#include <string.h>

#include "nested.h"

static const struct {
    const char *signature, *name;
} HYPERVISORS[] = {
    { "KVMKVMKVM", "KVM" },           { "Linux KVM Hv", "KVM" },          { "Microsoft Hv", "Hyper-V" },
    { "VMwareVMware", "VMware" },     { "XenVMMXenVMM", "Xen" },          { "TCGTCGTCGTCG", "QEMU without acceleration" },
    { "VBoxVBoxVBox", "VirtualBox" }, { "bhyve bhyve", "bhyve" },         { "lrpepyh vr", "Parallels" },
    { "ACRNACRNACRN", "ACRN" },       { "QNXQVMBSQG", "QNX" },
};

const char *hypervisor_name(const char *signature)
{
    for (size_t i = 0; i < sizeof HYPERVISORS / sizeof HYPERVISORS[0]; i++)
        if (!strcmp(signature, HYPERVISORS[i].signature))
            return HYPERVISORS[i].name;
    return signature[0] ? "unknown" : "none seen";
}

/* provider is how the DMI vendor begins; signature is a whole one. NULL fits all. First match wins. */
static const struct {
    const char *provider, *signature, *hint;
} HINTS[] = {
    { "Google", NULL,
      "Google Cloud: the VM needs enableNestedVirtualization (gcloud compute instances create ... "
      "--enable-nested-virtualization) and an Intel machine type; E2, AMD and Arm types can't" },
    { "Amazon EC2", NULL,
      "AWS: stop the instance, change it to a type that offers it (C8i, M8i, R8i) and start it with "
      "--cpu-options NestedVirtualization=enabled, or take a .metal type" },
    { "Xen", NULL,
      "Xen: the guest must be HVM with nestedhvm=1 in its configuration (and hap=1); AWS's older Xen types can't" },
    { "Microsoft Corporation", NULL,
      "Azure: choose a size whose description says nested virtualization (most v3 and later of the D and E series); "
      "own Hyper-V: switch the VM off, then Set-VMProcessor -VMName NAME -ExposeVirtualizationExtensions $true" },
    { "VMware", NULL,
      "VMware: switch the VM off and turn on \"Expose hardware assisted virtualization to the guest OS\" "
      "(vhv.enable = \"TRUE\" in the .vmx file)" },
    { "innotek", NULL, "VirtualBox: switch the VM off, then VBoxManage modifyvm NAME --nested-hw-virt on" },
    { "OpenStack", NULL,
      "OpenStack: the compute host needs kvm_intel or kvm_amd with nested=1, and nova cpu_mode=host-passthrough "
      "(or a model with vmx or svm): ask the operator for a flavor that has it" },
    { NULL, "TCGTCGTCGTCG",
      "QEMU without acceleration: it emulates SVM (never VMX): use QEMU 10 or newer with -cpu max; better, -accel kvm" },
    { NULL, "Microsoft Hv",
      "Hyper-V: switch the VM off, then Set-VMProcessor -VMName NAME -ExposeVirtualizationExtensions $true" },
    { NULL, "XenVMMXenVMM", "Xen: the guest must be HVM with nestedhvm=1 in its configuration (and hap=1)" },
    { NULL, "VMwareVMware",
      "VMware: switch the VM off and set vhv.enable = \"TRUE\" in its .vmx file" },
    { NULL, "VBoxVBoxVBox", "VirtualBox: switch the VM off, then VBoxManage modifyvm NAME --nested-hw-virt on" },
    { NULL, "KVMKVMKVM",
      "KVM: on the host below, load kvm_intel or kvm_amd with nested=1 and give the VM the flag "
      "(QEMU: -cpu host; libvirt: <cpu mode='host-passthrough'/>); at a provider, ask for a plan with nested virtualization" },
};

static bool begins(const char *text, const char *with)
{
    return !strncmp(text, with, strlen(with));
}

void enable_hint(const struct facts *facts, char *buffer, size_t size)
{
    const char *signature = facts->second_signature[0] ? facts->second_signature : facts->signature;

    if (facts->hypervisor == NO) {
        snprintf(buffer, size, "this machine is not virtual: turn on VT-x or AMD-V (SVM) in its firmware's setup");
        return;
    }
    for (size_t i = 0; i < sizeof HINTS / sizeof HINTS[0]; i++) {
        if (HINTS[i].provider && !begins(facts->provider, HINTS[i].provider))
            continue;
        if (HINTS[i].signature && strcmp(signature, HINTS[i].signature))
            continue;
        snprintf(buffer, size, "%s", HINTS[i].hint);
        return;
    }
    snprintf(buffer, size, "turn nested virtualization on at the provider, so that the VM's processor has VMX or SVM");
}
