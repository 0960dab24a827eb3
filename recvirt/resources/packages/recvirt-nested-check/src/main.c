/* recvirt-nested-check: what nested virtualization this virtual machine has. */
#include <cpuid.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

int main(void)
{
    unsigned a, b, c, d;
    int extension = 0, device, vm = -1;

    if (__get_cpuid(1, &a, &b, &c, &d) && (c & (1u << 5)))
        extension = 1;
    if (__get_cpuid(0x80000001, &a, &b, &c, &d) && (c & (1u << 2)))
        extension = 2;
    device = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (device >= 0 && ioctl(device, KVM_GET_API_VERSION, 0) == KVM_API_VERSION)
        vm = ioctl(device, KVM_CREATE_VM, 0);
    printf("extension: %s\n/dev/kvm: %s\n", extension == 1 ? "vmx" : extension == 2 ? "svm" : "none",
           vm >= 0 ? "makes virtual machines" : device >= 0 ? "useless" : "cannot be opened");
    if (!extension)
        return 10;
    if (device < 0)
        return 11;
    return vm < 0 ? 13 : 0;
}
