// A Llama-shaped decoder on a GPU: weights of four bits, KV caches that are updated in place, a few rows or a prompt.
//
// Rows of a call are positions of one sequence, or of several at once. Activations are halves where products read them,
// sums and the residual stream float32. Kernels: product.h (linear layers with what stands around them), attend.h,
// attend_prompt.h, norm.h, embed.h. What it computes does not depend on the other rows of a call, except that up to 8
// rows and more than 8 take different kernels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "common/dtype.h"
#include "decoder/choose.h"
#include "splice/splice.h"

struct CUstream_st;

namespace biomedgpt {

// A matrix in records (csrc/int4/int4.h), of eight bits in those of head_layout.h.
struct DecoderMatrix {
    const uint8_t* records = nullptr;
    int64_t bytes = 0;
    int64_t rows = 0;
    int64_t columns = 0;
    int64_t group = 0;
    int bits = 4;
    const float* bias = nullptr;  // [rows], or null
};

struct DecoderLayer {
    const float* attention_norm = nullptr;  // [hidden], and so is mlp_norm
    DecoderMatrix qkv;                      // [(heads + 2 * kv_heads) * head_size, hidden]
    DecoderMatrix out;                      // [hidden, heads * head_size]
    const float* mlp_norm = nullptr;
    DecoderMatrix gate_up;  // [intermediate, hidden] twice, panels of the gate and of up by turns
    DecoderMatrix down;     // [hidden, intermediate]
};

// Memory of the host, which has to be there while a decoder is made.
struct DecoderModel {
    int64_t hidden = 0;
    int64_t intermediate = 0;
    int64_t heads = 0;
    int64_t kv_heads = 0;
    int64_t head_size = 0;  // 32, 64 or 128
    int64_t positions = 0;  // of the rotation's tables
    float epsilon = 0;
    std::vector<DecoderLayer> layers;
    const float* final_norm = nullptr;
    DecoderMatrix head;               // [logits of a row, hidden], of four or eight bits
    const float* rope_cos = nullptr;  // [positions, head_size / 2], and so is rope_sin
    const float* rope_sin = nullptr;
    const void* embeddings = nullptr;  // [vocabulary, hidden]
    DType embedding_type = DType::f16;
    const float* embedding_scales = nullptr;  // [vocabulary], of int8
    int64_t vocabulary = 0;
    int64_t choosable = 0;  // logits of a row that may be chosen, the first ones
};

// Rows that begin with tokens, and wanted rows of a call: what a product takes at the price of one row.
constexpr int64_t kMaxDecodeRows = 8;
// Rows of a prompt in a call.
constexpr int64_t kMaxPromptRows = 256;
// Steps of a chain.
constexpr int64_t kMaxChain = 256;

struct DecoderRow {
    int64_t cache = 0;
    int64_t position = 0;
    int64_t token = 0;  // unless embeddings are given
};

struct DecoderCall {
    // At most kMaxDecodeRows of any caches, each of whose positions comes once, or at most kMaxPromptRows positions of
    // one, one after the other. Positions before them have been there.
    std::vector<DecoderRow> rows;
    const float* embeddings = nullptr;  // [rows, hidden], of the host or the GPU; null for those of the tokens
    std::vector<int64_t> wanted;        // of the rows: at most kMaxDecodeRows
    float* logits = nullptr;            // [wanted, logits of a row]; may be null where tokens are chosen
    std::vector<Choice> choices;        // of each that is wanted, or empty
    Chosen* chosen = nullptr;           // [wanted]
};

// Steps of one sequence, each of which begins with the token that was chosen by the one before.
struct DecoderChain {
    DecoderRow row;               // the first
    std::vector<Choice> choices;  // for each step, at most kMaxChain
    Chosen* chosen = nullptr;     // [steps]
};

// One call at a time; calls from several threads wait for each other. Methods throw ArgumentError, or DeviceError where
// the GPU fails.
class CudaDecoder {
  public:
    virtual ~CudaDecoder() = default;

    virtual const std::string& device() const = 0;
    // Whether kernels start before those ahead of them have ended; not where the driver cannot capture such launches.
    virtual bool overlaps() const = 0;
    virtual int64_t capacity() const = 0;  // positions of a cache
    virtual size_t bytes() const = 0;      // of the GPU's memory, caches apart
    virtual size_t cache_bytes() const = 0;

    // What everything is put into. Whoever else puts work there does so while no method is called.
    virtual CUstream_st* stream() const = 0;
    virtual void wait() = 0;
    // The device's number; -1 in an emulation, whose memory is the host's.
    virtual int ordinal() const = 0;
    // Memory of the GPU, for prompts that are put together there. Throws DeviceError where there is not so much.
    virtual std::shared_ptr<void> allocate(size_t bytes) = 0;
    // Between host and GPU, either way, with a wait for its end; and within the GPU, without one.
    virtual void copy(void* to, const void* from, size_t bytes) = 0;
    virtual void copy_within(void* to, const void* from, size_t bytes) = 0;
    // As splice_cuda() on its stream, with its own table in place of that of `args`.
    virtual void splice(SpliceArgs args, bool allow_16bit) = 0;

    // A cache of which no position is there.
    virtual int64_t new_cache() = 0;
    // Which has to be there. The memory of one waits for the next cache, or for trim(), or until there is too little.
    virtual void free_cache(int64_t cache) = 0;
    virtual void trim() = 0;
    // The first positions, halves [2 * layers, kv_heads, positions, head_size], of the host or the GPU.
    virtual void read_cache(int64_t cache, int64_t positions, uint16_t* to) = 0;
    virtual void write_cache(int64_t cache, int64_t positions, const uint16_t* from) = 0;

    virtual void run(const DecoderCall& call) = 0;
    // Nothing comes back but tokens, and those at the end alone. After a step whose largest logit is no number, tokens
    // mean nothing.
    virtual void run_chain(const DecoderChain& chain) = 0;
};

// Throws ArgumentError for a model that the kernels do not compute, or a capacity beyond the rotation's tables.
void check_decoder(const DecoderModel& model, int64_t capacity);
void check_call(const DecoderModel& model, int64_t capacity, const DecoderCall& call);
void check_chain(const DecoderModel& model, int64_t capacity, const DecoderChain& chain);

// On the first GPU. Throws DeviceError where it has too little memory, before anything is brought there, for
// all of it and one cache.
std::unique_ptr<CudaDecoder> make_cuda_decoder(const DecoderModel& model, int64_t capacity);

}  // namespace biomedgpt
