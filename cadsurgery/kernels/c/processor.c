/* Query the processor's instruction sets, and share work among cores.
 *
 * Compiled once, for the architecture's baseline, so that it runs on every processor: no other function of the library is
 * called before `processor_features`. -DFINGERPRINT="..." is the hash of the library's source files.
 */
#include "parallel.h"

#include <stddef.h>
#include <stdint.h>

#ifndef FINGERPRINT
#define FINGERPRINT ""
#endif

/* Tells, before the library is loaded, from which source files it was built. */
const char cadsurgery_sources[] = "cadsurgery_sources=" FINGERPRINT;

/* In the order of FEATURES in build.py. */
enum { SSE4, AVX2, AVXVNNI, AVX512, AVX512VNNI, AVX512BF16, NEON, DOTPROD, BF16, AMX };

#if defined(__x86_64__)

typedef struct {
    uint32_t a, b, c, d;
} registers;

static registers cpuid(uint32_t leaf, uint32_t part) {
    registers r;
    __asm__ volatile("cpuid" : "=a"(r.a), "=b"(r.b), "=c"(r.c), "=d"(r.d) : "a"(leaf), "c"(part));
    return r;
}

/* Return the registers that the operating system saves: bits 1 and 2 for 16 and 32 bytes, bits 5 to 7 for 64 bytes. */
static uint32_t saved(void) {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

static int has(uint32_t value, uint32_t bits) { return (value & bits) == bits; }

/* Ask the operating system once for tiles, which take 8 KiB of every thread's state; it may refuse. */
static int are_tiles_granted(void) {
#if defined(__linux__)
    enum { NOT_ASKED, GRANTED, REFUSED };
    static int answer = NOT_ASKED; /* threads that ask at the same time get the same answer */
    if (answer == NOT_ASKED) {
        long result = 158; /* arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) */
        __asm__ volatile("syscall" : "+a"(result) : "D"(0x1023l), "S"(18l) : "rcx", "r11", "memory");
        answer = result == 0 ? GRANTED : REFUSED;
    }
    return answer == GRANTED;
#else
    return 0;
#endif
}

/* Bit i is set if the processor has all features of instruction set i and the operating system saves its registers. */
unsigned long processor_features(void) {
    const uint32_t most = cpuid(0, 0).a, most_extended = cpuid(0x80000000u, 0).a;
    const registers none = {0, 0, 0, 0}, one = cpuid(1, 0);
    const registers seven = most >= 7 ? cpuid(7, 0) : none;
    const registers more = most >= 7 && seven.a >= 1 ? cpuid(7, 1) : none;
    const uint32_t extended = most_extended >= 0x80000001u ? cpuid(0x80000001u, 0).c : 0;
    unsigned long found = 0;
#ifdef EMULATE_TILES /* every form that is compiled beside emulated tiles runs here */
    return 1ul << SSE4 | 1ul << AVX2 | 1ul << AVX512 | 1ul << AVX512VNNI | 1ul << AVX512BF16 | 1ul << AMX;
#endif
    /* SSE3, SSSE3, CMPXCHG16B, SSE4.1, SSE4.2, POPCNT; LAHF */
    if (!has(one.c, 1u << 0 | 1u << 9 | 1u << 13 | 1u << 19 | 1u << 20 | 1u << 23) || !has(extended, 1u)) return found;
    found |= 1ul << SSE4;
    /* FMA, MOVBE, XSAVE by the system, AVX, F16C; BMI1, AVX2, BMI2; LZCNT */
    if (!has(one.c, 1u << 12 | 1u << 22 | 1u << 27 | 1u << 28 | 1u << 29)) return found;
    if (!has(seven.b, 1u << 3 | 1u << 5 | 1u << 8) || !has(extended, 1u << 5) || !has(saved(), 0x06)) return found;
    found |= 1ul << AVX2;
    if (has(more.a, 1u << 4)) found |= 1ul << AVXVNNI;
    /* F, DQ, CD, BW, VL */
    if (!has(seven.b, 1u << 16 | 1u << 17 | 1u << 28 | 1u << 30 | 1u << 31) || !has(saved(), 0xe6)) return found;
    found |= 1ul << AVX512;
    if (!has(seven.c, 1u << 11)) return found;
    found |= 1ul << AVX512VNNI;
    if (has(more.a, 1u << 5)) found |= 1ul << AVX512BF16;
    /* BF16, TILE, INT8; tiles and their configuration are saved. */
    if (has(seven.d, 1u << 22 | 1u << 24 | 1u << 25) && has(saved(), 0x60000) && are_tiles_granted()) found |= 1ul << AMX;
    return found;
}

#elif defined(__aarch64__)

#if defined(__linux__)
unsigned long getauxval(unsigned long type);
#elif defined(__APPLE__)
int sysctlbyname(const char *name, void *to, size_t *size, void *from, size_t length);
static int has(const char *name) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, NULL, 0) == 0 && value;
}
#endif

/* Bit i is set if the processor has instruction set i; NEON belongs to the architecture. */
unsigned long processor_features(void) {
    unsigned long found = 1ul << NEON;
#if defined(__linux__)
    if (getauxval(16) & 1ul << 20) found |= 1ul << DOTPROD; /* AT_HWCAP: ASIMDDP */
    if (getauxval(26) & 1ul << 14) found |= 1ul << BF16;    /* AT_HWCAP2 */
#elif defined(__APPLE__)
    if (has("hw.optional.arm.FEAT_DotProd")) found |= 1ul << DOTPROD;
    if (has("hw.optional.arm.FEAT_BF16")) found |= 1ul << BF16;
#endif
    return found;
}

#else

unsigned long processor_features(void) { return 0; }

#endif

typedef int32_t torch_parallel(int64_t begin, int64_t end, int64_t grain, void (*)(int64_t, int64_t, void *), void *);
typedef void gomp_parallel(void (*)(void *), void *, unsigned threads, unsigned flags);

static torch_parallel *of_torch;
static gomp_parallel *of_openmp;
static __thread share_in_engine *of_engine;

void cadsurgery_share_by(share_in_engine *way) { of_engine = way; }

/* Set the function that shares work: torch's `torch_parallel_for`, else `GOMP_parallel` of the OpenMP runtime that torch has
 * loaded. If both are NULL, the calling thread does all the work. */
void use_threads(void *parallel_for, void *parallel) {
    of_torch = (torch_parallel *)parallel_for;
    of_openmp = (gomp_parallel *)parallel;
}

typedef struct {
    long count, grain, parts, next;
    share_body body;
    void *work;
} shared;

/* Return the number of the next part and mark it as taken (atomic). */
static long take(long *next) {
#if defined(__aarch64__) && !defined(__APPLE__) && !defined(_WIN32)
    /* Compilers would call a function of their runtime library here, which is not linked. */
    long value, more;
    int failed;
    do __asm__ volatile("ldxr %0, [%3]\n\tadd %1, %0, #1\n\tstxr %w2, %1, [%3]"
                        : "=&r"(value), "=&r"(more), "=&r"(failed) : "r"(next) : "memory");
    while (failed);
    return value;
#else
    return __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
#endif
}

static void do_parts(void *context) {
    shared *all = context;
    for (long part = take(&all->next); part < all->parts; part = take(&all->next)) {
        const long begin = part * all->grain, end = begin + all->grain;
        all->body(begin, end < all->count ? end : all->count, all->work);
    }
}

/* A thread takes the next free part, whatever range torch assigns to it. */
static void do_parts_of_torch(int64_t begin, int64_t end, void *context) {
    (void)begin, (void)end;
    do_parts(context);
}

void cadsurgery_share(long count, long grain, share_body body, void *work) {
    if (grain < 1) grain = 1;
    if (of_engine && of_engine(count, grain, body, work)) return;
    shared all = {count, grain, (count + grain - 1) / grain, 0, body, work};
    if (of_engine) ; /* torch's threads would compete with the engine's */
    else if (all.parts > 1 && of_torch) of_torch(0, all.parts, 1, do_parts_of_torch, &all);
    else if (all.parts > 1 && of_openmp) of_openmp(do_parts, &all, 0, 0);
    do_parts(&all); /* the remaining parts: all of them without threads, otherwise none */
}
