// A GPU and the stream that work is put into. Every call's return code is looked at; failures are DeviceErrors.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <memory>
#include <string>

#include "common/error.h"
#include "simt/simt.h"

namespace biomedgpt {
inline namespace on_cuda {

struct Grid {
    int x = 1, y = 1, z = 1;
};

inline void require(cudaError_t code, const std::string& what) {
    if (code == cudaSuccess) return;
    cudaGetLastError();  // so that no later call reports it as its own
    throw DeviceError(what + ": " + cudaGetErrorString(code) + " (" + cudaGetErrorName(code) + ").");
}

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kBlocks)
    enter(const __grid_constant__ typename Kernel::Params params) {
    Kernel::run(params);
}

// Work that was captured; launched again as a whole.
class Graph {
  public:
    Graph() = default;
    Graph(Graph&& other) noexcept : handle_(other.handle_) { other.handle_ = nullptr; }
    Graph& operator=(Graph&& other) noexcept {
        std::swap(handle_, other.handle_);
        return *this;
    }
    ~Graph() {
        if (handle_ != nullptr) cudaGraphExecDestroy(handle_);
    }

  private:
    friend class Gpu;
    cudaGraphExec_t handle_ = nullptr;
};

// A moment in a stream.
class Event {
  public:
    Event() { require(cudaEventCreate(&handle_), "an event cannot be made"); }
    Event(const Event&) = delete;
    Event& operator=(const Event&) = delete;
    ~Event() { cudaEventDestroy(handle_); }

    void record(cudaStream_t stream) { require(cudaEventRecord(handle_, stream), "an event cannot be recorded"); }
    // Of two that have happened.
    double microseconds_since(const Event& before) const {
        float milliseconds = 0;
        require(cudaEventElapsedTime(&milliseconds, before.handle_, handle_), "events cannot be compared");
        return 1000.0 * static_cast<double>(milliseconds);
    }

  private:
    cudaEvent_t handle_ = nullptr;
};

// The first device. Not for several threads at once.
class Gpu {
  public:
    Gpu() {
        const Current current(*this);
        cudaDeviceProp found{};
        require(cudaGetDeviceProperties(&found, device_), "the GPU cannot be asked what it is");
        name_ = found.name;
        capability_ = found.major * 10 + found.minor;
        multiprocessors_ = found.multiProcessorCount;
        shared_limit_ = found.sharedMemPerBlockOptin;
        if (capability_ < 75) {
            throw DeviceError(name_ + " has compute capability " + std::to_string(found.major) + "." +
                              std::to_string(found.minor) + "; the kernels need 7.5.");
        }
        require(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "no stream can be made");
    }
    Gpu(const Gpu&) = delete;
    Gpu& operator=(const Gpu&) = delete;
    ~Gpu() { cudaStreamDestroy(stream_); }

    const std::string& name() const { return name_; }
    int multiprocessors() const { return multiprocessors_; }
    size_t shared_limit() const { return shared_limit_; }
    cudaStream_t stream() const { return stream_; }
    int ordinal() const { return device_; }

    size_t free_memory() const {
        size_t free = 0, total = 0;
        require(cudaMemGetInfo(&free, &total), "the GPU cannot be asked for its memory");
        return free;
    }

    void* allocate(size_t bytes, const std::string& what) {
        void* memory = nullptr;
        require(cudaMalloc(&memory, bytes), std::to_string(bytes) + " bytes for " + what + " on " + name_);
        return memory;
    }
    static void release(void* memory) { cudaFree(memory); }

    void* allocate_pinned(size_t bytes) {
        void* memory = nullptr;
        require(cudaMallocHost(&memory, bytes), std::to_string(bytes) + " bytes of pinned memory");
        return memory;
    }
    static void release_pinned(void* memory) { cudaFreeHost(memory); }

    // Either way, and within the GPU; memory of the host has to be there until wait().
    void copy(void* to, const void* from, size_t bytes) {
        require(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream_), "a copy");
    }
    // `rows` of `width` bytes, which are so many bytes apart.
    void copy_rows(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t rows) {
        require(cudaMemcpy2DAsync(to, to_pitch, from, from_pitch, width, rows, cudaMemcpyDefault, stream_), "a copy");
    }
    // What it held means nothing from now on: to nobody here, but the emulation looks who reads it.
    void scrap(void*, size_t) {}
    void clear(void* memory, size_t bytes) { require(cudaMemsetAsync(memory, 0, bytes, stream_), "clearing memory"); }
    void record(Event& event) { event.record(stream_); }
    // Whether kernels start before those ahead of them have ended, where they are made for that.
    bool overlaps() const { return early_; }
    void wait() { require(cudaStreamSynchronize(stream_), "what was put into the stream"); }

    template <class Kernel>
    void launch(const Grid& grid, size_t shared_bytes, const typename Kernel::Params& params) {
        const auto kernel = enter<Kernel>;
        if (shared_bytes > shared_limit_) throw DeviceError(std::to_string(shared_bytes) + " bytes of shared memory.");
        const Entry& entry = prepare(reinterpret_cast<const void*>(kernel), Kernel::kSharedFirst);
        cudaLaunchConfig_t config{};
        config.gridDim =
            dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
        config.blockDim = dim3(Kernel::kThreads);
        config.dynamicSmemBytes = shared_bytes;
        config.stream = stream_;
        cudaLaunchAttribute early{};
        early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        early.val.programmaticStreamSerializationAllowed = 1;
        config.attrs = &early;
        config.numAttrs = early_ && entry.waits ? 1 : 0;
        require(cudaLaunchKernelEx(&config, kernel, params), "a kernel cannot be launched");
    }

    // What `work` puts into the stream, which is not done.
    template <class Work>
    Graph capture(const Work& work) {
        if (early_) {
            try {
                return capture_once(work);
            } catch (const DeviceError&) {
                early_ = false;  // drivers before CUDA 12.3 capture no such launches
            }
        }
        return capture_once(work);
    }
    void run(const Graph& graph) { require(cudaGraphLaunch(graph.handle_, stream_), "a graph cannot be launched"); }

    // Makes the device the calling thread's, until the end of a scope: it is another one in every thread.
    class Current {
      public:
        explicit Current(const Gpu& gpu) {
            require(cudaGetDevice(&before_), "no GPU can be used");
            require(cudaSetDevice(gpu.device_), "the GPU cannot be used");
        }
        Current(const Current&) = delete;
        Current& operator=(const Current&) = delete;
        ~Current() { cudaSetDevice(before_); }

      private:
        int before_ = 0;
    };

  private:
    // What is known of a kernel.
    struct Entry {
        bool waits = false;  // whether simt::wait_for_inputs() is more than nothing in it
        bool known = false;
    };

    const Entry& prepare(const void* kernel, bool shared_first) {
        Entry& entry = entries_[kernel];
        if (!entry.known) {
            cudaFuncAttributes found{};
            require(cudaFuncGetAttributes(&found, kernel), "a kernel cannot be loaded");
            entry.waits = found.ptxVersion >= 90;
            if (shared_first) {
                // One split of the L1 for all kernels of a token: to change it, a multiprocessor has to be idle.
                require(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                             cudaSharedmemCarveoutMaxShared),
                        "shared memory");
            }
            // All there is, and not what this launch takes: the limit belongs to the function, so that another decoder,
            // of a smaller model, would lower it for this one.
            require(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         static_cast<int>(shared_limit_ - found.sharedSizeBytes)),
                    "shared memory");
            entry.known = true;
        }
        return entry;
    }

    template <class Work>
    Graph capture_once(const Work& work) {
        require(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "a graph cannot be captured");
        cudaGraph_t captured = nullptr;
        try {
            work();
        } catch (...) {
            cudaStreamEndCapture(stream_, &captured);
            if (captured != nullptr) cudaGraphDestroy(captured);
            cudaGetLastError();
            throw;
        }
        require(cudaStreamEndCapture(stream_, &captured), "a graph cannot be captured");
        Graph graph;
        const cudaError_t code = cudaGraphInstantiate(&graph.handle_, captured, 0);
        cudaGraphDestroy(captured);
        require(code, "a graph cannot be made");
        return graph;
    }
    int device_ = 0, capability_ = 0, multiprocessors_ = 0;
    size_t shared_limit_ = 0;
    std::string name_;
    cudaStream_t stream_ = nullptr;
    bool early_ = true;  // whether kernels may start before those ahead of them have ended
    std::map<const void*, Entry> entries_;
};

}  // namespace on_cuda
}  // namespace biomedgpt
