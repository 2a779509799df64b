/* Kernel table of the AVX-VNNI tier: packed products; the rest is inherited from AVX2. */
#include "avxvnni.h"

#include "../generic/peak.h"

#define PHI_SLOTS(UPPER, lower) \
    .pack[PHI_TYPE_##UPPER] = phi_pack_##lower, .matmul_packed[PHI_TYPE_##UPPER] = phi_matmul_packed_##lower##_avxvnni,

const phi_kernels phi_kernels_avxvnni = {
    .name = "avxvnni", PHI_PACKED_TYPES(PHI_SLOTS).peak[PHI_ACTIVATION_Q8] = PHI_PEAK(phi_peak_q8_avxvnni, 32)};
