/* A CPU with AMX on a system that denies its use: the AMX tiers are unavailable, the others are not affected. The
 * functions of csrc/cpu.c are replaced here, so only tier selection can be tested. */
#include <stdio.h>
#include <string.h>

#include "check.h"
#include "cpu.h"

static bool granted;

const phi_cpu *phi_cpu_detect(void) {
    static const phi_cpu all_x86 = {
        .avx2 = true,
        .fma = true,
        .f16c = true,
        .avx512f = true,
        .avx512bw = true,
        .avx512vl = true,
        .avx512dq = true,
        .avx512vnni = true,
        .avx512bf16 = true,
        .amx_tile = true,
        .amx_int8 = true,
        .amx_bf16 = true,
    };
    return &all_x86;
}

bool phi_cpu_request_tiles(void) { return granted; }

const char *phi_cpu_features(void) { return ""; }

int main(void) {
    static const char *const amx[] = {"amx", "amxbf16"};
    const phi_kernels *k = NULL;
    for (int i = 0; i < 2; i++) {
        granted = false;
        CHECK(!phi_tier_available(amx[i]), "tier %s is available although the permission was denied", amx[i]);
        CHECK(phi_select_kernels(amx[i], &k) == PHI_TIER_UNAVAILABLE && !k,
              "tier %s was selected although it is unavailable", amx[i]);
        granted = true;
        CHECK(phi_tier_available(amx[i]), "tier %s is unavailable although the permission was granted", amx[i]);
    }
    granted = false;
    CHECK(phi_select_kernels(NULL, &k) == PHI_OK && strcmp(k->name, "avx512") == 0,
          "the default tier is %s, expected avx512", k ? k->name : "none");
    printf("ok  denied tiles  %zu checks\n", n_checks);
    return 0;
}
