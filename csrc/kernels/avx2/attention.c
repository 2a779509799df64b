/* One token's attention over half-precision pages.
 * Layout: keys [16 positions side by side][head_dim][16], values [position][head_dim].
 * Idea: 16 scores at once with the query broadcast, softmax over the kept scores, then weighted rows of values.
 * Bound: reading the pages; 4 bytes a position and dimension. */
#include <math.h>

#include "avx2.h"
#include "simd.h"

static const uint16_t *page_of(const phi_attention *a, int position) {
    return (const uint16_t *)(const void *)(a->pages +
                                            (size_t)a->page_table[position / PHI_PAGE_TOKENS] * a->page_bytes);
}

/* Scores of the 16 positions from group_start on. */
static void score_group(const float *q, int head_dim, const uint16_t *keys, float scale, float *scores) {
    __m256 s[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    for (int d = 0; d < head_dim; d += 2) { /* head_dim is even */
        const uint16_t *k = keys + (size_t)d * PHI_KV_GROUP;
        const __m256 q0 = _mm256_broadcast_ss(q + d), q1 = _mm256_broadcast_ss(q + d + 1);
        s[0] = _mm256_fmadd_ps(q0, phi_load_half(k), s[0]);
        s[1] = _mm256_fmadd_ps(q0, phi_load_half(k + 8), s[1]);
        s[2] = _mm256_fmadd_ps(q1, phi_load_half(k + 16), s[2]);
        s[3] = _mm256_fmadd_ps(q1, phi_load_half(k + 24), s[3]);
    }
    _mm256_storeu_ps(scores, _mm256_mul_ps(_mm256_add_ps(s[0], s[2]), _mm256_set1_ps(scale)));
    _mm256_storeu_ps(scores + 8, _mm256_mul_ps(_mm256_add_ps(s[1], s[3]), _mm256_set1_ps(scale)));
}

/* Scores to weights e^(s - max) in place; returns their sum. n is a multiple of 8. */
static float exponentiate(float *scores, size_t n) {
    __m256 largest = _mm256_set1_ps(-INFINITY);
    for (size_t i = 0; i < n; i += 8) largest = _mm256_max_ps(_mm256_loadu_ps(scores + i), largest);
    const __m256 top = _mm256_set1_ps(phi_hmax(largest));
    __m256 total = _mm256_setzero_ps();
    for (size_t i = 0; i < n; i += 8) {
        const __m256 weight = phi_exp(_mm256_sub_ps(_mm256_loadu_ps(scores + i), top));
        _mm256_storeu_ps(scores + i, weight);
        total = _mm256_add_ps(total, weight);
    }
    return phi_hsum(total);
}

typedef struct {
    const phi_attention *a;
    int first, last;      /* positions seen, both included */
    const float *weights; /* [last + 1 - first] */
} seen;

/* out[0 .. 8 * n_vectors - 1] = the same dimensions of sum of weights[p] * values[p]; n_vectors, at most 8, is a
 * constant where this is inlined. */
PHI_INLINE void weigh(const seen *s, size_t first_dim, int n_vectors, float *out) {
    const size_t head_dim = (size_t)s->a->head_dim;
    __m256 sum[8];
    for (int i = 0; i < n_vectors; i++) sum[i] = _mm256_setzero_ps();
    for (int p = s->first; p <= s->last;) {
        const int end = p / PHI_PAGE_TOKENS * PHI_PAGE_TOKENS + PHI_PAGE_TOKENS - 1;
        const uint16_t *values = page_of(s->a, p) + (size_t)PHI_PAGE_TOKENS * head_dim + first_dim;
        for (; p <= s->last && p <= end; p++) {
            const uint16_t *row = values + (size_t)(p % PHI_PAGE_TOKENS) * head_dim;
            const __m256 weight = _mm256_broadcast_ss(s->weights + (p - s->first));
            for (int i = 0; i < n_vectors; i++) sum[i] = _mm256_fmadd_ps(weight, phi_load_half(row + 8 * i), sum[i]);
        }
    }
    for (int i = 0; i < n_vectors; i++) _mm256_storeu_ps(out + 8 * i, sum[i]);
}

static void weigh_one(const seen *s, size_t dim, float *out) {
    float sum = 0.0f;
    for (int p = s->first; p <= s->last; p++) {
        const size_t row = (size_t)(PHI_PAGE_TOKENS + p % PHI_PAGE_TOKENS);
        sum += s->weights[p - s->first] * phi_half(page_of(s->a, p)[row * (size_t)s->a->head_dim + dim]);
    }
    *out = sum;
}

static void attend(const phi_attention *a, const float *q, int first, int last, float *out) {
    const size_t head_dim = (size_t)a->head_dim;
    const int begin = first / PHI_KV_GROUP * PHI_KV_GROUP; /* of the group that holds the first position */
    for (int p = begin; p <= last; p += PHI_KV_GROUP) {
        const size_t group = (size_t)(p % PHI_PAGE_TOKENS / PHI_KV_GROUP);
        score_group(q, a->head_dim, page_of(a, p) + group * head_dim * PHI_KV_GROUP, a->scale, a->scores + (p - begin));
    }
    const size_t kept = (size_t)(last - begin + 1), padded = (kept + 7) / 8 * 8;
    for (int p = begin; p < first; p++) a->scores[p - begin] = -INFINITY;
    for (size_t i = kept; i < padded; i++) a->scores[i] = -INFINITY;
    const float inverse = 1.0f / exponentiate(a->scores, padded);

    const seen s = {a, first, last, a->scores + (first - begin)};
    size_t d = 0;
    for (; d + 64 <= head_dim; d += 64) weigh(&s, d, 8, out + d);
    for (; d + 32 <= head_dim; d += 32) weigh(&s, d, 4, out + d);
    for (; d + 8 <= head_dim; d += 8) weigh(&s, d, 1, out + d);
    for (; d < head_dim; d++) weigh_one(&s, d, out + d);
    for (size_t i = 0; i < head_dim; i++) out[i] *= inverse;
}

void phi_attention_avx2(const phi_attention *a) {
    for (int t = 0; t < a->n_tokens; t++) {
        for (int i = 0; i < a->n_queries; i++) {
            const size_t at = (size_t)t * a->token_stride + (size_t)i * (size_t)a->head_dim;
            attend(a, a->q + at, phi_first_seen(a->last + t, a->window), a->last + t, a->out + at);
        }
    }
}
