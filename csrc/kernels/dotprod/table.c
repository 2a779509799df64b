/* Kernel table of the dotprod tier: products with int8 activations. The rest is inherited from the neon tier. */
#include "dotprod.h"

#include "../generic/peak.h"

#define PHI_SLOT(UPPER, lower) .matmul[PHI_TYPE_##UPPER] = phi_matmul_##lower##_dotprod,
#define PHI_PACKED_SLOTS(UPPER, lower) \
    .pack[PHI_TYPE_##UPPER] = phi_pack_##lower, .matmul_packed[PHI_TYPE_##UPPER] = phi_matmul_packed_##lower##_dotprod,

const phi_kernels phi_kernels_dotprod = {
    .name = "dotprod",
    PHI_NEON_LEGACY(PHI_SLOT) PHI_NEON_K(PHI_SLOT) PHI_PACKED_TYPES(PHI_PACKED_SLOTS).peak[PHI_ACTIVATION_Q8] =
        PHI_PEAK(phi_peak_q8_dotprod, 16)};
