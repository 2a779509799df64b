/* The rotation of RoPE. */
#ifndef PHI_GENERIC_ROTATE_H
#define PHI_GENERIC_ROTATE_H

/* Rotates (a, b). Multiplications and additions are not fused: RoPE gives the same bits on all tiers. */
static inline void phi_rotate(float *a, float *b, float cos, float sin) {
    const float x = *a, y = *b;
    *a = x * cos - y * sin;
    *b = y * cos + x * sin;
}

#endif
