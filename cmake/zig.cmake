# Cross-compiles with zig (ziglang on PyPI) for PHI_ZIG_TARGET, such as aarch64-linux-gnu.2.17, x86_64-windows-gnu.
# PHI_ZIG is the program. Flags of the kernels come from CMakeLists.txt, as for every compiler.
set(PHI_ZIG zig CACHE FILEPATH "The zig program")
set(PHI_ZIG_TARGET "" CACHE STRING "Architecture, system and C library, as zig calls them")
list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES PHI_ZIG PHI_ZIG_TARGET)
string(REGEX MATCH "^[^-]+" CMAKE_SYSTEM_PROCESSOR "${PHI_ZIG_TARGET}")
if(PHI_ZIG_TARGET MATCHES "windows")
  set(CMAKE_SYSTEM_NAME Windows)
elseif(PHI_ZIG_TARGET MATCHES "macos")
  set(CMAKE_SYSTEM_NAME Darwin)
else()
  set(CMAKE_SYSTEM_NAME Linux)
endif()
# zig knows CPUs, not architectures; on macOS "generic" lacks what it takes for granted there.
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
set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY) # nothing is linked: zig would build a C library first
if(CMAKE_SYSTEM_PROCESSOR STREQUAL "x86_64")
  set(CMAKE_C_FLAGS_INIT -mevex512) # clang's -mavx512f means this too, zig's does not
endif()
set(CMAKE_MODULE_LINKER_FLAGS_INIT -s) # the host's strip knows the host's files only
