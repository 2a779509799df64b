/* Runs a fuzz target on files, without libFuzzer: replay_TARGET FILE... */
#include <stdio.h>
#include <stdlib.h>

#include "input.h"

int main(int n_arguments, char **arguments) {
    static uint8_t bytes[1 << 16];
    for (int i = 1; i < n_arguments; i++) {
        FILE *file = fopen(arguments[i], "rb");
        if (!file) fail_at(__FILE__, __LINE__, "cannot open %s", arguments[i]);
        const size_t n_bytes = fread(bytes, 1, sizeof bytes, file);
        fclose(file);
        printf("%s\n", arguments[i]);
        fflush(stdout);
        uint8_t *exact = memory(n_bytes); /* of exact size, for the sanitizers */
        for (size_t k = 0; k < n_bytes; k++) exact[k] = bytes[k];
        LLVMFuzzerTestOneInput(exact, n_bytes);
        free(exact);
    }
    CHECK(n_arguments > 1, "usage: replay_TARGET FILE...");
    return 0;
}
