/* Tests of the kernels, the thread pool and the forward pass that need a C compiler only.
 *
 *   phi_tests [GROUP...]                      run these groups, or all, on every available tier
 *   phi_tests --tiers scalar,neon [GROUP...]  fail unless exactly these tiers are available
 *   phi_tests --types                         print a line per type and tier, without a test: the tier's product with
 *                                             weights in rows, and in panels: `own` if it implements it, else `-`
 *
 * Prints a line per group and tier. The first failure is printed and ends the program with status 1. */
#include <stdio.h>
#include <string.h>

#include "check.h"
#include "dispatch.h"

static const struct {
    const char *name;
    test_fn run;
    bool per_tier;
} groups[] = {
    {"dispatch", test_dispatch, false},    {"threads", test_threads, false}, {"fork", test_fork, false},
    {"dequantize", test_dequantize, true}, {"vectors", test_vectors, true},  {"attention", test_attention, true},
    {"products", test_products, true},     {"forward", test_forward, true},  {"pack", test_pack, true},
};
enum { N_GROUPS = sizeof groups / sizeof *groups };

static void run_group(int i, const char *tier) {
    const phi_kernels *k = NULL;
    const size_t before = n_checks;
    if (tier && phi_select_kernels(tier, &k) != PHI_OK)
        fail_at(__FILE__, __LINE__, "tier %s is available but cannot be selected", tier);
    groups[i].run(k);
    printf("ok  %-10s  %-8s  %zu checks\n", groups[i].name, tier ? tier : "", n_checks - before);
    fflush(stdout);
}

static void run_groups(int i) {
    if (!groups[i].per_tier) {
        run_group(i, NULL);
        return;
    }
    for (const char *const *tier = phi_tier_names(); *tier; tier++) {
        if (phi_tier_available(*tier)) run_group(i, *tier);
    }
}

static void list_tiers(char *names, size_t n_bytes) {
    size_t used = 0;
    for (const char *const *tier = phi_tier_names(); *tier; tier++) {
        if (phi_tier_available(*tier))
            used += (size_t)snprintf(names + used, n_bytes - used, "%s%s", used ? "," : "", *tier);
    }
}

static void print_types(void) {
    for (int type = 0; type < PHI_N_TYPES; type++) {
        for (const char *const *tier = phi_tier_names(); *tier; tier++) {
            const phi_kernels *own = phi_own_kernels(*tier);
            printf("%s %s %s %s\n", phi_types[type].name, *tier, own->matmul[type] ? "own" : "-",
                   own->matmul_packed[type] ? "own" : "-");
        }
    }
}

static int find_group(const char *name) {
    for (int i = 0; i < N_GROUPS; i++) {
        if (strcmp(groups[i].name, name) == 0) return i;
    }
    return -1;
}

int main(int n_arguments, char **arguments) {
    char tiers[256];
    int first = 1;
    if (n_arguments == 2 && strcmp(arguments[1], "--types") == 0) {
        print_types();
        return 0;
    }
    list_tiers(tiers, sizeof tiers);
    printf("tiers %s; cpu %s\n", tiers, phi_cpu_features());
    if (n_arguments > 2 && strcmp(arguments[1], "--tiers") == 0) {
        if (strcmp(arguments[2], tiers) != 0)
            fail_at(__FILE__, __LINE__, "available tiers are %s, expected %s", tiers, arguments[2]);
        first = 3;
    }
    for (int i = first; i < n_arguments; i++) {
        const int group = find_group(arguments[i]);
        if (group < 0) fail_at(__FILE__, __LINE__, "unknown test group %s", arguments[i]);
        run_groups(group);
    }
    for (int i = 0; first == n_arguments && i < N_GROUPS; i++) run_groups(i);
    return 0;
}
