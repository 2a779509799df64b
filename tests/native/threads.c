/* The thread pool: every thread runs the task once, barriers order writes and reads, and workers survive sleeping, many
 * runs and a fork. Run under TSan to detect races. */
#include "threads.h"

#include <stdlib.h>

#include "check.h"

#if defined(__SANITIZE_THREAD__)
#define UNDER_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define UNDER_TSAN 1
#endif
#endif
#if !defined(_WIN32) && !defined(UNDER_TSAN) /* TSan does not support threads started after a fork */
#define TEST_FORK 1
#include <sys/wait.h>
#include <unistd.h>
#endif

enum { MAX_THREADS = 5, N_RUNS = 2000, N_PHASES = 3 };

typedef struct {
    phi_pool *pool;
    int n_threads;
    int written[MAX_THREADS]; /* the phase of each thread: written before a barrier, read by all after it */
    int wrong[MAX_THREADS];   /* number of wrong phases that each thread read */
    atomic_int n_tasks;
} shared_state;

static void run_phases(void *context, int thread) {
    shared_state *s = context;
    atomic_fetch_add(&s->n_tasks, 1);
    for (int phase = 1; phase <= N_PHASES; phase++) {
        s->written[thread] = phase;
        phi_pool_barrier(s->pool);
        for (int i = 0; i < s->n_threads; i++) s->wrong[thread] += s->written[i] != phase;
        phi_pool_barrier(s->pool);
    }
}

static void check_run(phi_pool *pool, int n_threads) {
    shared_state s = {.pool = pool, .n_threads = n_threads};
    CHECK(phi_pool_run(pool, run_phases, &s) == PHI_OK, "phi_pool_run failed with %d threads", n_threads);
    CHECK(atomic_load(&s.n_tasks) == n_threads, "a pool of %d threads ran the task %d times", n_threads,
          atomic_load(&s.n_tasks));
    for (int i = 0; i < n_threads; i++)
        CHECK(s.wrong[i] == 0, "thread %d of %d passed a barrier too early", i, n_threads);
}

/* Longer than waiting threads spin. */
static void sleep_2_ms(void) {
    const double end = phi_seconds() + 0.002;
    while (phi_seconds() < end) continue;
}

void test_threads(const phi_kernels *k) {
    const int sizes[] = {1, 2, MAX_THREADS};
    (void)k;
    for (int i = 0; i < 3; i++) {
        phi_pool *pool;
        CHECK(phi_pool_create(sizes[i], &pool) == PHI_OK, "phi_pool_create failed with %d threads", sizes[i]);
        CHECK(phi_pool_size(pool) == sizes[i], "a pool of %d threads has size %d", sizes[i], phi_pool_size(pool));
        for (int run = 0; run < N_RUNS; run++) {
            check_run(pool, sizes[i]);
            if (run % 500 == 0) sleep_2_ms();
        }
        phi_pool_free(pool);
    }
    for (int i = 0; i < 50; i++) { /* freed before its workers have started, or right after a run */
        phi_pool *pool;
        CHECK(phi_pool_create(MAX_THREADS, &pool) == PHI_OK, "phi_pool_create failed");
        if (i % 2) check_run(pool, MAX_THREADS);
        phi_pool_free(pool);
    }
}

/* A forked child has none of the workers and starts its own. */
void test_fork(const phi_kernels *k) {
    (void)k;
#ifdef TEST_FORK
    for (int n_threads = 1; n_threads <= MAX_THREADS; n_threads++) {
        phi_pool *pool;
        int status;
        CHECK(phi_pool_create(n_threads, &pool) == PHI_OK, "phi_pool_create failed with %d threads", n_threads);
        check_run(pool, n_threads);
        const pid_t child = fork();
        CHECK(child >= 0, "fork failed");
        if (child == 0) {
            check_run(pool, n_threads);
            _exit(0);
        }
        CHECK(waitpid(child, &status, 0) == child && status == 0, "a pool of %d threads failed in a forked child",
              n_threads);
        check_run(pool, n_threads);
        phi_pool_free(pool);
    }
#endif
}
