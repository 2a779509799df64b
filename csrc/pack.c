/* Packs a matrix: every thread of the pool packs one panel at a time. */
#include "kernels.h"
#include "threads.h"

typedef struct {
    phi_pack_fn pack;
    const uint8_t *rows;
    uint8_t *panels;
    size_t row_bytes;
    int n_panels;
    atomic_int next; /* panel */
} pack_run;

static void pack_panels(void *context, int thread) {
    pack_run *p = context;
    (void)thread;
    for (int i; (i = atomic_fetch_add(&p->next, 1)) < p->n_panels;) {
        const size_t at = (size_t)i * PHI_PANEL_ROWS * p->row_bytes;
        p->pack(p->rows + at, p->row_bytes, p->panels + at);
    }
}

size_t phi_packed_bytes(const phi_kernels *kernels, const phi_matrix *matrix) {
    if (!kernels->pack[matrix->type]) return 0;
    if (matrix->n_rows % PHI_PANEL_ROWS != 0 || matrix->row_unit % PHI_PANEL_ROWS != 0) return 0;
    return (size_t)matrix->n_rows * phi_row_bytes(matrix->type, (size_t)matrix->n_cols);
}

phi_status phi_pack(const phi_kernels *kernels, phi_pool *pool, phi_matrix *matrix, uint8_t *memory) {
    pack_run p = {
        .pack = kernels->pack[matrix->type],
        .rows = matrix->data,
        .panels = memory,
        .row_bytes = phi_row_bytes(matrix->type, (size_t)matrix->n_cols),
        .n_panels = matrix->n_rows / PHI_PANEL_ROWS,
    };
    const phi_status status = phi_pool_run(pool, pack_panels, &p);
    if (status != PHI_OK) return status;
    matrix->layout = PHI_LAYOUT_PANELS;
    matrix->data = memory;
    return PHI_OK;
}
