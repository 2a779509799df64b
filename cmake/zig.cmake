# Cross-compiles with zig's clang (ziglang on PyPI). PHI_ZIG: path of the program. PHI_ZIG_TARGET: for example
# aarch64-linux-gnu.2.17 or x86_64-windows-gnu. CMakeLists.txt sets the flags of the kernels, as for every compiler.
set(PHI_ZIG zig CACHE FILEPATH "Path of the zig program")
set(PHI_ZIG_TARGET "" CACHE STRING "zig target triple: architecture-system-libc")
list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES PHI_ZIG PHI_ZIG_TARGET)
string(REGEX MATCH "^[^-]+" CMAKE_SYSTEM_PROCESSOR "${PHI_ZIG_TARGET}")
if(PHI_ZIG_TARGET MATCHES "windows")
  set(CMAKE_SYSTEM_NAME Windows)
elseif(PHI_ZIG_TARGET MATCHES "macos")
  set(CMAKE_SYSTEM_NAME Darwin)
else()
  set(CMAKE_SYSTEM_NAME Linux)
endif()
# zig selects instruction sets by -mcpu, not -march. On macOS its "generic" CPU lacks features that the target requires.
if(CMAKE_SYSTEM_NAME STREQUAL "Darwin")
  set(PHI_DOTPROD_FLAGS -mcpu=apple_m1 CACHE STRING "")
  set(PHI_I8MM_FLAGS -mcpu=apple_m2 CACHE STRING "")
else()
  set(PHI_DOTPROD_FLAGS -mcpu=generic+dotprod CACHE STRING "")
  set(PHI_I8MM_FLAGS -mcpu=generic+dotprod+i8mm CACHE STRING "")
endif()
set(CMAKE_C_COMPILER "${PHI_ZIG}" cc -target "${PHI_ZIG_TARGET}")
set(CMAKE_C_ARCHIVE_CREATE "\"${PHI_ZIG}\" ar qc <TARGET> <LINK_FLAGS> <OBJECTS>")
set(CMAKE_C_ARCHIVE_FINISH "\"${PHI_ZIG}\" ranlib <TARGET>")
set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY) # do not link: zig would first build a C library
if(CMAKE_SYSTEM_PROCESSOR STREQUAL "x86_64")
  set(CMAKE_C_FLAGS_INIT -mevex512) # implied by -mavx512f in clang, not in zig
endif()
set(CMAKE_MODULE_LINKER_FLAGS_INIT -s) # the linker strips: the host's strip cannot read files of other platforms
