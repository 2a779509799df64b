/* A fuzzer's input: a few bytes that choose sizes and options, then bytes that fill the buffers. */
#ifndef PHI_FUZZ_INPUT_H
#define PHI_FUZZ_INPUT_H

#include "check.h"

typedef struct {
    const uint8_t *bytes;
    size_t n_bytes, at; /* at: offset of the next byte */
} input;

/* libFuzzer's entry point, defined by each target. */
int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n_bytes);

/* The next byte, reduced to low .. high; low at the end of the input. */
int pick(input *in, int low, int high);
/* Copies the next n bytes to out. At the end of the input it continues at offset first, so that short inputs fill whole
 * matrices too. */
void fill(input *in, size_t first, size_t n, void *out);

#endif
