# Cross-compiles for aarch64 Linux with Debian's gcc-aarch64-linux-gnu. Tests run under qemu-user, on the emulated CPU
# PHI_QEMU_CPU.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
set(CMAKE_EXE_LINKER_FLAGS_INIT -static)
set(PHI_QEMU_CPU max CACHE STRING "CPU that qemu-aarch64 emulates: its option -cpu")
set(CMAKE_CROSSCOMPILING_EMULATOR "qemu-aarch64;-cpu;${PHI_QEMU_CPU}")
