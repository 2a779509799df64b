/* A CPU that has AMX on a system that refuses its use: the tiers next to it run instead. The functions of csrc/cpu.c
 * are replaced here, so nothing but the choice of tiers may be run. */
#include <stdio.h>
#include <string.h>

#include "check.h"
#include "cpu.h"

static bool granted;

const phi_cpu *phi_cpu_detect(void) {
    static const phi_cpu all_of_x86 = {
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
    return &all_of_x86;
}

bool phi_cpu_request_tiles(void) { return granted; }

const char *phi_cpu_features(void) { return ""; }

int main(void) {
    static const char *const amx[] = {"amx", "amxbf16"};
    const phi_kernels *k = NULL;
    for (int i = 0; i < 2; i++) {
        granted = false;
        CHECK(!phi_tier_available(amx[i]), "%s is there although its use was refused", amx[i]);
        CHECK(phi_select_kernels(amx[i], &k) == PHI_NO_SUCH_TIER && !k, "%s was refused and is given", amx[i]);
        granted = true;
        CHECK(phi_tier_available(amx[i]), "%s is not there although its use was granted", amx[i]);
    }
    granted = false;
    CHECK(phi_select_kernels(NULL, &k) == PHI_OK && strcmp(k->name, "avx512") == 0, "%s is chosen",
          k ? k->name : "none");
    printf("ok  refused tiles  %zu checks\n", n_checks);
    return 0;
}
