/* float32 to bf16 for weights and activations of the AMX-BF16 tier: to nearest, ties to even, denormals to 0. */
#ifndef PHI_AMXBF16_BF16_H
#define PHI_AMXBF16_BF16_H

#include <immintrin.h>
#include <string.h>

/* 32 bf16 values: `low` in the lower 256 bits, `high` in the upper. */
static inline __m512i phi_to_bf16(__m512 low, __m512 high) {
    const __m512bh rounded = _mm512_cvtne2ps_pbh(high, low);
    __m512i words;
    memcpy(&words, &rounded, sizeof words); /* not every compiler casts __m512bh to __m512i */
    return words;
}

#endif
