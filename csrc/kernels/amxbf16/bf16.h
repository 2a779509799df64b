/* Floats to bf16, as weights and activations of the AMX-BF16 tier are rounded: to nearest, ties to even; what is
 * smaller than the smallest normal float becomes 0. */
#ifndef PHI_AMXBF16_BF16_H
#define PHI_AMXBF16_BF16_H

#include <immintrin.h>
#include <string.h>

/* The first 16 floats in the lower half, the others in the upper one. */
static inline __m512i phi_to_bf16(__m512 first, __m512 others) {
    const __m512bh rounded = _mm512_cvtne2ps_pbh(others, first);
    __m512i words;
    memcpy(&words, &rounded, sizeof words); /* not every compiler casts between the two */
    return words;
}

#endif
