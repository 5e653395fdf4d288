// simt.h for nvcc.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "simt/simt.h"

namespace biomedgpt {
inline namespace on_cuda {
namespace simt {

BIOMEDGPT_DEVICE int thread() {
    return static_cast<int>(threadIdx.x);
}

BIOMEDGPT_DEVICE int lane() {
    return static_cast<int>(threadIdx.x) % kWarpSize;
}

BIOMEDGPT_DEVICE int warp() {
    return static_cast<int>(threadIdx.x) / kWarpSize;
}

BIOMEDGPT_DEVICE int block_x() {
    return static_cast<int>(blockIdx.x);
}

BIOMEDGPT_DEVICE int block_y() {
    return static_cast<int>(blockIdx.y);
}

BIOMEDGPT_DEVICE int block_z() {
    return static_cast<int>(blockIdx.z);
}

BIOMEDGPT_DEVICE void sync_block() {
    __syncthreads();
}

BIOMEDGPT_DEVICE void sync_warp() {
    __syncwarp();
}

BIOMEDGPT_DEVICE char* shared() {
    extern __shared__ Quad biomedgpt_shared[];
    return reinterpret_cast<char*>(biomedgpt_shared);
}

BIOMEDGPT_DEVICE float shuffle_xor(float value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}

BIOMEDGPT_DEVICE int shuffle_xor(int value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}

BIOMEDGPT_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    // Turing multiplies eight columns at a time; the fragments of sixteen are those of twice eight.
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b[0]));
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[2]), "r"(a[3]), "r"(b[1]));
#endif
}

BIOMEDGPT_DEVICE uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

BIOMEDGPT_DEVICE void load_transposed(uint32_t (&to)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}

BIOMEDGPT_DEVICE void copy_async(void* to, const void* from, bool there = true) {
#if __CUDA_ARCH__ >= 800
    // Past the L1, whose lines are for what is read more than once.
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(there ? 16 : 0)
                 : "memory");
#else
    *static_cast<Quad*>(to) = there ? *static_cast<const Quad*>(from) : Quad{};
#endif
}

BIOMEDGPT_DEVICE void commit_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until all groups but the last N that were committed have arrived; those of this thread.
template <int N>
BIOMEDGPT_DEVICE void wait_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

BIOMEDGPT_DEVICE void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

BIOMEDGPT_DEVICE void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

BIOMEDGPT_DEVICE uint32_t fetch_add(uint32_t* counter, uint32_t value) {
    return atomicAdd(counter, value);
}

BIOMEDGPT_DEVICE void fence() {
    __threadfence();
}

// Halves in pairs, the first in the low sixteen bits; each operation rounds once.
BIOMEDGPT_DEVICE __half2 as_half2(uint32_t pair) {
    return *reinterpret_cast<const __half2*>(&pair);
}

BIOMEDGPT_DEVICE uint32_t bits_of(__half2 pair) {
    return *reinterpret_cast<const uint32_t*>(&pair);
}

// value & kMask | kBits, in one instruction, which compilers make two of.
template <uint32_t kMask, uint32_t kBits>
BIOMEDGPT_DEVICE uint32_t and_or(uint32_t value) {
    uint32_t result;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(value), "n"(kMask), "n"(kBits));
    return result;
}

BIOMEDGPT_DEVICE uint32_t half_pair_sub(uint32_t a, uint32_t b) {
    return bits_of(__hsub2(as_half2(a), as_half2(b)));
}

BIOMEDGPT_DEVICE uint32_t half_pair_fma(uint32_t a, uint32_t b, uint32_t c) {
    return bits_of(__hfma2(as_half2(a), as_half2(b), as_half2(c)));
}

BIOMEDGPT_DEVICE uint32_t half_pair(float low, float high) {
    return bits_of(__floats2half2_rn(low, high));
}

BIOMEDGPT_DEVICE float low_half(uint32_t pair) {
    return __low2float(as_half2(pair));
}

BIOMEDGPT_DEVICE float high_half(uint32_t pair) {
    return __high2float(as_half2(pair));
}

BIOMEDGPT_DEVICE uint16_t half_bits(float value) {
    return __half_as_ushort(__float2half_rn(value));
}

BIOMEDGPT_DEVICE float half_value(uint16_t bits) {
    return __half2float(__ushort_as_half(bits));
}

// Bytes `selector` picks from those of a (0 to 3) and b (4 to 7), four bits for each, the lowest first.
BIOMEDGPT_DEVICE uint32_t pick_bytes(uint32_t a, uint32_t b, uint32_t selector) {
    return __byte_perm(a, b, selector);
}

BIOMEDGPT_DEVICE float exp2_of(float value) {
    return exp2f(value);
}

BIOMEDGPT_DEVICE float inverse_sqrt(float value) {
    return rsqrtf(value);
}

BIOMEDGPT_DEVICE uint32_t float_bits(float value) {
    return __float_as_uint(value);
}

BIOMEDGPT_DEVICE float bits_float(uint32_t bits) {
    return __uint_as_float(bits);
}

}  // namespace simt
}  // namespace on_cuda
}  // namespace biomedgpt
