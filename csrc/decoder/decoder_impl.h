// The decoder's host side: memory, launches, graphs. Compiled once for GPUs and once for their emulation.
#pragma once

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "common/error.h"
#include "decoder/attend.h"
#include "decoder/attend_prompt.h"
#include "decoder/choose.h"
#include "decoder/decoder.h"
#include "decoder/embed.h"
#include "decoder/norm.h"
#include "decoder/product.h"
#include "simt/gpu.h"
#include "splice/splice.h"
#if defined(__CUDACC__)
#include "splice/splice_cuda.h"
#endif

namespace biomedgpt {
inline namespace BIOMEDGPT_SIMT {

#if defined(__CUDACC__)
inline void splice_on(const Gpu& gpu, const SpliceArgs& args, bool allow_16bit) {
    splice_cuda(args, allow_16bit, gpu.stream());
}
#else
// The op has a plan and kernels of its own, which are not emulated.
inline void splice_on(const Gpu&, const SpliceArgs& args, bool allow_16bit) {
    biomedgpt::splice(args, {1, allow_16bit});
}
#endif

constexpr int kMaxSplits = 16;
constexpr int kWarps = 8;  // of a block that multiplies
// Rows whose RMSNorm is part of the product: every block of it computes the norm again, for which it reads 8 bytes per
// column and row, and that pays for as long as it is little beside the block's weights.
constexpr int kFusedRows = 1;

// What the host says of a call, in one piece: a copy between kernels would keep the next one from starting early.
struct CallInputs {
    RowPlace places[kMaxPromptRows];
    Choice choices[kMaxChain];
    int32_t picked[kMaxDecodeRows];
};

// A matrix on the GPU.
struct Matrix4 {
    Buffer<uint8_t> records;
    Buffer<float> bias;
    int rows = 0, group = 0, groups = 0, bits = 4;

    int width() const { return group * groups; }
};

class DecoderOn final : public CudaDecoder {
  public:
    // For a model that check_decoder() takes.
    DecoderOn(std::unique_ptr<Gpu> gpu, const DecoderModel& model, int64_t capacity)
        : owned_(std::move(gpu)), gpu_(*owned_), model_(model), capacity_(static_cast<int>(capacity)) {
        while (1 << head_bits_ < model.head_size) ++head_bits_;
        require_memory();
        bring_weights();
        make_buffers();
        gpu_.wait();
        forget_host();
    }

    const std::string& device() const override { return gpu_.name(); }
    bool overlaps() const override { return gpu_.overlaps(); }
    int64_t capacity() const override { return capacity_; }
    size_t bytes() const override { return bytes_; }

    size_t cache_bytes() const override {
        return 2 * model_.layers.size() * static_cast<size_t>(model_.kv_heads * capacity_ * model_.head_size) *
               sizeof(uint16_t);
    }

    CUstream_st* stream() const override { return gpu_.stream(); }
    int ordinal() const override { return gpu_.ordinal(); }

    void wait() override {
        const std::lock_guard<std::mutex> lock(mutex_);
        const Gpu::Current current(gpu_);
        gpu_.wait();
    }

    std::shared_ptr<void> allocate(size_t bytes) override {
        const std::lock_guard<std::mutex> lock(mutex_);
        const Gpu::Current current(gpu_);
        // Not asked for what is free before: in the time to the first token, that is a wait as well.
        const auto made = [&] {
            return std::shared_ptr<void>(gpu_.allocate(std::max<size_t>(bytes, 1), "an array"), &Gpu::release);
        };
        if (spare_.count() == 0) return made();
        try {
            return made();
        } catch (const DeviceError&) {
            spare_ = {};
        }
        return made();
    }

    void trim() override {
        const std::lock_guard<std::mutex> lock(mutex_);
        const Gpu::Current current(gpu_);
        spare_ = {};
    }

    void copy(void* to, const void* from, size_t bytes) override {
        const std::lock_guard<std::mutex> lock(mutex_);
        const Gpu::Current current(gpu_);
        gpu_.copy(to, from, bytes);
        gpu_.wait();
    }

    void copy_within(void* to, const void* from, size_t bytes) override {
        const std::lock_guard<std::mutex> lock(mutex_);
        const Gpu::Current current(gpu_);
        gpu_.copy(to, from, bytes);
    }

    void splice(SpliceArgs args, bool allow_16bit) override {
        args.table.rows = {table_.get(), model_.embedding_type, model_.vocabulary, model_.hidden, model_.hidden};
        args.table.scales = scales_.get();
        args.table.scale_count = static_cast<int64_t>(scales_.count());
        const std::lock_guard<std::mutex> lock(mutex_);
        const Gpu::Current current(gpu_);
        splice_on(gpu_, args, allow_16bit);
    }

    int64_t new_cache() override {
        const std::lock_guard<std::mutex> lock(mutex_);
        const Gpu::Current current(gpu_);
        if (spare_.count() > 0) {
            gpu_.scrap(spare_.get(), spare_.bytes());
            caches_.emplace(next_cache_, std::move(spare_));
            return next_cache_++;
        }
        const size_t free = gpu_.free_memory();
        if (free < cache_bytes()) {
            throw DeviceError("a KV cache of " + std::to_string(capacity_) + " positions takes " +
                              std::to_string(cache_bytes()) + " bytes, and " + std::to_string(free) + " are free on " +
                              gpu_.name() + ".");
        }
        caches_.emplace(next_cache_, Buffer<uint16_t>(gpu_, cache_bytes() / sizeof(uint16_t), "a KV cache"));
        return next_cache_++;
    }

    void free_cache(int64_t cache) override {
        const std::lock_guard<std::mutex> lock(mutex_);
        const Gpu::Current current(gpu_);
        find(cache);
        gpu_.wait();
        // One waits for the next answer: to give a gigabyte back and take it again costs as much as a token.
        if (spare_.count() == 0) spare_ = std::move(caches_.find(cache)->second);
        caches_.erase(cache);
    }

    void read_cache(int64_t cache, int64_t positions, uint16_t* to) override {
        const std::lock_guard<std::mutex> lock(mutex_);
        const Gpu::Current current(gpu_);
        const size_t row = row_bytes(positions), pitch = row_bytes(capacity_);
        gpu_.copy_rows(to, row, find(cache), pitch, row, cache_rows());
        gpu_.wait();
    }

    void write_cache(int64_t cache, int64_t positions, const uint16_t* from) override {
        const std::lock_guard<std::mutex> lock(mutex_);
        const Gpu::Current current(gpu_);
        const size_t row = row_bytes(positions), pitch = row_bytes(capacity_);
        gpu_.copy_rows(find(cache), pitch, from, row, row, cache_rows());
        gpu_.wait();
    }

    void run(const DecoderCall& call) override {
        check_call(model_, capacity_, call);
        const std::lock_guard<std::mutex> lock(mutex_);
        const Gpu::Current current(gpu_);
        const auto count = static_cast<int>(call.rows.size()), wanted = static_cast<int>(call.wanted.size());
        CallInputs& inputs = *host_inputs_.get();
        for (int i = 0; i < count; ++i) {
            const DecoderRow& row = call.rows[static_cast<size_t>(i)];
            inputs.places[i] = {find(row.cache), static_cast<int32_t>(row.position), static_cast<int32_t>(row.token)};
        }
        for (int i = 0; i < wanted; ++i) {
            inputs.picked[i] = static_cast<int32_t>(call.wanted[static_cast<size_t>(i)]);
        }
        std::copy(call.choices.begin(), call.choices.end(), inputs.choices);
        const Wanted back = {wanted, call.logits != nullptr, !call.choices.empty()};
        if (call.embeddings != nullptr) {
            gpu_.copy(residual_.get(), call.embeddings, static_cast<size_t>(count * model_.hidden) * sizeof(float));
            work(count, back, false);
        } else {
            run_tokens(count, back);
        }
        gpu_.wait();
        if (back.logits) std::copy_n(host_logits_.get(), static_cast<size_t>(wanted * model_.head.rows), call.logits);
        if (back.choices) std::copy_n(host_chosen_.get(), wanted, call.chosen);
    }

    void run_chain(const DecoderChain& chain) override {
        check_chain(model_, capacity_, chain);
        const std::lock_guard<std::mutex> lock(mutex_);
        const Gpu::Current current(gpu_);
        const size_t steps = chain.choices.size();
        CallInputs& inputs = *host_inputs_.get();
        inputs.places[0] = {find(chain.row.cache), static_cast<int32_t>(chain.row.position),
                            static_cast<int32_t>(chain.row.token)};
        inputs.picked[0] = 0;
        std::copy(chain.choices.begin(), chain.choices.end(), inputs.choices);
        gpu_.copy(inputs_.get(), host_inputs_.get(), sizeof(CallInputs));
        gpu_.clear(step_.get(), step_.bytes());
        size_t left = steps;
        if (!chain_.has_value()) {
            // The first time, kernels are loaded, which a capture does not allow.
            chained_step();
            gpu_.wait();
            chain_ = gpu_.capture([&] { chained_step(); });
            --left;
        }
        for (; left > 0; --left) gpu_.run(*chain_);
        gpu_.copy(host_chosen_.get(), chosen_.get(), steps * sizeof(Chosen));
        gpu_.wait();
        std::copy_n(host_chosen_.get(), steps, chain.chosen);
    }

  private:
    // --- memory ---------------------------------------------------------------------------------------------------

    static int padded(int64_t width) { return static_cast<int>((width + 127) / 128 * 128); }

    size_t row_bytes(int64_t positions) const {
        return static_cast<size_t>(positions * model_.head_size) * sizeof(uint16_t);
    }

    size_t cache_rows() const { return 2 * model_.layers.size() * static_cast<size_t>(model_.kv_heads); }

    uint16_t* find(int64_t cache) const {
        const auto found = caches_.find(cache);
        if (found == caches_.end()) throw ArgumentError("cache", std::to_string(cache), "one that is there");
        return found->second.get();
    }

    size_t embedding_bytes() const {
        const auto numbers = static_cast<size_t>(model_.vocabulary * model_.hidden);
        return numbers * static_cast<size_t>(size_of(model_.embedding_type));
    }

    size_t weight_bytes() const {
        size_t bytes = embedding_bytes() + static_cast<size_t>(model_.head.bytes);
        for (const DecoderLayer& layer : model_.layers) {
            for (const DecoderMatrix* matrix : {&layer.qkv, &layer.out, &layer.gate_up, &layer.down}) {
                bytes += static_cast<size_t>(matrix->bytes);
            }
            bytes += 2 * static_cast<size_t>(model_.hidden) * sizeof(float);
        }
        return bytes + static_cast<size_t>(model_.positions * model_.head_size) * sizeof(float);
    }

    size_t buffer_bytes() const {
        const int64_t halves = padded(model_.hidden) + model_.heads * model_.head_size +
                               padded(model_.heads * model_.head_size) + padded(model_.intermediate);
        const int64_t floats = kMaxPromptRows * model_.hidden + kMaxDecodeRows * model_.head.rows +
                               kMaxDecodeRows * model_.heads * kMaxSplits * (model_.head_size + 2);
        return static_cast<size_t>(kMaxPromptRows * halves * 2 + floats * 4);
    }

    void require_memory() {
        bytes_ = weight_bytes() + buffer_bytes();
        const size_t needed = bytes_ + cache_bytes(), free = gpu_.free_memory();
        if (needed <= free) return;
        throw DeviceError("the decoder takes " + std::to_string(weight_bytes()) + " bytes for weights, " +
                          std::to_string(buffer_bytes()) + " for activations and " + std::to_string(cache_bytes()) +
                          " for a KV cache of " + std::to_string(capacity_) + " positions, and " +
                          std::to_string(free) + " are free on " + gpu_.name() + ".");
    }

    template <class T>
    Buffer<T> bring(const T* from, size_t count, const std::string& what) {
        Buffer<T> buffer(gpu_, count, what);
        gpu_.copy(buffer.get(), from, buffer.bytes());
        return buffer;
    }

    Matrix4 bring(const DecoderMatrix& matrix) {
        Matrix4 brought;
        brought.records = bring(matrix.records, static_cast<size_t>(matrix.bytes), "weights");
        if (matrix.bias != nullptr) brought.bias = bring(matrix.bias, static_cast<size_t>(matrix.rows), "a bias");
        brought.rows = static_cast<int>(matrix.rows);
        brought.group = static_cast<int>(matrix.group);
        brought.groups = static_cast<int>((matrix.columns + matrix.group - 1) / matrix.group);
        brought.bits = matrix.bits;
        return brought;
    }

    void bring_weights() {
        const auto hidden = static_cast<size_t>(model_.hidden);
        for (const DecoderLayer& layer : model_.layers) {
            layers_.push_back({bring(layer.attention_norm, hidden, "a norm"), bring(layer.qkv), bring(layer.out),
                               bring(layer.mlp_norm, hidden, "a norm"), bring(layer.gate_up), bring(layer.down)});
        }
        final_norm_ = bring(model_.final_norm, hidden, "a norm");
        head_ = bring(model_.head);
        const auto angles = static_cast<size_t>(model_.positions * model_.head_size / 2);
        cos_ = bring(model_.rope_cos, angles, "the rotation");
        sin_ = bring(model_.rope_sin, angles, "the rotation");
        table_ = bring(static_cast<const uint8_t*>(model_.embeddings), embedding_bytes(), "embeddings");
        if (model_.embedding_scales == nullptr) return;
        scales_ = bring(model_.embedding_scales, static_cast<size_t>(model_.vocabulary), "embeddings");
    }

    template <class T>
    Buffer<T> zeros(int64_t count) {
        Buffer<T> buffer(gpu_, static_cast<size_t>(count), "activations");
        gpu_.clear(buffer.get(), buffer.bytes());
        return buffer;
    }

    // Zeros stand behind a row's width where products read whole groups, and nobody ever writes there.
    void make_buffers() {
        const int64_t rows = kMaxPromptRows, few = kMaxDecodeRows, heads_width = model_.heads * model_.head_size;
        inputs_ = zeros<CallInputs>(1);
        residual_ = zeros<float>(rows * model_.hidden);
        normed_ = zeros<uint16_t>(rows * padded(model_.hidden));
        queries_ = zeros<uint16_t>(rows * heads_width);
        attended_ = zeros<uint16_t>(rows * padded(heads_width));
        gated_ = zeros<uint16_t>(rows * padded(model_.intermediate));
        logits_ = zeros<float>(few * model_.head.rows);
        partial_ = zeros<float>(few * model_.heads * kMaxSplits * (model_.head_size + 2));
        arrived_ = zeros<uint32_t>(few * model_.heads);
        chosen_ = zeros<Chosen>(kMaxChain);
        step_ = zeros<uint32_t>(1);
        host_inputs_ = Pinned<CallInputs>(gpu_, 1);
        host_logits_ = Pinned<float>(gpu_, static_cast<size_t>(few * model_.head.rows));
        host_chosen_ = Pinned<Chosen>(gpu_, static_cast<size_t>(kMaxChain));
    }

    // What was brought is no longer the caller's to keep.
    void forget_host() {
        for (DecoderLayer& layer : model_.layers) layer = {};
        model_.final_norm = model_.rope_cos = model_.rope_sin = model_.embedding_scales = nullptr;
        model_.embeddings = model_.head.records = nullptr;
    }

    // --- work -----------------------------------------------------------------------------------------------------

    // What a call gives back, of how many rows.
    struct Wanted {
        int rows;
        bool logits, choices;

        bool operator<(const Wanted& other) const {
            return std::tie(rows, logits, choices) < std::tie(other.rows, other.logits, other.choices);
        }
    };

    // A token's rows are the same work each time but for what the host leaves in pinned memory: a graph.
    void run_tokens(int count, const Wanted& wanted) {
        const auto key = std::make_pair(count, wanted);
        const auto found = graphs_.find(key);
        if (found != graphs_.end()) {
            gpu_.run(found->second);
            return;
        }
        // The first time, kernels are loaded, which a capture does not allow.
        work(count, wanted, true);
        gpu_.wait();
        if (count <= kMaxDecodeRows) graphs_.emplace(key, gpu_.capture([&] { work(count, wanted, true); }));
    }

    void work(int count, const Wanted& wanted, bool tokens) {
        gpu_.copy(inputs_.get(), host_inputs_.get(), sizeof(CallInputs));
        if (tokens) embed(count);
        run_layers(count);
        if (wanted.rows == 0) return;
        const auto rows = static_cast<size_t>(wanted.rows);
        run_head(wanted.rows);
        if (wanted.choices) choose(wanted.rows, nullptr);
        if (wanted.logits) {
            gpu_.copy(host_logits_.get(), logits_.get(), rows * static_cast<size_t>(model_.head.rows) * sizeof(float));
        }
        if (wanted.choices) gpu_.copy(host_chosen_.get(), chosen_.get(), rows * sizeof(Chosen));
    }

    void chained_step() {
        embed(1);
        run_layers(1);
        run_head(1);
        choose(1, step_.get());
    }

    void run_layers(int count) {
        for (size_t i = 0; i < layers_.size(); ++i) run_layer(layers_[i], static_cast<int>(i), count);
    }

    void run_head(int rows) {
        norm(final_norm_, rows, inputs_.get()->picked);
        ProductParams params = product_of(head_, rows);
        params.sums = logits_.get();
        multiply_halves<Output::logits>(head_, params, normed_.get(), padded(model_.hidden));
    }

    void choose(int rows, uint32_t* step) {
        ChooseParams params;
        params.logits = logits_.get();
        params.width = head_.rows;
        params.count = static_cast<int>(model_.choosable);
        params.choices = inputs_.get()->choices;
        params.chosen = chosen_.get();
        params.step = step;
        params.places = inputs_.get()->places;
        gpu_.launch<Choose>({rows}, Choose::kShared, params);
    }

    void embed(int count) {
        EmbedParams params;
        params.table = table_.get();
        params.scales = scales_.get();
        params.element_bytes = static_cast<int>(size_of(model_.embedding_type));
        params.places = inputs_.get()->places;
        params.out = residual_.get();
        params.columns = static_cast<int>(model_.hidden);
        gpu_.launch<Embed>({count}, 0, params);
    }

    struct Layer {
        Buffer<float> attention_norm;
        Matrix4 qkv, out;
        Buffer<float> mlp_norm;
        Matrix4 gate_up, down;
    };

    void run_layer(const Layer& layer, int index, int count) {
        const auto heads_width = static_cast<int>(model_.heads * model_.head_size);
        const CacheShape cache = {static_cast<int32_t>(model_.kv_heads), static_cast<int32_t>(model_.head_size),
                                  capacity_, index};
        ProductParams qkv = product_of(layer.qkv, count);
        qkv.out = queries_.get();
        qkv.out_pitch = heads_width;
        qkv.cache = cache;
        qkv.rope = {cos_.get(), sin_.get()};
        qkv.places = inputs_.get()->places;
        qkv.heads = static_cast<int>(model_.heads);
        qkv.head_bits = head_bits_;
        multiply_normed<Output::qkv>(layer.qkv, qkv, layer.attention_norm);
        attend(cache, count);
        add(layer.out, attended_, padded(heads_width), count);
        ProductParams gated = product_of(layer.gate_up, count);
        gated.out = gated_.get();
        gated.out_pitch = padded(model_.intermediate);
        multiply_normed<Output::gated>(layer.gate_up, gated, layer.mlp_norm);
        add(layer.down, gated_, padded(model_.intermediate), count);
    }

    void add(const Matrix4& matrix, const Buffer<uint16_t>& x, int pitch, int count) {
        ProductParams params = product_of(matrix, count);
        params.sums = residual_.get();
        multiply_halves<Output::residual>(matrix, params, x.get(), pitch);
    }

    static ProductParams product_of(const Matrix4& matrix, int count) {
        ProductParams params;
        params.records = matrix.records.get();
        params.bias = matrix.bias.get();
        params.rows = matrix.rows;
        params.group = matrix.group;
        params.groups = matrix.groups;
        params.count = count;
        return params;
    }

    NormSource norm_source(const Buffer<float>& gain, const int32_t* picked) const {
        return {residual_.get(), gain.get(), picked, static_cast<int>(model_.hidden), model_.epsilon};
    }

    void norm(const Buffer<float>& gain, int count, const int32_t* picked) {
        gpu_.launch<Norm>({count}, Norm::kShared, {norm_source(gain, picked), normed_.get(), padded(model_.hidden)});
    }

    // RMSNorm and the product in one kernel where what is normed fits a block's memory and costs little, else in two.
    template <Output kOutput>
    void multiply_normed(const Matrix4& matrix, ProductParams& params, const Buffer<float>& gain) {
        const auto shared = [&](auto kernel) { return decltype(kernel)::shared_bytes(matrix.width(), params.count); };
        const size_t needed = matrix.group == 128 ? shared(Product<4, 128, 1, Input::normed, kOutput>())
                                                  : shared(Product<4, 0, 1, Input::normed, kOutput>());
        if (params.count <= kFusedRows && needed <= gpu_.shared_limit()) {
            params.normed = norm_source(gain, nullptr);
            launch<1, Input::normed, kOutput>(matrix, params);
            return;
        }
        norm(gain, params.count, nullptr);
        multiply_halves<kOutput>(matrix, params, normed_.get(), padded(model_.hidden));
    }

    template <Output kOutput>
    void multiply_halves(const Matrix4& matrix, ProductParams& params, const uint16_t* x, int pitch) {
        params.x = x;
        params.pitch = pitch;
        if constexpr (kOutput == Output::logits) {
            if (matrix.bits == 8) {
                launch_groups<8, 1, Input::halves, kOutput, 4>(matrix, params);
                return;
            }
        } else if (params.count > kMaxDecodeRows) {
            return multiply_prompt<kOutput>(matrix, params);
        }
        if constexpr (kOutput == Output::residual) {
            // One panel for a block, and fewer blocks than multiprocessors have room for: more warps of each.
            using Kernel = Product<4, 128, 1, Input::halves, kOutput, 2 * kWarps>;
            if (matrix.group == 128 && Kernel::shared_bytes(matrix.width(), params.count) <= gpu_.shared_limit()) {
                return launch_kernel<Kernel>(matrix, params);
            }
        }
        launch<1, Input::halves, kOutput>(matrix, params);
    }

    // As few rows of nothing as can be.
    template <Output kOutput>
    void multiply_prompt(const Matrix4& matrix, const ProductParams& params) {
        const auto multiplied = [&](int rows) { return (params.count + rows - 1) / rows * rows; };
        if (params.count <= 32) return launch<4, Input::halves, kOutput>(matrix, params);
        if (multiplied(48) < multiplied(64)) return launch<6, Input::halves, kOutput>(matrix, params);
        launch<8, Input::halves, kOutput>(matrix, params);
    }

    template <int kTiles, Input kInput, Output kOutput>
    void launch(const Matrix4& matrix, const ProductParams& params) {
        launch_groups<4, kTiles, kInput, kOutput, kWarps>(matrix, params);
    }

    template <int kBits, int kTiles, Input kInput, Output kOutput, int kBlockWarps>
    void launch_groups(const Matrix4& matrix, const ProductParams& params) {
        if (matrix.group == 128) {
            launch_kernel<Product<kBits, 128, kTiles, kInput, kOutput, kBlockWarps>>(matrix, params);
        } else {
            launch_kernel<Product<kBits, 0, kTiles, kInput, kOutput, kBlockWarps>>(matrix, params);
        }
    }

    template <class Kernel>
    void launch_kernel(const Matrix4& matrix, const ProductParams& params) {
        const int panels = (matrix.rows + kPanel - 1) / kPanel;
        const Grid grid{(params.count + Kernel::kColumns - 1) / Kernel::kColumns, Kernel::units_of(panels)};
        gpu_.launch<Kernel>(grid, Kernel::shared_bytes(matrix.width(), params.count), params);
    }

    float score_scale() const { return kLog2E / std::sqrt(static_cast<float>(model_.head_size)); }

    void attend(const CacheShape& cache, int count) {
        switch (model_.head_size) {
            case 32:
                return attend_of<32>(cache, count);
            case 64:
                return attend_of<64>(cache, count);
            default:
                return attend_of<128>(cache, count);
        }
    }

    template <int kHeadSize>
    void attend_of(const CacheShape& cache, int count) {
        const auto heads = static_cast<int>(model_.heads);
        const int pitch = padded(model_.heads * model_.head_size);
        if (count > kMaxDecodeRows) {
            using Kernel = AttendPrompt<kHeadSize>;
            const AttendPromptParams params = {queries_.get(), attended_.get(),       pitch, count,
                                               cache,          inputs_.get()->places, heads, score_scale()};
            gpu_.launch<Kernel>({(count + Kernel::kRows - 1) / Kernel::kRows, heads}, Kernel::kShared, params);
            return;
        }
        using Kernel = Attend<kHeadSize>;
        // Two blocks for each multiprocessor, whatever the number of positions: a graph keeps its grid.
        const int blocks = heads * count, splits = (2 * gpu_.multiprocessors() + blocks - 1) / blocks;
        AttendParams params;
        params.queries = queries_.get();
        params.out = attended_.get();
        params.out_pitch = pitch;
        params.cache = cache;
        params.places = inputs_.get()->places;
        params.heads = heads;
        params.heads_per_kv = static_cast<int>(model_.heads / model_.kv_heads);
        params.splits = std::clamp(splits, 1, kMaxSplits);
        params.scale = score_scale();
        params.partial = partial_.get();
        params.arrived = arrived_.get();
        gpu_.launch<Kernel>({heads, params.splits, count}, Kernel::kShared, params);
    }

    std::unique_ptr<Gpu> owned_;  // outlives what lies in its memory
    Gpu& gpu_;
    DecoderModel model_;
    int capacity_;
    int head_bits_ = 0;  // head_size is 2 to that
    size_t bytes_ = 0;
    std::mutex mutex_;
    std::vector<Layer> layers_;
    Buffer<float> final_norm_, cos_, sin_, scales_;
    Matrix4 head_;
    Buffer<uint8_t> table_;
    Buffer<CallInputs> inputs_;
    Buffer<float> residual_, logits_, partial_;
    Buffer<uint16_t> normed_, queries_, attended_, gated_;
    Buffer<uint32_t> arrived_, step_;
    Buffer<Chosen> chosen_;
    Pinned<CallInputs> host_inputs_;
    Pinned<float> host_logits_;
    Pinned<Chosen> host_chosen_;
    std::map<int64_t, Buffer<uint16_t>> caches_;
    Buffer<uint16_t> spare_;  // of the last cache that was freed
    int64_t next_cache_ = 1;
    std::map<std::pair<int, Wanted>, Graph> graphs_;
    std::optional<Graph> chain_;
};

}  // namespace BIOMEDGPT_SIMT
}  // namespace biomedgpt
