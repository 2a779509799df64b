/* Tier selection: available tiers can be selected, others cannot, and kernel tables are complete. */
#include "dispatch.h"

#include <string.h>

#include "check.h"

static void check_table(const char *tier) {
    const phi_kernels *k = NULL;
    CHECK(phi_select_kernels(tier, &k) == PHI_OK && k, "tier %s is available but cannot be selected", tier);
    CHECK(strcmp(k->name, tier) == 0, "tier %s has a table named %s", tier, k->name);
    for (phi_type type = 0; type < PHI_N_TYPES; type++) {
        const char *provider = phi_matmul_tier(tier, type);
        CHECK(k->dequantize[type] && k->matmul[type], "tier %s has no kernel for %s", tier, phi_types[type].name);
        CHECK(!k->pack[type] || k->matmul_packed[type], "tier %s packs %s but cannot multiply it packed", tier,
              phi_types[type].name);
        CHECK(provider && phi_tier_available(provider), "tier %s inherits %s from %s", tier, phi_types[type].name,
              provider ? provider : "no tier");
    }
}

void test_dispatch(const phi_kernels *k) {
    const char *const *names = phi_tier_names();
    const phi_kernels *chosen = NULL, *none = NULL;
    (void)k;
    CHECK(names[0] && strcmp(names[0], "scalar") == 0, "the first tier is not scalar");
    for (int i = 0; names[i]; i++) {
        if (phi_tier_available(names[i]))
            check_table(names[i]);
        else
            CHECK(phi_select_kernels(names[i], &none) == PHI_TIER_UNAVAILABLE && !none,
                  "tier %s is unavailable but was selected", names[i]);
    }
    CHECK(phi_select_kernels("avx9", &none) == PHI_TIER_UNAVAILABLE && !none, "the unknown tier avx9 was selected");
    CHECK(!phi_tier_available("avx9") && !phi_matmul_tier("avx9", PHI_TYPE_F32), "the unknown tier avx9 is available");
    CHECK(phi_select_kernels(NULL, &chosen) == PHI_OK && phi_tier_available(chosen->name), "no default tier");
    for (phi_type type = 0; type < PHI_N_TYPES; type++) {
        CHECK(phi_row_bytes(type, 256) ==
                  256 / (size_t)phi_types[type].block_elements * (size_t)phi_types[type].block_bytes,
              "phi_row_bytes of %s is wrong", phi_types[type].name);
    }
}
