// Included before every source of llama.cpp where GCC 12 compiles it for a processor with AMX:
//     CMAKE_ARGS="-DCMAKE_CXX_FLAGS='-include $PWD/benchmarks/llama_cpp_amx.h'" pip install ... llama-cpp-python
// That compiler's _tile_loadconfig says that it reads 8 bytes of the 64 that the instruction reads. The compiler leaves
// out what llama.cpp stores in the others, and the first prefill ends with a segmentation fault.
#if defined(__GNUC__) && !defined(__clang__) && defined(__AMX_TILE__)
#include <immintrin.h>
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg\t%0" : : "m"(*(const char (*)[64])(config)))
#endif
