/* A pool of threads that run one task together and meet at barriers; POSIX and Win32. */
#ifndef PHI_THREADS_H
#define PHI_THREADS_H

#include "phi.h"

typedef void (*phi_task)(void *context, int thread);

int phi_pool_size(const phi_pool *pool);
/* Runs the task on every thread (the caller is thread 0) and returns when all are through. After a fork the workers
 * are started anew. One run at a time. */
phi_status phi_pool_run(phi_pool *pool, phi_task task, void *context);
/* Every thread of a run waits here for the others. */
void phi_pool_barrier(phi_pool *pool);

#endif
