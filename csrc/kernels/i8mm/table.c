/* Kernel table of the i8mm tier: products of packed rows. Rows in row-major layout are inherited from the dotprod tier:
 * they are multiplied by at most four tokens at a time. */
#include "i8mm.h"

#include "../generic/peak.h"

#define PHI_SLOTS(UPPER, lower) \
    .pack[PHI_TYPE_##UPPER] = phi_pack_##lower, .matmul_packed[PHI_TYPE_##UPPER] = phi_matmul_packed_##lower##_i8mm,

const phi_kernels phi_kernels_i8mm = {
    .name = "i8mm", PHI_PACKED_TYPES(PHI_SLOTS).peak[PHI_ACTIVATION_Q8] = PHI_PEAK(phi_peak_q8_i8mm, 32)};
