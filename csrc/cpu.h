/* Detection of instruction sets: those that the CPU has and the operating system enables. */
#ifndef PHI_CPU_H
#define PHI_CPU_H

#include <stdbool.h>

typedef struct {
    bool avx2, fma, f16c, avxvnni;
    bool avx512f, avx512bw, avx512vl, avx512dq, avx512vnni, avx512vbmi, avx512bf16;
    bool amx_tile, amx_int8, amx_bf16;
    bool neon, dotprod, i8mm, fp16; /* fp16: half-precision arithmetic, which no kernel uses */
} phi_cpu;

/* The machine's features, detected once. */
const phi_cpu *phi_cpu_detect(void);
/* Requests permission to use AMX tile registers from the operating system; returns whether it was granted. The first
 * answer holds for the process. */
bool phi_cpu_request_tiles(void);

#endif
