#include "weights.h"

#include <string.h>

#include "half.h"

const char *const weight_kind_names[N_WEIGHT_KINDS] = {"random", "extreme", "any-scale", "trained-like"};

/* Offsets of the half-precision scales in a block, in bytes; second is -1 if there is one scale. typical: the magnitude
 * of a random quant times its sub-block's scale. */
static const struct {
    int first, second;
    float typical;
} scales[PHI_N_TYPES] = {
    [PHI_TYPE_Q4_0] = {0, -1, 5},      [PHI_TYPE_Q4_1] = {0, 2, 9},   [PHI_TYPE_Q5_0] = {0, -1, 9},
    [PHI_TYPE_Q5_1] = {0, 2, 18},      [PHI_TYPE_Q8_0] = {0, -1, 74}, [PHI_TYPE_Q2_K] = {80, 82, 15},
    [PHI_TYPE_Q3_K] = {108, -1, 42},   [PHI_TYPE_Q4_K] = {0, 2, 320}, [PHI_TYPE_Q5_K] = {0, 2, 660},
    [PHI_TYPE_Q6_K] = {208, -1, 1370},
};

static void put_half(uint8_t *at, float value) {
    const uint16_t half = phi_float_to_half(value);
    memcpy(at, &half, sizeof half);
}

static float block_scale(generator *g, phi_type type, weight_kind kind, size_t row) {
    static const float sizes[] = {0x1p-24f, -0x1p-15f, 0x1p-14f, 0.0f, -0.0f, 1.0f, -3.0f, 65504.0f};
    switch (kind) {
    case WEIGHTS_EXTREME:
        return row % 2 ? -0.5f : 0.5f;
    case WEIGHTS_ANY_SIZE:
        return sizes[next_below(g, sizeof sizes / sizeof *sizes)];
    case WEIGHTS_TRAINED:
        return next_normal(g) / scales[type].typical / 16.0f;
    default:
        return 0.01f * next_normal(g);
    }
}

static void fill_quantised_row(generator *g, phi_type type, weight_kind kind, size_t row, size_t n_blocks,
                               uint8_t *block) {
    static const uint8_t patterns[] = {0x00, 0xff, 0x0f, 0xf0, 0x80, 0x7f, 0x55, 0xaa};
    const size_t block_bytes = (size_t)phi_types[type].block_bytes;
    for (size_t b = 0; b < n_blocks; b++, block += block_bytes) {
        for (size_t i = 0; i < block_bytes; i++)
            block[i] = kind == WEIGHTS_EXTREME ? patterns[row % sizeof patterns] : (uint8_t)next_bits(g);
        put_half(block + scales[type].first, block_scale(g, type, kind, row));
        if (scales[type].second >= 0) put_half(block + scales[type].second, block_scale(g, type, kind, row));
    }
}

/* Normally distributed floats, or floats of any exponent for which sums stay finite. */
static void fill_float_row(generator *g, phi_type type, weight_kind kind, size_t n_cols, uint8_t *row) {
    for (size_t i = 0; i < n_cols; i++) {
        const float size = kind == WEIGHTS_RANDOM ? 1.0f : block_scale(g, type, WEIGHTS_ANY_SIZE, 0) / 8.0f;
        const float value = next_normal(g) * size;
        const uint16_t upper = (uint16_t)(phi_bits_from_float(value) >> 16);
        if (type == PHI_TYPE_F32) memcpy(row + 4 * i, &value, sizeof value);
        if (type == PHI_TYPE_BF16) memcpy(row + 2 * i, &upper, sizeof upper);
        if (type == PHI_TYPE_F16) put_half(row + 2 * i, value);
    }
}

void fill_rows(generator *g, phi_type type, weight_kind kind, size_t n_rows, size_t n_cols, uint8_t *rows) {
    const size_t row_bytes = phi_row_bytes(type, n_cols), n_blocks = n_cols / (size_t)phi_types[type].block_elements;
    for (size_t r = 0; r < n_rows; r++) {
        uint8_t *row = rows + r * row_bytes;
        if (phi_types[type].activation_format == PHI_ACTIVATION_Q8)
            fill_quantised_row(g, type, kind, r, n_blocks, row);
        else
            fill_float_row(g, type, kind, n_cols, row);
    }
}
