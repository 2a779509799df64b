/* Products of F32, F16 and BF16 rows with float activations.
 * Idea: convert eight weights once, use them for up to four tokens. Bound: reading the rows. */
#include "avx2.h"
#include "simd.h"

#include "../../half.h"

enum { MAX_TOKENS = 4 };

typedef __m256 (*load_fn)(const uint8_t *row, size_t i);
typedef float (*load_one_fn)(const uint8_t *row, size_t i);

PHI_INLINE __m256 load_f32(const uint8_t *row, size_t i) {
    return _mm256_loadu_ps((const float *)(const void *)(row + 4 * i));
}
PHI_INLINE __m256 load_f16(const uint8_t *row, size_t i) {
    return phi_load_half((const uint16_t *)(const void *)(row + 2 * i));
}
PHI_INLINE __m256 load_bf16(const uint8_t *row, size_t i) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)(row + 2 * i)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
PHI_INLINE float load_one_f32(const uint8_t *row, size_t i) {
    float f;
    memcpy(&f, row + 4 * i, sizeof f);
    return f;
}
PHI_INLINE uint16_t load_one_16(const uint8_t *row, size_t i) {
    uint16_t bits;
    memcpy(&bits, row + 2 * i, sizeof bits);
    return bits;
}
PHI_INLINE float load_one_f16(const uint8_t *row, size_t i) { return phi_half(load_one_16(row, i)); }
PHI_INLINE float load_one_bf16(const uint8_t *row, size_t i) { return phi_bf16_to_float(load_one_16(row, i)); }

/* One row and n_tokens (a constant where this is inlined) tokens from `token` on. */
PHI_INLINE void dot(load_fn load, load_one_fn load_one, const phi_matmul *m, const uint8_t *row, int token,
                    int n_tokens, float *out) {
    const size_t n = (size_t)m->n_cols, n16 = n / 16 * 16;
    const float *x = m->x->f32 + (size_t)(m->first_token + token) * n;
    __m256 sum[MAX_TOKENS][2];
    for (int t = 0; t < n_tokens; t++) sum[t][0] = sum[t][1] = _mm256_setzero_ps();
    for (size_t i = 0; i < n16; i += 16) {
        const __m256 a = load(row, i), b = load(row, i + 8);
        for (int t = 0; t < n_tokens; t++) {
            sum[t][0] = _mm256_fmadd_ps(a, _mm256_loadu_ps(x + (size_t)t * n + i), sum[t][0]);
            sum[t][1] = _mm256_fmadd_ps(b, _mm256_loadu_ps(x + (size_t)t * n + i + 8), sum[t][1]);
        }
    }
    for (int t = 0; t < n_tokens; t++) {
        float total = phi_hsum(_mm256_add_ps(sum[t][0], sum[t][1]));
        for (size_t i = n16; i < n; i++) total += load_one(row, i) * x[(size_t)t * n + i];
        out[(size_t)(token + t) * m->out_stride] = total;
    }
}

PHI_INLINE void matmul(load_fn load, load_one_fn load_one, const phi_matmul *m) {
    for (int r = 0; r < m->n_rows; r++) {
        const uint8_t *row = m->rows + (size_t)r * m->row_bytes;
        int t = 0;
        for (; t + 4 <= m->n_tokens; t += 4) dot(load, load_one, m, row, t, 4, m->out + r);
        for (; t < m->n_tokens; t++) dot(load, load_one, m, row, t, 1, m->out + r);
    }
}

void phi_matmul_f32_avx2(const phi_matmul *m) { matmul(load_f32, load_one_f32, m); }
void phi_matmul_f16_avx2(const phi_matmul *m) { matmul(load_f16, load_one_f16, m); }
void phi_matmul_bf16_avx2(const phi_matmul *m) { matmul(load_bf16, load_one_bf16, m); }
