/* The default tuning. */
#include "phi.h"

#include "threads.h"

phi_tuning phi_default_tuning(void) {
    /* Within 10 % of the best decode on Zen 4, where none is best, and on Zen 5, where 16 KiB is; without any, Zen 5
     * decodes at half the speed. In batches of 8, Zen 4 needs one too: without any it takes 1.6 times as long. */
    const phi_prefetch decode = {.l2_bytes = 8192, .next_page = true};
    const phi_prefetch small_batch = {.l1_bytes = 2048, .l2_bytes = 8192};
    phi_tuning tuning = {.max_task_rows = 64, .tasks_per_thread = 8, .spins = PHI_DEFAULT_SPINS};
    for (phi_type type = 0; type < PHI_N_TYPES; type++) {
        tuning.max_small_batch[type] = PHI_MAX_SMALL_BATCH;
        for (int c = 0; c < PHI_N_BATCH_CLASSES; c++)
            tuning.prefetch[type][c] = c == PHI_BATCH_1 ? decode : small_batch;
    }
    return tuning;
}
