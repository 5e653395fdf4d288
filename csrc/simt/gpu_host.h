// What gpu_cuda.h is, for the emulation: work is done when it is put into the stream. Memory holds NaNs at first.
#pragma once

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <new>
#include <string>
#include <vector>

#include "common/error.h"
#include "simt/simt.h"

struct CUstream_st;

namespace biomedgpt {
inline namespace on_host {

using simt::Grid;

class Graph {
  private:
    friend class Gpu;
    std::vector<std::function<void()>> work_;
};

class Event {
  public:
    double microseconds_since(const Event& before) const {
        return std::chrono::duration<double, std::micro>(moment_ - before.moment_).count();
    }

  private:
    friend class Gpu;
    std::chrono::steady_clock::time_point moment_;
};

class Gpu {
  public:
    // As large as any, for all and for a block, unless a test wants a small one.
    explicit Gpu(size_t memory = size_t{1} << 30, size_t shared_limit = size_t{227} << 10)
        : memory_(memory), shared_limit_(shared_limit) {}

    const std::string& name() const { return name_; }
    int multiprocessors() const { return 4; }
    size_t shared_limit() const { return shared_limit_; }
    size_t free_memory() const { return memory_; }
    CUstream_st* stream() const { return nullptr; }
    int ordinal() const { return -1; }

    void* allocate(size_t bytes, const std::string& what) {
        // cudaMalloc's addresses are multiples of 256. Not a byte more than asked for: sanitizers watch the end.
        void* memory = nullptr;
        if (bytes > memory_ || posix_memalign(&memory, 256, bytes) != 0)
            throw DeviceError(std::to_string(bytes) + " bytes for " + what + " on " + name_ + ": out of memory.");
        std::memset(memory, 0xff, bytes);
        return memory;
    }
    static void release(void* memory) { std::free(memory); }
    void* allocate_pinned(size_t bytes) { return allocate(bytes, "the host"); }
    static void release_pinned(void* memory) { std::free(memory); }

    void copy(void* to, const void* from, size_t bytes) {
        put([=] { std::memcpy(to, from, bytes); });
    }
    void copy_rows(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t rows) {
        put([=] {
            for (size_t i = 0; i < rows; ++i) {
                std::memcpy(static_cast<char*>(to) + i * to_pitch, static_cast<const char*>(from) + i * from_pitch,
                            width);
            }
        });
    }
    // What it held means nothing from now on.
    void scrap(void* memory, size_t bytes) {
        put([=] { std::memset(memory, 0xff, bytes); });
    }
    void clear(void* memory, size_t bytes) {
        put([=] { std::memset(memory, 0, bytes); });
    }
    void record(Event& event) {
        put([&event] { event.moment_ = std::chrono::steady_clock::now(); });
    }
    bool overlaps() const { return false; }
    void wait() {}

    // As gpu_cuda.h has it; there is one device.
    struct Current {
        explicit Current(const Gpu&) {}
    };

    template <class Kernel>
    void launch(const Grid& grid, size_t shared_bytes, const typename Kernel::Params& params) {
        if (shared_bytes > shared_limit_) throw DeviceError(std::to_string(shared_bytes) + " bytes of shared memory.");
        put([=] { simt::run_grid(grid, Kernel::kThreads, shared_bytes, [&] { Kernel::run(params); }); });
    }

    template <class Work>
    Graph capture(const Work& work) {
        Graph graph;
        captured_ = &graph;
        try {
            work();
        } catch (...) {
            captured_ = nullptr;
            throw;
        }
        captured_ = nullptr;
        return graph;
    }
    void run(const Graph& graph) {
        for (const auto& work : graph.work_) work();
    }

  private:
    void put(std::function<void()> work) {
        if (captured_ != nullptr) {
            captured_->work_.push_back(std::move(work));
        } else {
            work();
        }
    }

    size_t memory_, shared_limit_;
    std::string name_ = "the emulation of a GPU";
    Graph* captured_ = nullptr;
};

}  // namespace on_host
}  // namespace biomedgpt
