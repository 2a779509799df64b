#include "input.h"

int pick(input *in, int low, int high) {
    const int byte = in->at < in->n_bytes ? in->bytes[in->at++] : 0;
    return low + byte % (high - low + 1);
}

void fill(input *in, size_t first, size_t n, void *out) {
    for (size_t i = 0; i < n; i++) {
        if (in->at >= in->n_bytes) in->at = first;
        ((uint8_t *)out)[i] = in->at < in->n_bytes ? in->bytes[in->at++] : 0;
    }
}
