/* Runs a fuzzer's function on the files named: what was found once stays found, under every compiler and sanitizer. */
#include <stdio.h>

#include "check.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes);

int main(int n_arguments, char **arguments) {
    static uint8_t data[1 << 16];
    CHECK(n_arguments > 1, "no files");
    for (int i = 1; i < n_arguments; i++) {
        FILE *file = fopen(arguments[i], "rb");
        CHECK(file, "%s cannot be read", arguments[i]);
        const size_t n_bytes = fread(data, 1, sizeof data, file);
        fclose(file);
        CHECK(n_bytes > 0 && n_bytes < sizeof data, "%s has %zu bytes", arguments[i], n_bytes);
        CHECK(LLVMFuzzerTestOneInput(data, n_bytes) == 0, "%s is refused", arguments[i]);
    }
    printf("ok  %d inputs  %zu checks\n", n_arguments - 1, n_checks);
    return 0;
}
