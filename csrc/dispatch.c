/* The tiers in order, and the kernel table of each. A slot that a tier leaves NULL is inherited from the next lower
 * tier that this machine can run: a CPU may lack a lower tier (AVX-512 without AVX-VNNI). */
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
    const phi_kernels *own; /* the slots that it implements */
    bool (*available)(void);
    bool automatic; /* may be selected by default */
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
    /* Opt-in: faster prefill, but a token's bits depend on the size of its batch. */
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
#define PHI_TYPE(name, gguf_id, block_elements, block_bytes, activation_format) \
    {#name, gguf_id, block_elements, block_bytes, activation_format},
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

/* Fills the table of tiers[highest], from the lowest tier up. */
static void resolve(int highest, phi_kernels *table) {
    *table = *tiers[0].own; /* scalar implements every slot */
    for (int i = 1; i <= highest; i++) {
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
        for (int f = 0; f < 2; f++) {
            INHERIT(peak[f].run);
            INHERIT(peak[f].macs);
        }
    }
}

phi_status phi_select_kernels(const char *name, const phi_kernels **kernels) {
    static phi_kernels tables[N_TIERS];
    int i = N_TIERS - 1;
    if (name) {
        i = find_tier(name);
        if (i < 0 || !tiers[i].available()) return PHI_TIER_UNAVAILABLE;
    } else {
        while (!tiers[i].automatic || !tiers[i].available()) i--; /* ends at scalar */
    }
    /* Once only, since running models read the table. Callers hold the GIL. */
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
