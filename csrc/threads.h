/* A thread pool whose threads run one task together, synchronised by barriers; POSIX and Win32. */
#ifndef PHI_THREADS_H
#define PHI_THREADS_H

#include "phi.h"

enum { PHI_DEFAULT_SPINS = 2000 }; /* of 40 to 140 cycles each (the pause instruction): 20 to 80 microseconds */

typedef void (*phi_task)(void *context, int thread);

/* Number of threads, the caller of phi_pool_run included. */
int phi_pool_size(const phi_pool *pool);
/* Runs the task once on every thread (the caller is thread 0) and returns when all have finished. In a forked child it
 * first starts new workers; PHI_NO_THREADS if that fails. Calls must not overlap. */
phi_status phi_pool_run(phi_pool *pool, phi_task task, void *context);
/* Waits until all threads of the pool have called it. To be called from a task, by every thread. */
void phi_pool_barrier(phi_pool *pool);

#endif
