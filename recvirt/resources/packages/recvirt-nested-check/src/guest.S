/*
 * The two tiny L2s: bytes that l2.c copies into a guest's memory. Each takes a nonce and mixes it, a CPUID exit a
 * round, with what the answers to CPUID hold: numbers that l2.c chose and only L1's KVM can hand to the guest.
 * On entry esi/rsi is the number of rounds, edi the CPUID leaf. Every 16th round the state goes out through a port.
 */
#define PORT_NONCE 0x5c0
#define PORT_STATE 0x5c4
#define PORT_ANSWER 0x5c8

    .section .rodata
    .globl guest_real, guest_real_end, guest_long, guest_long_end

    .code16
guest_real:
    movw $PORT_NONCE, %dx
    inl %dx, %eax
    movl %eax, %ebp
1:  movl %edi, %eax
    xorl %ecx, %ecx
    cpuid
    addl %ebx, %ebp
    roll $7, %ebp
    xorl %edx, %ebp
    xorl %esi, %ebp
    testl $15, %esi
    jnz 2f
    movl %ebp, %eax
    movw $PORT_STATE, %dx
    outl %eax, %dx
2:  decl %esi
    jnz 1b
    movl %ebp, %eax
    movw $PORT_ANSWER, %dx
    outl %eax, %dx
3:  hlt
    jmp 3b
guest_real_end:

/* r8: the nonce's page through an address that only the guest's own page tables know; r9: a device's address. */
    .code64
guest_long:
    movq (%r8), %rbp
1:  movl %edi, %eax
    xorl %ecx, %ecx
    cpuid
    shlq $32, %rbx
    orq %rdx, %rbx
    addq %rbx, %rbp
    rolq $13, %rbp
    xorq %rsi, %rbp
    testl $15, %esi
    jnz 2f
    movl %ebp, %eax
    movw $PORT_STATE, %dx
    outl %eax, %dx
2:  decq %rsi
    jnz 1b
    movq %rbp, 8(%r8)
    movq %rbp, (%r9)
    movq %rbp, %rax
    movw $PORT_ANSWER, %dx
    outl %eax, %dx
    shrq $32, %rax
    outl %eax, %dx
3:  hlt
    jmp 3b
guest_long_end:

    .section .note.GNU-stack, "", @progbits
