#include "allocations.h"

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>

static std::atomic<int64_t> count{0};
static std::atomic<size_t> refused_from{SIZE_MAX};

namespace biomedgpt::testing {

int64_t allocations() {
    return count;
}

void refuse_allocations_from(size_t bytes) {
    refused_from = bytes;
}

}  // namespace biomedgpt::testing

// In a file of their own: where a compiler sees into one of a pair only, it takes them for a mismatch.
void* operator new(size_t size) {
    ++count;
    if (size >= refused_from) throw std::bad_alloc();
    void* memory = std::malloc(size == 0 ? 1 : size);
    if (memory == nullptr) throw std::bad_alloc();
    return memory;
}

void* operator new(size_t size, std::align_val_t alignment) {
    ++count;
    if (size >= refused_from) throw std::bad_alloc();
    const auto step = static_cast<size_t>(alignment);
    void* memory = std::aligned_alloc(step, (size + step - 1) / step * step);
    if (memory == nullptr) throw std::bad_alloc();
    return memory;
}

// A sanitizer's own would not be counted, nor refused.
void* operator new(size_t size, std::align_val_t alignment, const std::nothrow_t&) noexcept {
    try {
        return operator new(size, alignment);
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}

void operator delete(void* memory) noexcept {
    std::free(memory);
}

void operator delete(void* memory, size_t) noexcept {
    std::free(memory);
}

void operator delete(void* memory, std::align_val_t) noexcept {
    std::free(memory);
}

void operator delete(void* memory, size_t, std::align_val_t) noexcept {
    std::free(memory);
}
