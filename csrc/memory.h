/* Large buffers from the operating system. Memory is committed as pages are first accessed. */
#ifndef PHI_MEMORY_H
#define PHI_MEMORY_H

#include <stddef.h>

/* Returns zeroed memory, aligned to at least 64 bytes; NULL if the system has none. */
void *phi_map(size_t n_bytes);
void phi_unmap(void *memory, size_t n_bytes);

#endif
