/* Unpacks units of packed rows (generic/pack.h) to integers, for the products of the AVX-512 and AMX tiers.
 * Layout: a line is four columns of 16 rows, one dword per row; eight lines are a sub-block of 32 columns.
 * Idea: quants become unsigned bytes in column order. Scales and minima, one vector for 16 rows, absorb their offsets:
 * w = scale * q - min. Types without minima are centred: their quants are offset by 128, w = scale * (q - 128), and dot
 * products start from the activations' offsets. A type is a `format`, a compile-time constant once inlined. */
#ifndef PHI_AVX512_PANEL_UNITS_H
#define PHI_AVX512_PANEL_UNITS_H

#include <immintrin.h>

#include "../x86/prefetch.h"
#include "../generic/pack.h"
#include "../generic/unroll.h"

#define INLINE PHI_INLINE

enum { LINES = 8, MAX_GROUPS = 16 /* of a unit */ };

/* Compilers declare shift counts with different types. */
#ifdef __clang__
typedef unsigned shift_count;
#else
typedef int shift_count;
#endif

/* What the scales and minima of a unit's groups are computed from, read at the start of the unit: hardware prefetchers
 * follow a stream of ascending lines, and lose one that goes back. */
typedef struct {
    __m512 d, dmin;                 /* of 16 rows */
    uint8_t scales[MAX_GROUPS][16]; /* factors of d: [groups, rows] */
    uint8_t mins[8][16];            /* factors of dmin */
} unit_scales;

/* Traits of a weight type; compile-time constants once inlined. */
typedef struct {
    size_t unit_bytes;
    int sub_blocks;       /* of 32 columns in a unit */
    int groups_per_block; /* scales per sub-block: 1 or 2 */
    int shift;            /* bits by which unpacked quants are shifted left; the scale compensates */
    bool centred;
    void (*unpack_scales)(const void *unit, unit_scales *s);
    __m512 (*scale_of)(const unit_scales *s, int group);
    __m512 (*min_of)(const unit_scales *s, int group); /* unset for centred types */
    void (*unpack_lines)(const void *unit, int sub_block, __m512i *q);
} format;

INLINE __m512 load_16_halves(const uint16_t *h) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)h));
}
INLINE __m512i load_line(const uint8_t *line) { return _mm512_loadu_si512((const void *)line); }
INLINE void store_line(uint8_t *line, __m512i bytes) { _mm512_storeu_si512((void *)line, bytes); }
INLINE __m512 from_u8(__m128i bytes) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)); }
INLINE __m512 from_i8(__m128i bytes) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)); }
INLINE __m128i load_16_bytes(const void *bytes) { return _mm_loadu_si128((const __m128i *)bytes); }

/* ---- blocks of 32 ---- */

/* One group a unit: d and dmin are its scale and minimum. */
INLINE __m512 only_scale(const unit_scales *s, int group) {
    (void)group;
    return s->d;
}
INLINE __m512 only_min(const unit_scales *s, int group) {
    (void)group;
    return s->dmin;
}

INLINE void unpack_nibbles_32(const uint8_t (*lines)[64], __m512i *q) {
    const __m512i low4 = _mm512_set1_epi8(15);
    for (int i = 0; i < 4; i++) {
        const __m512i line = load_line(lines[i]);
        q[i] = _mm512_and_si512(line, low4);
        q[i + 4] = _mm512_and_si512(_mm512_srli_epi16(line, 4), low4);
    }
}

INLINE void scales_q4_0(const void *unit, unit_scales *s) {
    const phi_panel_q4_0 *u = unit;
    s->d = _mm512_mul_ps(load_16_halves(u->d), _mm512_set1_ps(1.0f / 16));
}
INLINE void lines_q4_0(const void *unit, int sub_block, __m512i *q) {
    const phi_panel_q4_0 *u = unit;
    const __m512i high4 = _mm512_set1_epi8(-16);
    (void)sub_block;
    for (int i = 0; i < 4; i++) {
        const __m512i line = load_line(u->lines[i]);
        q[i] = _mm512_and_si512(_mm512_slli_epi16(line, 4), high4);
        q[i + 4] = _mm512_and_si512(line, high4);
    }
}

INLINE void scales_q4_1(const void *unit, unit_scales *s) {
    const phi_panel_q4_1 *u = unit;
    s->d = load_16_halves(u->d);
    s->dmin = _mm512_sub_ps(_mm512_setzero_ps(), load_16_halves(u->m));
}
INLINE void lines_q4_1(const void *unit, int sub_block, __m512i *q) {
    (void)sub_block;
    unpack_nibbles_32(((const phi_panel_q4_1 *)unit)->lines, q);
}

INLINE void scales_q8_0(const void *unit, unit_scales *s) {
    const phi_panel_q8_0 *u = unit;
    s->d = load_16_halves(u->d);
}
INLINE void lines_q8_0(const void *unit, int sub_block, __m512i *q) {
    const phi_panel_q8_0 *u = unit;
    (void)sub_block;
    for (int i = 0; i < LINES; i++) q[i] = _mm512_xor_si512(load_line(u->lines[i]), _mm512_set1_epi8(-128));
}

/* ---- blocks of 256 ---- */

/* The 6-bit scales and minima of Q4_K and Q5_K (see phi_unpack_scales_k4), for 16 rows and 4 sub-blocks at a time. */
INLINE void scales_k4(const uint8_t (*packed)[16], __m512 d, __m512 dmin, unit_scales *s) {
    const __m512i a = load_line(packed[0]), b = load_line(packed[4]), c = load_line(packed[8]);
    const __m512i low4 = _mm512_set1_epi8(15), low6 = _mm512_set1_epi8(63), bits45 = _mm512_set1_epi8(48);
    s->d = d;
    s->dmin = dmin;
    store_line(s->scales[0], _mm512_and_si512(a, low6));
    store_line(s->scales[4],
               _mm512_or_si512(_mm512_and_si512(c, low4), _mm512_and_si512(_mm512_srli_epi16(a, 2), bits45)));
    store_line(s->mins[0], _mm512_and_si512(b, low6));
    store_line(s->mins[4], _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi16(c, 4), low4),
                                           _mm512_and_si512(_mm512_srli_epi16(b, 2), bits45)));
}
INLINE __m512 scale_k4(const unit_scales *s, int group) {
    return _mm512_mul_ps(s->d, from_u8(load_16_bytes(s->scales[group])));
}
INLINE __m512 min_k4(const unit_scales *s, int group) {
    return _mm512_mul_ps(s->dmin, from_u8(load_16_bytes(s->mins[group])));
}

/* a | (b & mask) */
INLINE __m512i or_bits(__m512i a, __m512i b, __m512i mask) { return _mm512_ternarylogic_epi32(a, b, mask, 0xf8); }

/* A pair of sub-blocks shares eight lines: the even one has the low nibbles, the odd one the high nibbles. */
INLINE __m512i nibbles_of(const uint8_t *line, int high) {
    const __m512i q = load_line(line);
    return _mm512_and_si512(high ? _mm512_srli_epi16(q, 4) : q, _mm512_set1_epi8(15));
}

INLINE void scales_q4_k(const void *unit, unit_scales *s) {
    const phi_panel_q4_k *u = unit;
    scales_k4(u->scales, load_16_halves(u->d), load_16_halves(u->dmin), s);
}
INLINE void lines_q4_k(const void *unit, int sub_block, __m512i *q) {
    const phi_panel_q4_k *u = unit;
    for (int i = 0; i < LINES; i++) q[i] = nibbles_of(u->lines[sub_block / 2 * 8 + i], sub_block % 2);
}

INLINE void scales_q5_k(const void *unit, unit_scales *s) {
    const phi_panel_q5_k *u = unit;
    scales_k4(u->scales, load_16_halves(u->d), load_16_halves(u->dmin), s);
}
INLINE void lines_q5_k(const void *unit, int sub_block, __m512i *q) {
    const phi_panel_q5_k *u = unit;
    const __m512i bit4 = _mm512_set1_epi8(16);
    for (int i = 0; i < LINES; i++) {
        const __m512i high = load_line(u->first[i].high);
        const __m512i fifth = sub_block < 4 ? _mm512_slli_epi16(high, (shift_count)(4 - sub_block))
                                            : _mm512_srli_epi16(high, (shift_count)(sub_block - 4));
        q[i] = or_bits(nibbles_of(phi_panel_q5_k_line(u, sub_block / 2 * 8 + i), sub_block % 2), fifth, bit4);
    }
}

INLINE void scales_q6_k(const void *unit, unit_scales *s) {
    const phi_panel_q6_k *u = unit;
    s->d = _mm512_mul_ps(load_16_halves(u->d), _mm512_set1_ps(1.0f / 4));
    for (int i = 0; i < MAX_GROUPS; i += 4) store_line(s->scales[i], load_line((const uint8_t *)u->scales[i]));
}
INLINE __m512 scale_q6_k(const unit_scales *s, int group) {
    return _mm512_mul_ps(s->d, from_i8(load_16_bytes(s->scales[group])));
}
INLINE void lines_q6_k(const void *unit, int sub_block, __m512i *q) {
    const phi_panel_q6_k *u = unit;
    const int half = sub_block / 4, quarter = sub_block % 4;
    const __m512i bits25 = _mm512_set1_epi8(0x3c), bits67 = _mm512_set1_epi8(-64);
    for (int i = 0; i < LINES; i++) {
        const __m512i high = load_line(u->halves[half].first[i].high);
        const __m512i low = load_line(quarter % 2 ? u->halves[half].second[i] : u->halves[half].first[i].low);
        const __m512i nibbles = quarter < 2 ? _mm512_slli_epi16(low, 2) : _mm512_srli_epi16(low, 2);
        q[i] =
            or_bits(_mm512_and_si512(nibbles, bits25), _mm512_slli_epi16(high, (shift_count)(6 - 2 * quarter)), bits67);
    }
}

#define PHI_FORMAT(type, n_sub_blocks, n_groups, shift, centred, scale_of, min_of)                               \
    ((format){sizeof(phi_panel_##type), n_sub_blocks, n_groups, shift, centred, scales_##type, scale_of, min_of, \
              lines_##type})
#define PHI_FORMAT_q4_0 PHI_FORMAT(q4_0, 1, 1, 4, true, only_scale, NULL)
#define PHI_FORMAT_q4_1 PHI_FORMAT(q4_1, 1, 1, 0, false, only_scale, only_min)
#define PHI_FORMAT_q8_0 PHI_FORMAT(q8_0, 1, 1, 0, true, only_scale, NULL)
#define PHI_FORMAT_q4_k PHI_FORMAT(q4_k, 8, 1, 0, false, scale_k4, min_k4)
#define PHI_FORMAT_q5_k PHI_FORMAT(q5_k, 8, 1, 0, false, scale_k4, min_k4)
#define PHI_FORMAT_q6_k PHI_FORMAT(q6_k, 8, 2, 2, true, scale_q6_k, NULL)

#endif
