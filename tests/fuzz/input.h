/* A fuzzer's input: a few bytes that choose sizes, then bytes that fill whatever has to be filled. */
#ifndef PHI_FUZZ_INPUT_H
#define PHI_FUZZ_INPUT_H

#include "check.h"

typedef struct {
    const uint8_t *bytes;
    size_t n_bytes, at;
} input;

/* libFuzzer's entry, which each target defines. */
int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n_bytes);

/* The next byte as a number from low to high; low where no byte is left. */
int pick(input *in, int low, int high);
/* The next n bytes. An input that ends begins anew behind the `pick`ed bytes, so that short ones fill matrices too. */
void fill(input *in, size_t first, size_t n, void *out);

#endif
