/* UNROLL: before a loop whose trip count is a constant once its function is inlined. PHI_INLINE: forces inlining.
 * RELOAD: a compiler may not reuse what it loaded before. Without it, gcc keeps values in registers that a load would
 * give again, and spills others. */
#ifndef PHI_GENERIC_UNROLL_H
#define PHI_GENERIC_UNROLL_H

#if defined(__clang__)
/* Not a count: clang would unroll nested loops by it before inlining, and compile for an hour. */
#define UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define UNROLL _Pragma("GCC unroll 16")
#else
#define UNROLL
#endif

#ifdef __GNUC__
#define RELOAD() __asm__ volatile("" ::: "memory")
#else
#define RELOAD() (void)0
#endif

#ifdef _MSC_VER
#define PHI_INLINE static __forceinline
#else
#define PHI_INLINE static inline __attribute__((always_inline))
#endif

#endif
