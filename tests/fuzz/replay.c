/* Runs files through a fuzzer's target, without a fuzzer: replay_TARGET FILE... */
#include <stdio.h>
#include <stdlib.h>

#include "input.h"

int main(int n_arguments, char **arguments) {
    static uint8_t bytes[1 << 16];
    for (int i = 1; i < n_arguments; i++) {
        FILE *file = fopen(arguments[i], "rb");
        if (!file) fail_at(__FILE__, __LINE__, "%s cannot be opened", arguments[i]);
        const size_t n_bytes = fread(bytes, 1, sizeof bytes, file);
        fclose(file);
        printf("%s\n", arguments[i]);
        fflush(stdout);
        uint8_t *exact = memory(n_bytes); /* so that a sanitizer sees its end */
        for (size_t k = 0; k < n_bytes; k++) exact[k] = bytes[k];
        LLVMFuzzerTestOneInput(exact, n_bytes);
        free(exact);
    }
    CHECK(n_arguments > 1, "there are no files");
    return 0;
}
