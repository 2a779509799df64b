/* The tiers in order, and the table that each resolves to: a slot that a tier leaves NULL comes from the next tier
 * below that this machine runs, for a CPU may have a tier and lack one below it (AVX-512 without AVX-VNNI). */
#include "dispatch.h"

#include <string.h>

#include "cpu.h"

static bool scalar_available(void) { return true; }
#ifdef PHI_HAVE_AVX2
static bool avx2_available(void) {
    const phi_cpu *c = phi_cpu_detect();
    return c->avx2 && c->fma && c->f16c;
}
#ifdef PHI_HAVE_AVXVNNI
static bool avxvnni_available(void) {
    const phi_cpu *c = phi_cpu_detect();
#ifdef PHI_AVXVNNI_BY_AVX512
    return avx2_available() && c->avx512vl && c->avx512vnni;
#else
    return avx2_available() && c->avxvnni;
#endif
}
#endif
static bool avx512_available(void) {
    const phi_cpu *c = phi_cpu_detect();
    return avx2_available() && c->avx512f && c->avx512bw && c->avx512vl && c->avx512dq && c->avx512vnni;
}
#endif
#ifdef PHI_HAVE_AMX
static bool amx_available(void) {
#ifdef PHI_EMULATE_AMX
    return avx512_available();
#else
    const phi_cpu *c = phi_cpu_detect();
    return avx512_available() && c->amx_tile && c->amx_int8 && phi_cpu_request_tiles();
#endif
}
static bool amxbf16_available(void) {
    const phi_cpu *c = phi_cpu_detect();
#ifdef PHI_EMULATE_AMX
    return avx512_available() && c->avx512bf16;
#else
    return avx512_available() && c->avx512bf16 && c->amx_tile && c->amx_bf16 && phi_cpu_request_tiles();
#endif
}
#endif
#ifdef PHI_HAVE_NEON
static bool neon_available(void) { return phi_cpu_detect()->neon; }
static bool dotprod_available(void) { return neon_available() && phi_cpu_detect()->dotprod; }
static bool i8mm_available(void) { return dotprod_available() && phi_cpu_detect()->i8mm; }
#endif

typedef struct {
    const phi_kernels *own;
    bool (*available)(void);
    bool automatic; /* chosen when no tier is named */
} tier;

static const tier tiers[] = {
    {&phi_kernels_scalar, scalar_available, true},
#ifdef PHI_HAVE_AVX2
    {&phi_kernels_avx2, avx2_available, true},
#ifdef PHI_HAVE_AVXVNNI
    {&phi_kernels_avxvnni, avxvnni_available, true},
#endif
    {&phi_kernels_avx512, avx512_available, true},
#endif
#ifdef PHI_HAVE_AMX
    /* Only on request: faster for many tokens, whose results then depend on how many there are. */
    {&phi_kernels_amx, amx_available, false},
    {&phi_kernels_amxbf16, amxbf16_available, false},
#endif
#ifdef PHI_HAVE_NEON
    {&phi_kernels_neon, neon_available, true},
    {&phi_kernels_dotprod, dotprod_available, true},
    {&phi_kernels_i8mm, i8mm_available, true},
#endif
};
enum { N_TIERS = sizeof tiers / sizeof tiers[0] };

const phi_type_traits phi_types[PHI_N_TYPES] = {
#define PHI_TYPE(name, gguf_id, block_elements, block_bytes, activation) \
    {#name, gguf_id, block_elements, block_bytes, activation},
#include "tensor_types.def"
#undef PHI_TYPE
};

const char *const *phi_tier_names(void) {
    static const char *names[N_TIERS + 1];
    for (int i = 0; i < N_TIERS; i++) names[i] = tiers[i].own->name;
    return names;
}

static int find_tier(const char *name) {
    for (int i = 0; i < N_TIERS; i++) {
        if (strcmp(tiers[i].own->name, name) == 0) return i;
    }
    return -1;
}

bool phi_tier_available(const char *name) {
    const int i = find_tier(name);
    return i >= 0 && tiers[i].available();
}

#define INHERIT(slot) \
    if (own->slot) table->slot = own->slot

/* Distances that measured best on each CPU (docs/performance.md). Zen 4's hardware prefetchers follow the stream of a
 * single token, and prefetching every line costs a quarter of its decode rate; Zen 5's do not. Intel's stop at every 4
 * KiB page, so weights are prefetched into both levels. ARM was not measured. */
phi_prefetch phi_prefetch_for(const phi_cpu *cpu) {
    if (cpu->amd_family >= 0x1a) return (phi_prefetch){.l2_bytes = 16384, .decode_l2_bytes = 16384};
    if (cpu->amd_family) return (phi_prefetch){.l2_bytes = 16384};
    return (phi_prefetch){.l1_bytes = 2048, .l2_bytes = 4096, .decode_l2_bytes = 4096};
}

static void resolve(int last, phi_kernels *table) {
    *table = *tiers[0].own; /* complete */
    table->prefetch = phi_prefetch_for(phi_cpu_detect());
    for (int i = 1; i <= last; i++) {
        const phi_kernels *own = tiers[i].own;
        if (!tiers[i].available()) continue;
        table->name = own->name;
        INHERIT(max_exact_batch);
        for (int t = 0; t < PHI_N_TYPES; t++) {
            INHERIT(dequantize[t]);
            INHERIT(matmul[t]);
            INHERIT(pack[t]);
            INHERIT(matmul_packed[t]);
            INHERIT(takes_tiled[t]);
        }
        INHERIT(quantize_q8);
        INHERIT(quantize_tiled);
        INHERIT(rms_norm);
        INHERIT(layer_norm);
        INHERIT(rope[PHI_ROPE_NEOX]);
        INHERIT(rope[PHI_ROPE_INTERLEAVED]);
        INHERIT(silu_mul);
        INHERIT(gelu);
        INHERIT(add);
        for (int t = 0; t < PHI_N_KV_TYPES; t++) {
            INHERIT(store_kv[t]);
            INHERIT(attention[t]);
        }
    }
}

phi_status phi_select_kernels(const char *name, const phi_kernels **kernels) {
    static phi_kernels tables[N_TIERS];
    int i = N_TIERS - 1;
    if (name) {
        i = find_tier(name);
        if (i < 0 || !tiers[i].available()) return PHI_NO_SUCH_TIER;
    } else {
        while (!tiers[i].automatic || !tiers[i].available()) i--; /* scalar always is */
    }
    /* Once: a model that is running reads its table. Callers hold the interpreter's lock. */
    if (!tables[i].name) resolve(i, &tables[i]);
    *kernels = &tables[i];
    return PHI_OK;
}

const char *phi_matmul_tier(const char *name, phi_type type) {
    for (int i = find_tier(name); i >= 0; i--) {
        if (!tiers[i].available()) continue;
        if (tiers[i].own->matmul[type] || tiers[i].own->matmul_packed[type]) return tiers[i].own->name;
    }
    return NULL;
}

const phi_kernels *phi_own_kernels(const char *name) {
    const int i = find_tier(name);
    return i < 0 ? NULL : tiers[i].own;
}
