#define _POSIX_C_SOURCE 199309L /* clock_gettime */
/* Clock and memory bandwidth. */
#include "phi.h"

#include "memory.h"
#include "threads.h"

#include <string.h>

#ifdef _WIN32
#include <windows.h>
#else
#include <time.h>
#endif

typedef struct {
    const uint64_t *words;
    size_t n_words;
    int n_threads;
    size_t prefetch_bytes;
    atomic_ullong sink; /* uses what was read, so that compilers keep the reads */
} bandwidth_run;

#ifdef _WIN32
double phi_seconds(void) {
    LARGE_INTEGER ticks, ticks_per_second;
    QueryPerformanceCounter(&ticks);
    QueryPerformanceFrequency(&ticks_per_second);
    return (double)ticks.QuadPart / (double)ticks_per_second.QuadPart;
}
#else
double phi_seconds(void) {
    struct timespec t;
#ifdef CLOCK_MONOTONIC
    clock_gettime(CLOCK_MONOTONIC, &t);
#else
    timespec_get(&t, TIME_UTC);
#endif
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}
#endif

static void read_part(void *context, int thread) {
    bandwidth_run *r = context;
    const size_t part = r->n_words / (size_t)r->n_threads / 8 * 8;
    const uint64_t *w = r->words + part * (size_t)thread;
    atomic_fetch_xor(&r->sink, phi_read(w, part * sizeof *w, r->prefetch_bytes));
}

double phi_read_bandwidth(phi_pool *pool, size_t n_bytes, int n_runs) {
    uint64_t *words = phi_map(n_bytes);
    if (!words) return 0.0;
    memset(words, 1, n_bytes);
    bandwidth_run r = {.words = words, .n_words = n_bytes / sizeof *words, .n_threads = phi_pool_size(pool)};
    double best = 0.0;
    for (int i = 0; i < 2 * n_runs; i++) {
        /* With and without prefetch, since hardware prefetchers stop at page borders on some CPUs, and on others follow
         * a stream better if software does not interfere. */
        r.prefetch_bytes = i % 2 ? 4096 : 0;
        const double start = phi_seconds();
        if (phi_pool_run(pool, read_part, &r) != PHI_OK) break;
        const double rate = (double)n_bytes / (phi_seconds() - start);
        if (rate > best) best = rate;
    }
    phi_unmap(words, n_bytes);
    return best;
}
