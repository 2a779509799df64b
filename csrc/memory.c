#define _DEFAULT_SOURCE /* MAP_ANONYMOUS, madvise */
#include "memory.h"

#ifdef _WIN32
#include <windows.h>

void *phi_map(size_t n_bytes) { return VirtualAlloc(NULL, n_bytes, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE); }
void phi_unmap(void *memory, size_t n_bytes) {
    (void)n_bytes;
    VirtualFree(memory, 0, MEM_RELEASE);
}
#else
#include <sys/mman.h>

void *phi_map(size_t n_bytes) {
    void *memory = mmap(NULL, n_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return NULL;
#ifdef MADV_HUGEPAGE
    madvise(memory, n_bytes, MADV_HUGEPAGE); /* may fail: it affects speed only */
#endif
    return memory;
}
void phi_unmap(void *memory, size_t n_bytes) { munmap(memory, n_bytes); }
#endif

uint64_t phi_read(const void *memory, size_t n_bytes, size_t prefetch_bytes) {
    const uint64_t *words = memory;
    uint64_t bits[8] = {0};
    for (size_t i = 0; i < n_bytes / sizeof *words; i += 8) {
#if defined(__GNUC__)
        if (prefetch_bytes) __builtin_prefetch((const char *)(words + i) + prefetch_bytes);
#endif
        for (int k = 0; k < 8; k++) bits[k] ^= words[i + (size_t)k];
    }
    uint64_t all = 0;
    for (int k = 0; k < 8; k++) all ^= bits[k];
    return all;
}
