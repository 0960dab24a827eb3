/* What the two files that talk to KVM share. */
#ifndef RECVIRT_KVM_H
#define RECVIRT_KVM_H

#include <linux/kvm.h>

#include "nested.h"

#define DEVICE "/dev/kvm"
#define MAX_CPUID 256

#ifdef RECVIRT_TEST_HOOKS
/* Tests only: a guest that hangs, lies or dies, or a KVM that counts nothing. */
#define HOOK(name) (getenv("RECVIRT_TEST_L2") && !strcmp(getenv("RECVIRT_TEST_L2"), name))
#else
#define HOOK(name) false
#endif

/* How a child under a clock ended. */
enum ended { ENDED, KILLED_BY_CLOCK, DIED };

enum ended guarded(void (*work)(void *), void *shared, unsigned seconds);
void *shared_copy(const void *from, size_t size); /* memory that a child's writes are seen in */
struct kvm_cpuid2 *supported_cpuid(int device);   /* room for one more entry; NULL on failure */
struct counters read_counters(int fd);            /* of a virtual processor's statistics; -1 where unknown */

#endif
