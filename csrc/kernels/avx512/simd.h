/* AVX-512 helpers: lane masks, half precision, exp. */
#ifndef PHI_AVX512_SIMD_H
#define PHI_AVX512_SIMD_H

#include <immintrin.h>
#include <stdint.h>

#include "../generic/unroll.h"

/* Mask of the first n lanes; all 16 if n >= 16. */
PHI_INLINE __mmask16 phi_lanes(size_t n) { return (__mmask16)(n < 16 ? (1u << n) - 1 : 0xffffu); }

PHI_INLINE __m256i phi_to_half(__m512 x) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

/* e^x with relative error below 2e-7: x = n ln 2 + r with |r| <= ln(2) / 2, e^r by its Taylor series up to r^6.
 * x <= -110 gives 0, x >= 110 infinity; NaN stays NaN. */
PHI_INLINE __m512 phi_exp(__m512 x) {
    x = _mm512_min_ps(_mm512_set1_ps(110.0f), _mm512_max_ps(_mm512_set1_ps(-110.0f), x));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)),
                                          _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x); /* ln 2 in two parts, the first exact */
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 e = _mm512_set1_ps(1.0f / 720.0f);
    e = _mm512_fmadd_ps(e, r, _mm512_set1_ps(1.0f / 120.0f));
    e = _mm512_fmadd_ps(e, r, _mm512_set1_ps(1.0f / 24.0f));
    e = _mm512_fmadd_ps(e, r, _mm512_set1_ps(1.0f / 6.0f));
    e = _mm512_fmadd_ps(e, r, _mm512_set1_ps(0.5f));
    e = _mm512_fmadd_ps(e, r, _mm512_set1_ps(1.0f));
    e = _mm512_fmadd_ps(e, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(e, n);
}

#endif
