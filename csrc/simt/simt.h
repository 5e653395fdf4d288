// What kernels for GPUs are written in: a few functions that nvcc turns into instructions and that any other compiler
// turns into an emulation of one block of threads after the other, so that the very same kernels run on a machine
// without a GPU (see simt_host.h).
//
// Both say, in namespace biomedgpt::simt:
//   thread(), lane(), warp(), block_x(), block_y(), block_z()   where a thread is
//   sync_block(), sync_warp()                                   barriers, which order memory as well
//   shared()                                                    the block's memory, aligned to 16 bytes
//   shuffle_xor(value, mask)                                    the value of the lane whose number differs in `mask`
//   mma(c, a, b)                                                c += a b on tensor cores; fragments as PTX has them for
//                                                               mma.m16n8k16 of halves with sums of float32
//   load_transposed(registers, row)                             ldmatrix.x4.trans
//   copy_async(to, from), commit_copies(), wait_copies<N>()     16 bytes into shared memory behind the threads' back
//   copy_async(to, from, there)                                 the same, zeros where nothing is there
//   and_or<mask, bits>(value)                                   value & mask | bits
//   wait_for_inputs(), let_next_start()                         programmatic dependent launch: what earlier kernels
//                                                               write may be touched only behind the first
//   fetch_add(counter, value), fence()                          between blocks
//   half pairs as uint32_t: see below
#pragma once

#include <cstddef>
#include <cstdint>

// Kernels, and all that is compiled once for GPUs and once for the emulation, stand in one of these.
#if defined(__CUDACC__)
#define BIOMEDGPT_SIMT on_cuda
#define BIOMEDGPT_DEVICE __device__ __forceinline__
#define BIOMEDGPT_ANYWHERE __host__ __device__ __forceinline__
#else
#define BIOMEDGPT_SIMT on_host
#define BIOMEDGPT_DEVICE inline
#define BIOMEDGPT_ANYWHERE inline
#endif

namespace biomedgpt {

constexpr int kWarpSize = 32;

// Sixteen bytes, which memory moves at a time.
struct alignas(16) Quad {
    uint32_t words[4];
};

// Eight, such as four halves.
struct alignas(8) Pair {
    uint32_t words[2];
};

}  // namespace biomedgpt

#if defined(__CUDACC__)
#include "simt/simt_cuda.h"
#else
#include "simt/simt_host.h"
#endif
