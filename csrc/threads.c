#define _DEFAULT_SOURCE /* sigset_t, pthread_sigmask */
/* A waiting thread first spins for tens of microseconds, which covers most phases of a forward pass, then sleeps, so
 * that it does not occupy a core of an idle or oversubscribed machine. */
#include "threads.h"

#include <stdlib.h>

#ifdef _WIN32
#include <windows.h>
typedef HANDLE thread_handle;
typedef SRWLOCK lock_t;
typedef CONDITION_VARIABLE condition_t;
#define lock_init(l) InitializeSRWLock(l)
#define lock_acquire(l) AcquireSRWLockExclusive(l)
#define lock_release(l) ReleaseSRWLockExclusive(l)
#define condition_init(c) InitializeConditionVariable(c)
#define condition_wait(c, l) SleepConditionVariableSRW(c, l, INFINITE, 0)
#define condition_wake_all(c) WakeAllConditionVariable(c)
#else
#include <pthread.h>
#include <signal.h>
#include <unistd.h>
typedef pthread_t thread_handle;
typedef pthread_mutex_t lock_t;
typedef pthread_cond_t condition_t;
#define lock_init(l) pthread_mutex_init(l, NULL)
#define lock_acquire(l) pthread_mutex_lock(l)
#define lock_release(l) pthread_mutex_unlock(l)
#define condition_init(c) pthread_cond_init(c, NULL)
#define condition_wait(c, l) pthread_cond_wait(c, l)
#define condition_wake_all(c) pthread_cond_broadcast(c)
#endif

typedef struct {
    phi_pool *pool;
    int thread;
} worker_argument;

struct phi_pool {
    int n_threads;
    thread_handle *workers;     /* [n_threads - 1] */
    worker_argument *arguments; /* [n_threads - 1] */
    phi_task task;
    void *context;
    bool stop;
    atomic_uint run;     /* number of runs started */
    atomic_uint barrier; /* number of barriers passed */
    atomic_int arrived;  /* threads waiting at the current barrier */
    atomic_int sleepers;
    atomic_int spins;
    lock_t lock;
    condition_t wake;
#ifndef _WIN32
    pid_t process; /* the process that the workers belong to */
#endif
};

static inline void cpu_pause(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__) && defined(__GNUC__)
    __asm__ volatile("yield");
#endif
}

/* Waits until the counter differs from `seen`. */
static void wait_for_change(phi_pool *pool, atomic_uint *counter, unsigned seen) {
    for (int i = atomic_load_explicit(&pool->spins, memory_order_relaxed); i > 0; i--) {
        if (atomic_load(counter) != seen) return;
        cpu_pause();
    }
    lock_acquire(&pool->lock);
    /* Before the counter is read again: either advance() sees the sleeper, or the sleeper sees the new count. */
    atomic_fetch_add(&pool->sleepers, 1);
    while (atomic_load(counter) == seen) condition_wait(&pool->wake, &pool->lock);
    atomic_fetch_sub(&pool->sleepers, 1);
    lock_release(&pool->lock);
}

/* Increments a counter and wakes its waiters. */
static void advance(phi_pool *pool, atomic_uint *counter) {
    atomic_fetch_add(counter, 1);
    if (atomic_load(&pool->sleepers) > 0) {
        lock_acquire(&pool->lock);
        condition_wake_all(&pool->wake);
        lock_release(&pool->lock);
    }
}

void phi_pool_barrier(phi_pool *pool) {
    const unsigned seen = atomic_load(&pool->barrier);
    if (atomic_fetch_add(&pool->arrived, 1) + 1 == pool->n_threads) {
        atomic_store(&pool->arrived, 0);
        advance(pool, &pool->barrier);
    } else {
        wait_for_change(pool, &pool->barrier, seen);
    }
}

static void work(worker_argument *argument) {
    phi_pool *pool = argument->pool;
    for (unsigned seen = 0;; seen++) {
        wait_for_change(pool, &pool->run, seen);
        if (pool->stop) return;
        pool->task(pool->context, argument->thread);
        phi_pool_barrier(pool);
    }
}

#ifdef _WIN32
static DWORD WINAPI thread_main(void *argument) {
    work(argument);
    return 0;
}
static bool thread_start(thread_handle *handle, worker_argument *argument) {
    *handle = CreateThread(NULL, 0, thread_main, argument, 0, NULL);
    return *handle != NULL;
}
static void thread_join(thread_handle handle) {
    WaitForSingleObject(handle, INFINITE);
    CloseHandle(handle);
}
#else
static void *thread_main(void *argument) {
    work(argument);
    return NULL;
}
static bool thread_start(thread_handle *handle, worker_argument *argument) {
    /* Workers block all signals, so that Ctrl-C interrupts Python's main thread. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    const bool started = pthread_create(handle, NULL, thread_main, argument) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return started;
}
static void thread_join(thread_handle handle) { pthread_join(handle, NULL); }
#endif

static void stop_workers(phi_pool *pool, int n_started) {
    pool->stop = true;
    advance(pool, &pool->run);
    for (int i = 0; i < n_started; i++) thread_join(pool->workers[i]);
    pool->stop = false;
}

static phi_status start_workers(phi_pool *pool) {
    lock_init(&pool->lock);
    condition_init(&pool->wake);
    atomic_store(&pool->run, 0);
    atomic_store(&pool->barrier, 0);
    atomic_store(&pool->arrived, 0);
    atomic_store(&pool->sleepers, 0);
    pool->stop = false;
    for (int i = 0; i < pool->n_threads - 1; i++) {
        pool->arguments[i] = (worker_argument){pool, i + 1};
        if (!thread_start(&pool->workers[i], &pool->arguments[i])) {
            stop_workers(pool, i);
            return PHI_NO_THREADS;
        }
    }
#ifndef _WIN32
    pool->process = getpid(); /* only now: a pool whose workers did not start has none, and a later run tries again */
#endif
    return PHI_OK;
}

phi_status phi_pool_create(int n_threads, phi_pool **pool) {
    phi_pool *p = calloc(1, sizeof *p);
    if (!p) return PHI_OUT_OF_MEMORY;
    p->n_threads = n_threads;
    phi_pool_set_spins(p, PHI_DEFAULT_SPINS);
    p->workers = calloc((size_t)n_threads, sizeof *p->workers);
    p->arguments = calloc((size_t)n_threads, sizeof *p->arguments);
    const phi_status status = p->workers && p->arguments ? start_workers(p) : PHI_OUT_OF_MEMORY;
    if (status != PHI_OK) {
        free(p->workers);
        free(p->arguments);
        free(p);
        return status;
    }
    *pool = p;
    return PHI_OK;
}

static bool is_own_process(const phi_pool *pool) {
#ifdef _WIN32
    (void)pool;
    return true;
#else
    return pool->process == getpid();
#endif
}

void phi_pool_free(phi_pool *pool) {
    if (!pool) return;
    if (is_own_process(pool)) stop_workers(pool, pool->n_threads - 1);
    free(pool->workers);
    free(pool->arguments);
    free(pool);
}

void phi_pool_set_spins(phi_pool *pool, int spins) { atomic_store_explicit(&pool->spins, spins, memory_order_relaxed); }

int phi_pool_size(const phi_pool *pool) { return pool->n_threads; }

phi_status phi_pool_run(phi_pool *pool, phi_task task, void *context) {
    if (!is_own_process(pool)) {
        const phi_status status = start_workers(pool);
        if (status != PHI_OK) return status;
    }
    pool->task = task;
    pool->context = context;
    if (pool->n_threads > 1) advance(pool, &pool->run);
    task(context, 0);
    phi_pool_barrier(pool);
    return PHI_OK;
}
