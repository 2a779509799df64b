#define _DEFAULT_SOURCE /* pread */
/* Packs matrices: one run of the thread pool over the packed memory, in jobs of consecutive bytes.
 *
 * A thread faults the huge pages of its own jobs only, and reads the file into a buffer that fits its L2 cache. Reading
 * mapped pages instead costs a page fault per 64 KiB or less, and keeps them in the resident memory. */
#include "kernels.h"
#include "memory.h"
#include "threads.h"

#ifndef _WIN32
#include <unistd.h>
#endif

enum {
    JOB_BYTES = 1 << 22,  /* of packed memory per job: two huge pages */
    READ_BYTES = 1 << 18, /* of the file per read */
};

typedef struct {
    const phi_packing *packing;
    uint8_t *buffers;    /* [n_threads, buffer_bytes]; NULL: read through the mapping */
    size_t buffer_bytes; /* at least a panel */
    int n_jobs;
    atomic_int next; /* job */
    atomic_bool stop;
} pack_run;

static size_t panel_bytes(const phi_matrix *matrix) {
    return PHI_PANEL_ROWS * phi_row_bytes(matrix->type, (size_t)matrix->n_cols);
}

static size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

/* Reads n_bytes of the mapping from the file. False if they are not part of it or cannot be read. */
static bool read_file(const phi_pack_source *source, const uint8_t *mapped, size_t n_bytes, uint8_t *buffer) {
#ifdef _WIN32
    (void)source, (void)mapped, (void)n_bytes, (void)buffer;
    return false;
#else
    const uintptr_t start = (uintptr_t)source->data, at = (uintptr_t)mapped;
    if (at < start || at - start > source->n_bytes || n_bytes > source->n_bytes - (at - start)) return false;
    for (size_t n_read = 0; n_read < n_bytes;) {
        const ssize_t n =
            pread(source->fd, buffer + n_read, n_bytes - n_read, (off_t)(source->offset + (at - start) + n_read));
        if (n <= 0) return false;
        n_read += (size_t)n;
    }
    return true;
#endif
}

/* Packs the panels of a matrix that start at the bytes first to end of its packed form. */
static void pack_part(const pack_run *run, const phi_matrix *matrix, size_t first, size_t end, uint8_t *memory,
                      uint8_t *buffer) {
    const phi_packing *p = run->packing;
    const size_t panel = panel_bytes(matrix), row_bytes = panel / PHI_PANEL_ROWS;
    const size_t limit = (end + panel - 1) / panel * panel;
    for (size_t at = (first + panel - 1) / panel * panel, n_bytes; at < limit; at += n_bytes) {
        n_bytes = limit - at;
        const uint8_t *rows = (const uint8_t *)matrix->data + at;
        if (buffer) {
            n_bytes = smaller(n_bytes, run->buffer_bytes / panel * panel);
            if (read_file(&p->source, rows, n_bytes, buffer)) rows = buffer;
        }
        for (size_t i = 0; i < n_bytes; i += panel)
            p->kernels->pack[matrix->type](rows + i, row_bytes, memory + at + i);
    }
}

/* Packs the panels that start at the bytes first to end of the packed memory. */
static void pack_job(const pack_run *run, size_t first, size_t end, uint8_t *buffer) {
    const phi_packing *p = run->packing;
    size_t start = 0; /* of a matrix in the packed memory */
    for (int i = 0; i < p->n_matrices && start < end; i++) {
        const size_t n_bytes = phi_packed_bytes(p->kernels, p->matrices[i]);
        if (n_bytes && start + n_bytes > first) {
            const size_t from = first > start ? first - start : 0;
            pack_part(run, p->matrices[i], from, smaller(end - start, n_bytes), p->memory + start, buffer);
        }
        start += n_bytes;
    }
}

static void pack_jobs(void *context, int thread) {
    pack_run *run = context;
    const phi_packing *p = run->packing;
    uint8_t *buffer = run->buffers ? run->buffers + (size_t)thread * run->buffer_bytes : NULL;
    for (int i; !atomic_load(&run->stop) && (i = atomic_fetch_add(&run->next, 1)) < run->n_jobs;) {
        pack_job(run, (size_t)i * JOB_BYTES, ((size_t)i + 1) * JOB_BYTES, buffer);
        if (thread == 0 && p->poll && p->poll(p->poll_context)) atomic_store(&run->stop, true);
    }
}

size_t phi_packed_bytes(const phi_kernels *kernels, const phi_matrix *matrix) {
    if (!kernels->pack[matrix->type]) return 0;
    if (matrix->n_rows % PHI_PANEL_ROWS != 0 || matrix->row_unit % PHI_PANEL_ROWS != 0) return 0;
    return (size_t)matrix->n_rows * phi_row_bytes(matrix->type, (size_t)matrix->n_cols);
}

phi_status phi_pack(const phi_packing *p) {
    pack_run run = {.packing = p, .buffer_bytes = READ_BYTES};
    size_t n_bytes = 0;
    for (int i = 0; i < p->n_matrices; i++) {
        if (phi_packed_bytes(p->kernels, p->matrices[i]) == 0) continue;
        n_bytes += phi_packed_bytes(p->kernels, p->matrices[i]);
        if (panel_bytes(p->matrices[i]) > run.buffer_bytes) run.buffer_bytes = panel_bytes(p->matrices[i]);
    }
    run.n_jobs = (int)((n_bytes + JOB_BYTES - 1) / JOB_BYTES);
    const size_t all_buffers = (size_t)phi_pool_size(p->pool) * run.buffer_bytes;
    if (p->source.data) run.buffers = phi_map(all_buffers);
    const phi_status status = phi_pool_run(p->pool, pack_jobs, &run);
    if (run.buffers) phi_unmap(run.buffers, all_buffers);
    if (status != PHI_OK) return status;
    if (atomic_load(&run.stop)) return PHI_CANCELLED;
    phi_use_packed(p->kernels, p->matrices, p->n_matrices, p->memory);
    return PHI_OK;
}

void phi_use_packed(const phi_kernels *kernels, phi_matrix *const *matrices, int n_matrices, const uint8_t *memory) {
    for (int i = 0; i < n_matrices; i++) {
        const size_t n_bytes = phi_packed_bytes(kernels, matrices[i]);
        if (n_bytes == 0) continue;
        matrices[i]->layout = PHI_LAYOUT_PANELS;
        matrices[i]->data = memory;
        memory += n_bytes;
    }
}
