/* Products of Q4_0 to Q8_0 rows with int8 activations.
 * Layout: row-major blocks of 32 weights (blocks.h); activations with one scale per 32 and one sum per 16.
 * Idea: a block is unpacked once for up to four tokens. vpmaddubsw needs one unsigned factor: the sign of signed
 * weights is moved to the activations. Minima are added as products with the activations' sums.
 * Bound: ten instructions for 32 products, or reading the rows. */
#include "avx2.h"
#include "simd.h"

#include "../../blocks.h"

enum { BLOCK = 32, MAX_TOKENS = 4 };

typedef struct {
    __m256i q;
    float d, m; /* w = d * q + m */
} unpacked;

typedef void (*unpack_fn)(const uint8_t *block, unpacked *u);

PHI_INLINE __m256i nibbles(const uint8_t *qs) {
    const __m128i packed = _mm_loadu_si128((const __m128i *)(const void *)qs);
    return _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(packed, 4), packed), _mm256_set1_epi8(15));
}

/* Byte i is 16 where bit i of the four bytes is set, else 0. */
PHI_INLINE __m256i fifth_bits(const uint8_t *qh) {
    int32_t bits;
    memcpy(&bits, qh, sizeof bits);
    const __m256i byte_of = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i bit_of = _mm256_set1_epi64x((long long)0x8040201008040201ULL);
    const __m256i spread = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(bits), byte_of), bit_of);
    return _mm256_and_si256(_mm256_cmpeq_epi8(spread, bit_of), _mm256_set1_epi8(16));
}

PHI_INLINE void unpack_q4_0(const uint8_t *block, unpacked *u) {
    const phi_block_q4_0 *b = (const phi_block_q4_0 *)(const void *)block;
    *u = (unpacked){_mm256_sub_epi8(nibbles(b->qs), _mm256_set1_epi8(8)), phi_half(b->d), 0.0f};
}

PHI_INLINE void unpack_q4_1(const uint8_t *block, unpacked *u) {
    const phi_block_q4_1 *b = (const phi_block_q4_1 *)(const void *)block;
    *u = (unpacked){nibbles(b->qs), phi_half(b->d), phi_half(b->m)};
}

PHI_INLINE void unpack_q5_0(const uint8_t *block, unpacked *u) {
    const phi_block_q5_0 *b = (const phi_block_q5_0 *)(const void *)block;
    const __m256i q = _mm256_or_si256(nibbles(b->qs), fifth_bits(b->qh));
    *u = (unpacked){_mm256_sub_epi8(q, _mm256_set1_epi8(16)), phi_half(b->d), 0.0f};
}

PHI_INLINE void unpack_q5_1(const uint8_t *block, unpacked *u) {
    const phi_block_q5_1 *b = (const phi_block_q5_1 *)(const void *)block;
    *u = (unpacked){_mm256_or_si256(nibbles(b->qs), fifth_bits(b->qh)), phi_half(b->d), phi_half(b->m)};
}

PHI_INLINE void unpack_q8_0(const uint8_t *block, unpacked *u) {
    const phi_block_q8_0 *b = (const phi_block_q8_0 *)(const void *)block;
    *u = (unpacked){phi_load(b->qs), phi_half(b->d), 0.0f};
}

/* Dot products of one row with n_tokens <= MAX_TOKENS tokens. has_min: q is unsigned and w = d * q + m, else q is
 * signed and w = d * q. has_min and n_tokens are compile-time constants once inlined. */
PHI_INLINE void dot(unpack_fn unpack, size_t block_bytes, int has_min, const phi_matmul *m, const uint8_t *row,
                    int token, int n_tokens, float *out) {
    const size_t n = (size_t)m->n_cols, first = (size_t)(m->first_token + token) * n;
    const phi_q8 q8 = phi_q8_at(m->x->q8, first);
    const int8_t *x = q8.quants;
    const float *scales = q8.scales, *sums = q8.sums;
    const __m256i ones = _mm256_set1_epi16(1);
    __m256 total[MAX_TOKENS];
    float minima[MAX_TOKENS];
    for (int t = 0; t < n_tokens; t++) {
        total[t] = _mm256_setzero_ps();
        minima[t] = 0.0f;
    }
    for (size_t i = 0; i < n; i += BLOCK) {
        unpacked u;
        unpack(row + i / BLOCK * block_bytes, &u);
        /* abs(-128) overflows int8 to the byte 128, which is correct as the unsigned factor of vpmaddubsw; its pairs
         * stay within 2 * 128 * 127 < 2^15. */
        const __m256i magnitude = has_min ? u.q : _mm256_abs_epi8(u.q);
        for (int t = 0; t < n_tokens; t++) {
            const size_t at = (size_t)t * n + i;
            const __m256i xt = phi_load(x + at);
            const __m256i pairs = _mm256_maddubs_epi16(magnitude, has_min ? xt : _mm256_sign_epi8(xt, u.q));
            const __m256 products = _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, ones));
            total[t] = _mm256_fmadd_ps(products, _mm256_set1_ps(u.d * scales[at / PHI_Q8_BLOCK]), total[t]);
            if (has_min) {
                const float *sum = sums + at / PHI_SUM_BLOCK;
                minima[t] += u.m * (sum[0] + sum[1]);
            }
        }
    }
    for (int t = 0; t < n_tokens; t++) out[(size_t)(token + t) * m->out_stride] = phi_hsum(total[t]) + minima[t];
}

PHI_INLINE void matmul(unpack_fn unpack, size_t block_bytes, int has_min, const phi_matmul *m) {
    for (int r = 0; r < m->n_rows; r++) {
        const uint8_t *row = m->rows + (size_t)r * m->row_bytes;
        int t = 0;
        for (; t + 4 <= m->n_tokens; t += 4) dot(unpack, block_bytes, has_min, m, row, t, 4, m->out + r);
        for (; t < m->n_tokens; t++) dot(unpack, block_bytes, has_min, m, row, t, 1, m->out + r);
    }
}

void phi_matmul_q4_0_avx2(const phi_matmul *m) { matmul(unpack_q4_0, sizeof(phi_block_q4_0), 0, m); }
void phi_matmul_q4_1_avx2(const phi_matmul *m) { matmul(unpack_q4_1, sizeof(phi_block_q4_1), 1, m); }
void phi_matmul_q5_0_avx2(const phi_matmul *m) { matmul(unpack_q5_0, sizeof(phi_block_q5_0), 0, m); }
void phi_matmul_q5_1_avx2(const phi_matmul *m) { matmul(unpack_q5_1, sizeof(phi_block_q5_1), 1, m); }
void phi_matmul_q8_0_avx2(const phi_matmul *m) { matmul(unpack_q8_0, sizeof(phi_block_q8_0), 0, m); }
