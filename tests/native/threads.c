/* The thread pool: every thread runs the task once, barriers order writes and reads, and workers survive sleeping, many
 * runs and a fork. The tasks of a phase: each runs once, whichever thread claims it. Run under TSan to detect races. */
#include "threads.h"

#include <stdlib.h>

#include "check.h"
#include "pass.h"

#if defined(__SANITIZE_THREAD__)
#define UNDER_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define UNDER_TSAN 1
#endif
#endif
#if !defined(_WIN32) && !defined(UNDER_TSAN) /* TSan does not support threads started after a fork */
#define TEST_FORK 1
#include <sys/resource.h>
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

enum { MAX_TASKS = 40, N_TASK_PHASES = 7 };

typedef struct {
    forward_pass f;
    int n_tasks;
    bool only_thread_0;                        /* claims tasks: it must find those of all ranges */
    int n_run[N_TASK_PHASES][MAX_TASKS];       /* how often each task ran */
    int claimed[MAX_THREADS][MAX_TASKS];       /* the tasks of each thread in the last phase, in order */
    int n_claimed[MAX_THREADS][N_TASK_PHASES]; /* their number */
} task_state;

static void run_tasks(void *context, int thread) {
    task_state *s = context;
    worker w = {.f = &s->f, .thread = thread};
    for (int phase = 0; phase < N_TASK_PHASES; phase++) {
        int n = 0;
        if (!s->only_thread_0 || thread == 0) {
            FOR_EACH_TASK(&w, task, s->n_tasks) {
                s->n_run[phase][task]++; /* a task that two threads claim is a race, too */
                s->claimed[thread][n++] = task;
            }
        }
        s->n_claimed[thread][phase] = n;
        end_phase(&w, PHI_PHASE_QKV);
    }
}

static void check_tasks(phi_pool *pool, int n_threads, int n_tasks, bool only_thread_0) {
    const phi_model model = {.pool = pool};
    task_range ranges[3 * MAX_THREADS];
    task_state s = {.f = {.model = &model, .ranges = ranges}, .n_tasks = n_tasks, .only_thread_0 = only_thread_0};
    for (int i = 0; i < 3 * n_threads; i++) atomic_init(&ranges[i].n_claimed, 0);
    CHECK(phi_pool_run(pool, run_tasks, &s) == PHI_OK, "phi_pool_run failed");
    for (int phase = 0; phase < N_TASK_PHASES; phase++) {
        for (int task = 0; task < n_tasks; task++)
            CHECK(s.n_run[phase][task] == 1, "%d threads ran task %d of %d %d times in phase %d", n_threads, task,
                  n_tasks, s.n_run[phase][task], phase);
    }
    if (!only_thread_0) return;
    CHECK(s.n_claimed[0][N_TASK_PHASES - 1] == n_tasks, "a thread alone ran not all of %d tasks", n_tasks);
    for (int i = 0; i < n_tasks; i++)
        CHECK(s.claimed[0][i] == i, "a thread alone ran task %d of %d as number %d", s.claimed[0][i], n_tasks, i);
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
        for (int n_tasks = 0; n_tasks <= MAX_TASKS; n_tasks++) {
            check_tasks(pool, sizes[i], n_tasks, false);
            check_tasks(pool, sizes[i], n_tasks, true);
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

#if defined(TEST_FORK) && defined(__linux__)
enum { OTHER_USER = 54321 }; /* root may start threads beyond the limit */

/* Sets the number of processes and threads that the user may have. False if it cannot be set. */
static bool limit_processes(rlim_t n) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_NPROC, &limit) != 0) return false;
    limit.rlim_cur = n < limit.rlim_max ? n : limit.rlim_max;
    return setrlimit(RLIMIT_NPROC, &limit) == 0;
}

/* A forked child that may not start threads: every run fails with PHI_NO_THREADS, and one succeeds once threads may be
 * started. */
static void test_fork_without_threads(void) {
    phi_pool *pool;
    int status;
    CHECK(phi_pool_create(MAX_THREADS, &pool) == PHI_OK, "phi_pool_create failed");
    const pid_t child = fork();
    CHECK(child >= 0, "fork failed");
    if (child == 0) {
        shared_state s = {.pool = pool, .n_threads = MAX_THREADS};
        CHECK(getuid() != 0 || setuid(OTHER_USER) == 0, "setuid failed");
        CHECK(limit_processes(0), "setrlimit failed");
        for (int i = 0; i < 3; i++) {
            const phi_status found = phi_pool_run(pool, run_phases, &s);
            CHECK(found == PHI_NO_THREADS, "run %d without workers returned %d", i, (int)found);
            CHECK(atomic_load(&s.n_tasks) == 0, "a task ran without workers");
        }
        CHECK(limit_processes(RLIM_INFINITY), "setrlimit failed");
        check_run(pool, MAX_THREADS);
        phi_pool_free(pool);
        _exit(0);
    }
    CHECK(waitpid(child, &status, 0) == child && status == 0, "a child that may not start threads failed");
    phi_pool_free(pool);
}
#endif

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
#ifdef __linux__
    test_fork_without_threads();
#endif
#endif
}
