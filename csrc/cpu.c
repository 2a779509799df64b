#define _DEFAULT_SOURCE /* syscall */
/* x86: CPUID leaves 1, 7.0 and 7.1 (Intel SDM volume 2A), and XCR0, the register state that the operating system saves.
 * ARM: the operating system's own interfaces. */
#include "cpu.h"

#include <stdint.h>
#include <stdio.h>

#include "phi.h"

#if defined(__x86_64__) || defined(_M_X64)
#define PHI_X86 1
#ifdef _MSC_VER
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#if defined(__aarch64__) || defined(_M_ARM64)
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(_WIN32)
#include <windows.h>
#endif
#endif

#ifdef PHI_X86
typedef struct {
    uint32_t eax, ebx, ecx, edx;
} cpuid_result;

static cpuid_result cpuid(uint32_t leaf, uint32_t subleaf) {
    cpuid_result r = {0, 0, 0, 0};
#ifdef _MSC_VER
    int regs[4];
    __cpuidex(regs, 0, 0);
    if ((uint32_t)regs[0] < leaf) return r;
    __cpuidex(regs, (int)leaf, (int)subleaf);
    r = (cpuid_result){(uint32_t)regs[0], (uint32_t)regs[1], (uint32_t)regs[2], (uint32_t)regs[3]};
#else
    __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
#endif
    return r;
}

static uint64_t read_xcr0(void) {
#ifdef _MSC_VER
    return _xgetbv(0);
#else
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
#endif
}

static bool bit(uint32_t word, int index) { return word >> index & 1u; }

static void detect(phi_cpu *cpu) {
    const cpuid_result leaf1 = cpuid(1, 0), leaf7 = cpuid(7, 0), leaf7_1 = cpuid(7, 1);
    if (!bit(leaf1.ecx, 27)) return; /* no OSXSAVE: XCR0 cannot be read, and only SSE registers are saved */
    const uint64_t xcr0 = read_xcr0();
    const bool ymm = (xcr0 & 0x6) == 0x6, zmm = (xcr0 & 0xe6) == 0xe6, tiles = (xcr0 & 0x60000) == 0x60000;
    cpu->f16c = ymm && bit(leaf1.ecx, 29);
    cpu->fma = ymm && bit(leaf1.ecx, 12);
    cpu->avx2 = ymm && bit(leaf7.ebx, 5);
    cpu->avxvnni = ymm && bit(leaf7_1.eax, 4);
    cpu->avx512f = zmm && bit(leaf7.ebx, 16);
    cpu->avx512dq = zmm && bit(leaf7.ebx, 17);
    cpu->avx512bw = zmm && bit(leaf7.ebx, 30);
    cpu->avx512vl = zmm && bit(leaf7.ebx, 31);
    cpu->avx512vbmi = zmm && bit(leaf7.ecx, 1);
    cpu->avx512vnni = zmm && bit(leaf7.ecx, 11);
    cpu->avx512bf16 = zmm && bit(leaf7_1.eax, 5);
    cpu->amx_bf16 = tiles && bit(leaf7.edx, 22);
    cpu->amx_tile = tiles && bit(leaf7.edx, 24);
    cpu->amx_int8 = tiles && bit(leaf7.edx, 25);
}
#elif defined(__aarch64__) || defined(_M_ARM64)
#if defined(__linux__)
/* Linux, Documentation/arch/arm64/elf_hwcaps.rst */
static void detect(phi_cpu *cpu) {
    const unsigned long caps = getauxval(AT_HWCAP), caps2 = getauxval(AT_HWCAP2);
    cpu->neon = true; /* part of the base architecture */
    cpu->fp16 = caps >> 10 & 1u;
    cpu->dotprod = caps >> 20 & 1u;
    cpu->i8mm = caps2 >> 13 & 1u;
}
#elif defined(__APPLE__)
/* Apple, "Determining instruction set characteristics" */
static bool has(const char *feature) {
    int value = 0;
    size_t n_bytes = sizeof value;
    return sysctlbyname(feature, &value, &n_bytes, NULL, 0) == 0 && value != 0;
}
static void detect(phi_cpu *cpu) {
    cpu->neon = true;
    cpu->fp16 = has("hw.optional.arm.FEAT_FP16");
    cpu->dotprod = has("hw.optional.arm.FEAT_DotProd");
    cpu->i8mm = has("hw.optional.arm.FEAT_I8MM");
}
#elif defined(_WIN32)
/* Constants of winnt.h that older SDKs lack: PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE,
 * PF_ARM_V82_I8MM_INSTRUCTIONS_AVAILABLE, PF_ARM_V82_FP16_INSTRUCTIONS_AVAILABLE. Older systems return false. */
static void detect(phi_cpu *cpu) {
    enum { DOTPROD = 43, I8MM = 66, FP16 = 67 };
    cpu->neon = true;
    cpu->dotprod = IsProcessorFeaturePresent(DOTPROD);
    cpu->i8mm = IsProcessorFeaturePresent(I8MM);
    cpu->fp16 = IsProcessorFeaturePresent(FP16);
}
#else
static void detect(phi_cpu *cpu) { cpu->neon = true; }
#endif
#else
static void detect(phi_cpu *cpu) { (void)cpu; }
#endif

const phi_cpu *phi_cpu_detect(void) {
    static phi_cpu cpu;
    static bool detected;
    if (!detected) {
        detect(&cpu);
        detected = true;
    }
    return &cpu;
}

bool phi_cpu_request_tiles(void) {
#if defined(PHI_X86) && defined(__linux__) && defined(SYS_arch_prctl)
    /* ARCH_REQ_XCOMP_PERM for XTILEDATA (Linux, Documentation/arch/x86/xstate.rst). The permission covers all threads,
     * including running ones, and forked children. It is refused by kernels before 5.16, in some sandboxes, and if a
     * signal stack is too small for the tiles. */
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    static bool requested, granted;
    if (!requested) {
        granted = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
        requested = true;
    }
    return granted;
#else
    return true; /* other systems need no request: XCR0 is enough */
#endif
}

const char *phi_cpu_features(void) {
    static char names[256];
    const phi_cpu *c = phi_cpu_detect();
    const struct {
        bool has;
        const char *name;
    } features[] = {
        {c->avx2, "avx2"},
        {c->fma, "fma"},
        {c->f16c, "f16c"},
        {c->avxvnni, "avxvnni"},
        {c->avx512f, "avx512f"},
        {c->avx512bw, "avx512bw"},
        {c->avx512vl, "avx512vl"},
        {c->avx512dq, "avx512dq"},
        {c->avx512vnni, "avx512vnni"},
        {c->avx512vbmi, "avx512vbmi"},
        {c->avx512bf16, "avx512bf16"},
        {c->amx_tile, "amx_tile"},
        {c->amx_int8, "amx_int8"},
        {c->amx_bf16, "amx_bf16"},
        {c->neon, "neon"},
        {c->dotprod, "dotprod"},
        {c->i8mm, "i8mm"},
        {c->fp16, "fp16"},
    };
    size_t used = 0;
    names[0] = '\0';
    for (size_t i = 0; i < sizeof features / sizeof features[0]; i++) {
        if (!features[i].has) continue;
        used += (size_t)snprintf(names + used, sizeof names - used, "%s%s", used ? "," : "", features[i].name);
    }
    return names;
}
