/* Which tiers there are: what is available can be had, what is not is refused, and tables are complete. */
#include "dispatch.h"

#include <string.h>

#include "check.h"

static void check_table(const char *tier) {
    const phi_kernels *k = NULL;
    CHECK(phi_select_kernels(tier, &k) == PHI_OK && k, "%s is available and refused", tier);
    CHECK(strcmp(k->name, tier) == 0, "the table of %s is called %s", tier, k->name);
    for (phi_type type = 0; type < PHI_N_TYPES; type++) {
        const char *provider = phi_matmul_tier(tier, type);
        CHECK(k->dequantize[type] && k->matmul[type], "%s lacks a kernel for %s", tier, phi_types[type].name);
        CHECK(!k->pack[type] || k->matmul_packed[type], "%s packs %s, and cannot multiply it", tier,
              phi_types[type].name);
        CHECK(provider && phi_tier_available(provider), "%s has %s from %s", tier, phi_types[type].name,
              provider ? provider : "nowhere");
    }
}

static void check_prefetch(void) {
    const phi_prefetch zen4 = phi_prefetch_for(&(phi_cpu){.amd_family = 0x19});
    const phi_prefetch zen5 = phi_prefetch_for(&(phi_cpu){.amd_family = 0x1a});
    const phi_prefetch other = phi_prefetch_for(&(phi_cpu){.amd_family = 0});
    CHECK(zen4.decode_l2_bytes == 0 && zen4.l2_bytes == 16384 && zen4.l1_bytes == 0, "prefetch of Zen 4");
    CHECK(zen5.decode_l2_bytes == 16384 && zen5.l2_bytes == 16384 && zen5.l1_bytes == 0, "prefetch of Zen 5");
    CHECK(other.decode_l2_bytes == 4096 && other.l2_bytes == 4096 && other.l1_bytes == 2048, "prefetch elsewhere");
}

void test_dispatch(const phi_kernels *k) {
    const char *const *names = phi_tier_names();
    const phi_kernels *chosen = NULL, *none = NULL;
    (void)k;
    check_prefetch();
    CHECK(names[0] && strcmp(names[0], "scalar") == 0, "the first tier is not scalar");
    for (int i = 0; names[i]; i++) {
        if (phi_tier_available(names[i]))
            check_table(names[i]);
        else
            CHECK(phi_select_kernels(names[i], &none) == PHI_NO_SUCH_TIER && !none, "%s is missing and given",
                  names[i]);
    }
    CHECK(phi_select_kernels("avx9", &none) == PHI_NO_SUCH_TIER && !none, "a tier that nobody knows is given");
    CHECK(!phi_tier_available("avx9") && !phi_matmul_tier("avx9", PHI_TYPE_F32), "a tier that nobody knows is there");
    CHECK(phi_select_kernels(NULL, &chosen) == PHI_OK && phi_tier_available(chosen->name), "no tier is chosen");
    for (phi_type type = 0; type < PHI_N_TYPES; type++) {
        CHECK(phi_row_bytes(type, 256) ==
                  256 / (size_t)phi_types[type].block_elements * (size_t)phi_types[type].block_bytes,
              "row bytes of %s", phi_types[type].name);
    }
}
