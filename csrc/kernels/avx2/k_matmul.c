/* Products of Q2_K to Q6_K rows with int8 activations.
 * Layout: row-major blocks of 256 weights (blocks.h); activations with one scale per 32 and one sum per 16.
 * Idea: a block is unpacked once, to unsigned bytes and 16-bit sub-block scales, for up to four tokens. vpmaddubsw adds
 * pairs of products, vpmaddwd multiplies these by the sub-block's scale. Offsets and minima of the weights are
 * subtracted as one float product with the activations' sums.
 * Bound: six instructions for 32 products, or reading the rows. */
#include "avx2.h"
#include "simd.h"

#include "../../blocks.h"

enum { BLOCK = 256, SUB_BLOCKS = BLOCK / 32, MAX_TOKENS = 4 };

typedef struct {
    __m256i q[SUB_BLOCKS];     /* 32 unsigned quants each */
    __m256i scale[SUB_BLOCKS]; /* int16: the scale of each pair of quants */
    __m256 min[2];             /* by sub-blocks of 16: offset or minimum, a factor of the activations' sums */
    float d;                   /* multiplies every scale */
} unpacked;

typedef void (*unpack_fn)(const uint8_t *block, unpacked *u);

/* From 16 scales of 16 weights each. */
PHI_INLINE void spread_scales_16(__m128i scales_i8, unpacked *u) {
    const __m256i scales = _mm256_cvtepi8_epi16(scales_i8);
    int16_t s[16];
    _mm256_storeu_si256((__m256i *)(void *)s, scales);
    for (int j = 0; j < SUB_BLOCKS; j++) {
        u->scale[j] = _mm256_set_m128i(_mm_set1_epi16(s[2 * j + 1]), _mm_set1_epi16(s[2 * j]));
    }
}

/* min = i8 * factor for 16 sub-blocks. */
PHI_INLINE void scale_minima_16(__m128i i8, float factor, unpacked *u) {
    const __m256 factors = _mm256_set1_ps(factor);
    u->min[0] = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(i8)), factors);
    u->min[1] = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(i8, 8))), factors);
}

PHI_INLINE void unpack_q2_k(const uint8_t *block, unpacked *u) {
    const phi_block_q2_k *b = (const phi_block_q2_k *)(const void *)block;
    const __m128i packed = _mm_loadu_si128((const __m128i *)(const void *)b->scales), low4 = _mm_set1_epi8(15);
    const __m256i low2 = _mm256_set1_epi8(3);
    u->d = phi_half(b->d);
    spread_scales_16(_mm_and_si128(packed, low4), u);
    scale_minima_16(_mm_and_si128(_mm_srli_epi16(packed, 4), low4), phi_half(b->dmin), u);
    for (int h = 0; h < 2; h++) {
        const __m256i q = phi_load(b->qs + 32 * h);
        u->q[4 * h] = _mm256_and_si256(q, low2);
        u->q[4 * h + 1] = _mm256_and_si256(_mm256_srli_epi16(q, 2), low2);
        u->q[4 * h + 2] = _mm256_and_si256(_mm256_srli_epi16(q, 4), low2);
        u->q[4 * h + 3] = _mm256_and_si256(_mm256_srli_epi16(q, 6), low2);
    }
}

PHI_INLINE void unpack_q3_k(const uint8_t *block, unpacked *u) {
    const phi_block_q3_k *b = (const phi_block_q3_k *)(const void *)block;
    uint32_t low[2], high;
    memcpy(low, b->scales, sizeof low);
    memcpy(&high, b->scales + 8, sizeof high);
    const uint32_t six_bits[4] = {
        (low[0] & 0x0f0f0f0fu) | (high & 0x03030303u) << 4,
        (low[1] & 0x0f0f0f0fu) | (high >> 2 & 0x03030303u) << 4,
        (low[0] >> 4 & 0x0f0f0f0fu) | (high >> 4 & 0x03030303u) << 4,
        (low[1] >> 4 & 0x0f0f0f0fu) | (high >> 6 & 0x03030303u) << 4,
    };
    const __m128i scales = _mm_sub_epi8(_mm_loadu_si128((const __m128i *)(const void *)six_bits), _mm_set1_epi8(32));
    u->d = phi_half(b->d);
    spread_scales_16(scales, u);
    scale_minima_16(scales, u->d * 4.0f, u);
    const __m256i hmask = phi_load(b->hmask), low2 = _mm256_set1_epi8(3), bit2 = _mm256_set1_epi8(4);
    for (int h = 0; h < 2; h++) {
        __m256i q = phi_load(b->qs + 32 * h), m = h ? _mm256_srli_epi16(hmask, 4) : hmask;
        for (int j = 0; j < 4; j++) {
            const __m256i third = _mm256_and_si256(_mm256_slli_epi16(m, 2), bit2);
            u->q[4 * h + j] = _mm256_or_si256(_mm256_and_si256(q, low2), third);
            q = _mm256_srli_epi16(q, 2);
            m = _mm256_srli_epi16(m, 1);
        }
    }
}

/* The 6-bit scales and minima of Q4_K and Q5_K (see phi_unpack_scales_k4), four at a time. */
PHI_INLINE void unpack_scales_k4(const uint8_t *packed, float dmin, unpacked *u) {
    uint32_t p[3];
    memcpy(p, packed, sizeof p);
    const uint32_t scales[2] = {p[0] & 0x3f3f3f3fu, (p[2] & 0x0f0f0f0fu) | (p[0] >> 6 & 0x03030303u) << 4};
    const uint32_t mins[2] = {p[1] & 0x3f3f3f3fu, (p[2] >> 4 & 0x0f0f0f0fu) | (p[1] >> 6 & 0x03030303u) << 4};
    const __m128i s16 = _mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i *)(const void *)scales));
    int16_t s[8];
    _mm_storeu_si128((__m128i *)(void *)s, s16);
    for (int j = 0; j < SUB_BLOCKS; j++) u->scale[j] = _mm256_set1_epi16(s[j]);
    const __m256i m32 = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)mins));
    const __m256 m = _mm256_mul_ps(_mm256_cvtepi32_ps(m32), _mm256_set1_ps(dmin));
    u->min[0] = _mm256_permutevar8x32_ps(m, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3));
    u->min[1] = _mm256_permutevar8x32_ps(m, _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7));
}

PHI_INLINE void unpack_q4_k(const uint8_t *block, unpacked *u) {
    const phi_block_q4_k *b = (const phi_block_q4_k *)(const void *)block;
    const __m256i low4 = _mm256_set1_epi8(15);
    u->d = phi_half(b->d);
    unpack_scales_k4(b->scales, phi_half(b->dmin), u);
    for (int p = 0; p < 4; p++) {
        const __m256i q = phi_load(b->qs + 32 * p);
        u->q[2 * p] = _mm256_and_si256(q, low4);
        u->q[2 * p + 1] = _mm256_and_si256(_mm256_srli_epi16(q, 4), low4);
    }
}

PHI_INLINE void unpack_q5_k(const uint8_t *block, unpacked *u) {
    const phi_block_q5_k *b = (const phi_block_q5_k *)(const void *)block;
    const __m256i low4 = _mm256_set1_epi8(15), bit4 = _mm256_set1_epi8(16);
    u->d = phi_half(b->d);
    unpack_scales_k4(b->scales, phi_half(b->dmin), u);
    __m256i high = phi_load(b->qh);
    for (int p = 0; p < 4; p++) {
        const __m256i q = phi_load(b->qs + 32 * p);
        const __m256i first = _mm256_and_si256(_mm256_slli_epi16(high, 4), bit4);
        const __m256i second = _mm256_and_si256(_mm256_slli_epi16(high, 3), bit4);
        u->q[2 * p] = _mm256_or_si256(_mm256_and_si256(q, low4), first);
        u->q[2 * p + 1] = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(q, 4), low4), second);
        high = _mm256_srli_epi16(high, 2);
    }
}

PHI_INLINE void unpack_q6_k(const uint8_t *block, unpacked *u) {
    const phi_block_q6_k *b = (const phi_block_q6_k *)(const void *)block;
    const __m256i low4 = _mm256_set1_epi8(15), bits45 = _mm256_set1_epi8(48);
    const __m128i scales = _mm_loadu_si128((const __m128i *)(const void *)b->scales);
    u->d = phi_half(b->d);
    spread_scales_16(scales, u);
    scale_minima_16(scales, u->d * 32.0f, u);
    for (int h = 0; h < 2; h++) {
        const __m256i first = phi_load(b->ql + 64 * h), second = phi_load(b->ql + 64 * h + 32),
                      high = phi_load(b->qh + 32 * h);
        u->q[4 * h] =
            _mm256_or_si256(_mm256_and_si256(first, low4), _mm256_and_si256(_mm256_slli_epi16(high, 4), bits45));
        u->q[4 * h + 1] =
            _mm256_or_si256(_mm256_and_si256(second, low4), _mm256_and_si256(_mm256_slli_epi16(high, 2), bits45));
        u->q[4 * h + 2] =
            _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(first, 4), low4), _mm256_and_si256(high, bits45));
        u->q[4 * h + 3] = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(second, 4), low4),
                                          _mm256_and_si256(_mm256_srli_epi16(high, 2), bits45));
    }
}

/* Dot products of one row with n_tokens <= MAX_TOKENS tokens; n_tokens is a compile-time constant once inlined. */
PHI_INLINE void dot(unpack_fn unpack, size_t block_bytes, const phi_matmul *m, const uint8_t *row, int token,
                    int n_tokens, float *out) {
    const size_t n = (size_t)m->n_cols, first = (size_t)(m->first_token + token) * n;
    const phi_q8 q8 = phi_q8_at(m->x->q8, first);
    const int8_t *x = q8.quants;
    const float *scales = q8.scales, *sums = q8.sums;
    __m256 total[MAX_TOKENS], min_total[MAX_TOKENS];
    for (int t = 0; t < n_tokens; t++) total[t] = min_total[t] = _mm256_setzero_ps();
    for (size_t i = 0; i < n; i += BLOCK) {
        unpacked u;
        unpack(row + i / BLOCK * block_bytes, &u);
        for (int t = 0; t < n_tokens; t++) {
            const int8_t *xt = x + (size_t)t * n + i;
            const float *st = scales + ((size_t)t * n + i) / PHI_Q8_BLOCK,
                        *sum = sums + ((size_t)t * n + i) / PHI_SUM_BLOCK;
            __m256 block = _mm256_setzero_ps();
            for (int j = 0; j < SUB_BLOCKS; j++) {
                const __m256i pairs = _mm256_maddubs_epi16(u.q[j], phi_load(xt + 32 * j));
                const __m256i scaled = _mm256_madd_epi16(pairs, u.scale[j]);
                block = _mm256_fmadd_ps(_mm256_cvtepi32_ps(scaled), _mm256_broadcast_ss(st + j), block);
            }
            total[t] = _mm256_fmadd_ps(block, _mm256_set1_ps(u.d), total[t]);
            min_total[t] = _mm256_fmadd_ps(u.min[0], _mm256_loadu_ps(sum), min_total[t]);
            min_total[t] = _mm256_fmadd_ps(u.min[1], _mm256_loadu_ps(sum + 8), min_total[t]);
        }
    }
    for (int t = 0; t < n_tokens; t++)
        out[(size_t)(token + t) * m->out_stride] = phi_hsum(_mm256_sub_ps(total[t], min_total[t]));
}

PHI_INLINE void matmul(unpack_fn unpack, size_t block_bytes, const phi_matmul *m) {
    for (int r = 0; r < m->n_rows; r++) {
        const uint8_t *row = m->rows + (size_t)r * m->row_bytes;
        int t = 0;
        for (; t + 4 <= m->n_tokens; t += 4) dot(unpack, block_bytes, m, row, t, 4, m->out + r);
        for (; t < m->n_tokens; t++) dot(unpack, block_bytes, m, row, t, 1, m->out + r);
    }
}

void phi_matmul_q2_k_avx2(const phi_matmul *m) { matmul(unpack_q2_k, sizeof(phi_block_q2_k), m); }
void phi_matmul_q3_k_avx2(const phi_matmul *m) { matmul(unpack_q3_k, sizeof(phi_block_q3_k), m); }
void phi_matmul_q4_k_avx2(const phi_matmul *m) { matmul(unpack_q4_k, sizeof(phi_block_q4_k), m); }
void phi_matmul_q5_k_avx2(const phi_matmul *m) { matmul(unpack_q5_k, sizeof(phi_block_q5_k), m); }
void phi_matmul_q6_k_avx2(const phi_matmul *m) { matmul(unpack_q6_k, sizeof(phi_block_q6_k), m); }
