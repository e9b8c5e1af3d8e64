/* Hides instruction sets from a process, so that engines choose the code for processors that lack them.

       cc -O2 -shared -fPIC -o hide.so hide_instructions.c
       HIDE=avx512 LD_PRELOAD=./hide.so python ...     vnni: VNNI alone; avx512: AVX-512 and VNNI, which leaves AVX2

   Linux can make the cpuid instruction fault (arch_prctl, where /proc/cpuinfo has the flag cpuid_fault). The handler
   runs it and clears the bits that are hidden. Code that reads /proc/cpuinfo instead sees the processor as it is. */
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define ARCH_SET_CPUID 0x1012
#define BIT(number) (1u << (number))

static int is_avx512_hidden;

static long allow_cpuid(unsigned long allowed) { return syscall(SYS_arch_prctl, ARCH_SET_CPUID, allowed); }

static void answer(int number, siginfo_t *information, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    const unsigned char *code = (const unsigned char *)registers[REG_RIP];
    unsigned leaf = registers[REG_RAX], part = registers[REG_RCX], a, b, c, d;
    (void)number, (void)information;
    if (code[0] != 0x0f || code[1] != 0xa2) { /* another fault: let it end the process */
        signal(SIGSEGV, SIG_DFL);
        return;
    }
    allow_cpuid(1);
    __asm__ volatile("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(leaf), "c"(part));
    allow_cpuid(0);
    if (leaf == 7 && part == 0) {
        c &= ~BIT(11); /* AVX512-VNNI */
        if (is_avx512_hidden) {
            b &= ~(BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30) | BIT(31));
            c &= ~(BIT(1) | BIT(6) | BIT(12) | BIT(14));
            d &= ~(BIT(2) | BIT(3) | BIT(8) | BIT(23));
        }
        d &= ~(BIT(22) | BIT(24) | BIT(25)); /* AMX */
    }
    if (leaf == 7 && part == 1) {
        a &= ~BIT(4); /* AVX-VNNI */
        d &= ~(BIT(4) | BIT(5) | BIT(10) | BIT(19)); /* AVX-VNNI of other types, AVX10 */
        if (is_avx512_hidden) a &= ~(BIT(5) | BIT(23));
    }
    registers[REG_RAX] = a, registers[REG_RBX] = b, registers[REG_RCX] = c, registers[REG_RDX] = d;
    registers[REG_RIP] += 2;
}

__attribute__((constructor)) static void hide(void) {
    const char *hidden = getenv("HIDE");
    struct sigaction action;
    if (!hidden) return;
    is_avx512_hidden = !strcmp(hidden, "avx512");
    memset(&action, 0, sizeof action);
    action.sa_sigaction = answer;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGSEGV, &action, NULL);
    if (allow_cpuid(0)) {
        perror("arch_prctl(ARCH_SET_CPUID)");
        exit(3);
    }
}
