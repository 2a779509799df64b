/* Large buffers from the operating system. Memory is committed as pages are first accessed. */
#ifndef PHI_MEMORY_H
#define PHI_MEMORY_H

#include <stddef.h>
#include <stdint.h>

/* Returns zeroed memory, aligned to at least 64 bytes; NULL if the system has none. */
void *phi_map(size_t n_bytes);
void phi_unmap(void *memory, size_t n_bytes);

/* Reads n_bytes, a multiple of 64, and returns their exclusive or in 64-bit words. prefetch_bytes: software prefetch
 * distance; 0: none. */
uint64_t phi_read(const void *memory, size_t n_bytes, size_t prefetch_bytes);

#endif
