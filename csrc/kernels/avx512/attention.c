/* Attention of up to eight rows (a row: one query head of one token) over the same half-precision pages.
 * Layout: keys [16 positions side by side][head_dim][16], values [position][head_dim].
 * Idea: a line of keys is converted once for all rows, 16 scores a product; softmax over the kept scores; a piece of a
 * value row is converted once for all rows. Positions that a row does not see weigh exactly 0, so what a row gets does
 * not depend on the others.
 * Bound: one row: reading the pages, 4 bytes a position and dimension; eight: the multiplications. */
#include "avx512.h"

#include <immintrin.h>
#include <math.h>

#ifdef _MSC_VER
#define INLINE static __forceinline
#define UNROLL
#else
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#endif

enum { MAX_ROWS = PHI_ATTENTION_ROWS, PREFETCH_BYTES = 1024 };

typedef struct {
    const float *q[MAX_ROWS];
    float *out[MAX_ROWS];
    float *weights[MAX_ROWS]; /* [last - begin], from position `begin` on */
    int first[MAX_ROWS], last[MAX_ROWS];
    int seen_first, seen_end; /* some row sees seen_first .. seen_end - 1 */
    int begin, end;           /* the whole groups around them */
} tile;

INLINE __m512 load_halves(const uint16_t *h) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)h));
}

static const uint16_t *page_of(const phi_attention *a, int position) {
    return (const uint16_t *)(const void *)(a->pages +
                                            (size_t)a->page_table[position / PHI_PAGE_TOKENS] * a->page_bytes);
}

/* e^x for x <= 0, relative error below 2e-7: x = n ln 2 + r, e^r by its Taylor series; 0 for minus infinity. */
INLINE __m512 exp_negative(__m512 x) {
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 e = _mm512_set1_ps(1.0f / 720.0f);
    e = _mm512_fmadd_ps(e, r, _mm512_set1_ps(1.0f / 120.0f));
    e = _mm512_fmadd_ps(e, r, _mm512_set1_ps(1.0f / 24.0f));
    e = _mm512_fmadd_ps(e, r, _mm512_set1_ps(1.0f / 6.0f));
    e = _mm512_fmadd_ps(e, r, _mm512_set1_ps(0.5f));
    e = _mm512_fmadd_ps(e, r, _mm512_set1_ps(1.0f));
    e = _mm512_fmadd_ps(e, r, _mm512_set1_ps(1.0f));
    const __mmask16 hidden = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-INFINITY), _CMP_EQ_OQ);
    return _mm512_mask_mov_ps(_mm512_scalef_ps(e, n), hidden, _mm512_setzero_ps());
}

/* n_rows is a constant where this is inlined. */
INLINE void score(const phi_attention *a, const tile *t, int n_rows) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512 scale = _mm512_set1_ps(a->scale), hidden = _mm512_set1_ps(-INFINITY);
    for (int p = t->begin; p < t->end; p += PHI_KV_GROUP) {
        const size_t group = (size_t)(p % PHI_PAGE_TOKENS / PHI_KV_GROUP);
        const uint16_t *keys = page_of(a, p) + group * (size_t)a->head_dim * PHI_KV_GROUP;
        __m512 s[MAX_ROWS][2];
        UNROLL for (int r = 0; r < n_rows; r++) s[r][0] = s[r][1] = _mm512_setzero_ps();
        for (int d = 0; d < a->head_dim; d += 2) { /* head_dim is even */
            const uint16_t *k = keys + d * PHI_KV_GROUP;
            _mm_prefetch((const char *)k + PREFETCH_BYTES, _MM_HINT_T0);
            const __m512 k0 = load_halves(k), k1 = load_halves(k + PHI_KV_GROUP);
            UNROLL for (int r = 0; r < n_rows; r++) {
                s[r][0] = _mm512_fmadd_ps(k0, _mm512_set1_ps(t->q[r][d]), s[r][0]);
                s[r][1] = _mm512_fmadd_ps(k1, _mm512_set1_ps(t->q[r][d + 1]), s[r][1]);
            }
        }
        const __m512i position = _mm512_add_epi32(lane, _mm512_set1_epi32(p));
        UNROLL for (int r = 0; r < n_rows; r++) {
            const __mmask16 seen = _mm512_cmpge_epi32_mask(position, _mm512_set1_epi32(t->first[r])) &
                                   _mm512_cmple_epi32_mask(position, _mm512_set1_epi32(t->last[r]));
            const __m512 scores = _mm512_mul_ps(_mm512_add_ps(s[r][0], s[r][1]), scale);
            _mm512_storeu_ps(t->weights[r] + (p - t->begin), _mm512_mask_mov_ps(hidden, seen, scores));
        }
    }
}

/* Scores to weights in place; returns what their sum is to be divided by. */
static float normalise(float *scores, int n) {
    __m512 largest = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
    for (int i = 0; i < n; i += 16) largest = _mm512_max_ps(_mm512_loadu_ps(scores + i), largest);
    const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
    for (int i = 0; i < n; i += 16) {
        const __m512 weight = exp_negative(_mm512_sub_ps(_mm512_loadu_ps(scores + i), top));
        _mm512_storeu_ps(scores + i, weight);
        total = _mm512_add_ps(total, weight);
    }
    return _mm512_reduce_add_ps(total);
}

/* 16 * n_vectors dimensions from first_dim on; the last vector holds only the lanes of `mask`. n_rows and n_vectors are
 * constants where this is inlined. */
INLINE void weigh(const phi_attention *a, const tile *t, int n_rows, int n_vectors, __mmask16 mask, int first_dim,
                  const float *totals) {
    __m512 sum[MAX_ROWS][8];
    UNROLL for (int r = 0; r < n_rows; r++) {
        UNROLL for (int i = 0; i < n_vectors; i++) sum[r][i] = _mm512_setzero_ps();
    }
    for (int p = t->seen_first; p < t->seen_end;) { /* what lies beyond may be no number: no weight makes it harmless */
        const uint16_t *values = page_of(a, p) + (size_t)PHI_PAGE_TOKENS * (size_t)a->head_dim + first_dim;
        const int page_end = (p / PHI_PAGE_TOKENS + 1) * PHI_PAGE_TOKENS,
                  end = page_end < t->seen_end ? page_end : t->seen_end;
        for (; p < end; p++) {
            const uint16_t *row = values + (size_t)(p % PHI_PAGE_TOKENS) * (size_t)a->head_dim;
            __m512 v[8];
            UNROLL for (int i = 0; i < n_vectors; i++) {
                const __mmask16 lanes = i == n_vectors - 1 ? mask : (__mmask16)0xffff;
                v[i] = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, row + 16 * i));
            }
            UNROLL for (int r = 0; r < n_rows; r++) {
                const __m512 weight = _mm512_set1_ps(t->weights[r][p - t->begin]);
                UNROLL for (int i = 0; i < n_vectors; i++) sum[r][i] = _mm512_fmadd_ps(weight, v[i], sum[r][i]);
            }
        }
    }
    UNROLL for (int r = 0; r < n_rows; r++) {
        const __m512 inverse = _mm512_set1_ps(1.0f / totals[r]);
        UNROLL for (int i = 0; i < n_vectors; i++) {
            const __mmask16 lanes = i == n_vectors - 1 ? mask : (__mmask16)0xffff;
            _mm512_mask_storeu_ps(t->out[r] + first_dim + 16 * i, lanes, _mm512_mul_ps(sum[r][i], inverse));
        }
    }
}

INLINE void attend(const phi_attention *a, const tile *t, int n_rows, int n_vectors) {
    float totals[MAX_ROWS];
    score(a, t, n_rows);
    for (int r = 0; r < n_rows; r++) totals[r] = normalise(t->weights[r], t->end - t->begin);
    int d = 0;
    for (; d + 16 * n_vectors <= a->head_dim; d += 16 * n_vectors) weigh(a, t, n_rows, n_vectors, 0xffff, d, totals);
    for (; d < a->head_dim; d += 16) {
        const int left = a->head_dim - d;
        weigh(a, t, n_rows, 1, left < 16 ? (__mmask16)((1u << left) - 1) : (__mmask16)0xffff, d, totals);
    }
}

void phi_attention_avx512(const phi_attention *a) {
    const int n_rows = a->n_tokens * a->n_queries;
    for (int row = 0; row < n_rows;) {
        const int n = n_rows - row >= MAX_ROWS ? MAX_ROWS : n_rows - row >= 4 ? 4 : 1;
        tile t = {.seen_first = a->last};
        for (int r = 0; r < n; r++) {
            const int token = (row + r) / a->n_queries, query = (row + r) % a->n_queries;
            const size_t at = (size_t)token * a->token_stride + (size_t)query * (size_t)a->head_dim;
            t.q[r] = a->q + at;
            t.out[r] = a->out + at;
            t.weights[r] = a->scores + (size_t)r * a->scores_stride;
            t.last[r] = a->last + token;
            t.first[r] = phi_first_seen(t.last[r], a->window);
            if (t.first[r] < t.seen_first) t.seen_first = t.first[r];
            if (t.last[r] >= t.seen_end) t.seen_end = t.last[r] + 1;
        }
        t.begin = t.seen_first / PHI_KV_GROUP * PHI_KV_GROUP;
        t.end = (t.seen_end + PHI_KV_GROUP - 1) / PHI_KV_GROUP * PHI_KV_GROUP;
        if (n == MAX_ROWS)
            attend(a, &t, MAX_ROWS, 2);
        else if (n == 4)
            attend(a, &t, 4, 2);
        else if (a->head_dim % 96 == 0)
            attend(a, &t, 1, 6);
        else
            attend(a, &t, 1, 4);
        row += n;
    }
}
