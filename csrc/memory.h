/* Large zeroed memory straight from the system: pages cost nothing until they are touched. */
#ifndef PHI_MEMORY_H
#define PHI_MEMORY_H

#include <stddef.h>

/* NULL when the system refuses. Aligned to 64 bytes at the least. */
void *phi_map(size_t n_bytes);
void phi_unmap(void *memory, size_t n_bytes);

#endif
