// The Python binding: turns a call's arguments into the kernel library's structs, releases the GIL, translates errors.
#include <pybind11/pybind11.h>

#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "attention/attention.h"
#include "common/cpu_features.h"
#include "common/cuda_device.h"
#include "common/error.h"
#include "common/parallel.h"
#include "int4/int4.h"
#include "int8/int8.h"
#include "probe/probe.h"
#include "python/arguments.h"
#include "python/array.h"
#include "python/decoder_binding.h"
#include "python/splice_call.h"
#include "splice/splice.h"

#if defined(BIOMEDGPT_HAVE_CUDA)
#include <cuda_runtime_api.h>

#include "splice/splice_cuda.h"
#endif

namespace py = pybind11;
using biomedgpt::ArgumentError;
using biomedgpt::DType;
using biomedgpt::python::ArgName;
using biomedgpt::python::Array;
using biomedgpt::python::bool_of;
using biomedgpt::python::Expected;
using biomedgpt::python::int_of;
using biomedgpt::python::Place;
using biomedgpt::python::require_contiguous;
using biomedgpt::python::SpliceCall;
using biomedgpt::python::text_of;
using biomedgpt::python::type_name;
using biomedgpt::python::TypedArray;
using biomedgpt::python::Use;

namespace {

constexpr Expected kWords{1, "int64 [words], contiguous"};

constexpr Expected kQkv{2, "float32 [rows, (heads + 2 * kv_heads) * head_size], contiguous"};
constexpr Expected kAttended{2, "float32 [rows, heads * head_size], contiguous and writeable"};
constexpr Expected kKvCache{2, "uint8 [kv_heads, blocks * bytes of a block], contiguous and writeable"};
constexpr Expected kRope{2, "float32 [positions, head_size / 2], contiguous"};
constexpr Expected kInt4X{2, "float32 [rows, K], contiguous"};
constexpr Expected kInt4Y{2, "float32 [rows, N], contiguous and writeable, with the rows of x"};
constexpr Expected kInt4Records{2, "uint8 [panels, bytes of a panel], contiguous, and writeable where it is filled"};
constexpr Expected kInt4Blocks{2, "uint8 [N, groups * group / 2], contiguous, and writeable where it is filled"};
constexpr Expected kInt4Scales{2, "float16 [N, groups], contiguous, and writeable where it is filled"};
constexpr Expected kInt4Values{2, "int8 [rows, groups * group], contiguous and writeable"};
constexpr Expected kInt4RowScales{2, "float32 [rows, groups], contiguous and writeable"};
constexpr Expected kInt4ZeroTerms{2, "int32 [rows, groups], contiguous and writeable"};
constexpr Expected kInt8Matrix{2, "int8 [N, K], contiguous, and writeable where it is filled"};
constexpr Expected kInt8Numbers{1, "float32 [N], contiguous, and writeable where it is filled"};
constexpr Expected kInt8Residual{2, "float32 [rows, N], contiguous, or None"};
constexpr Expected kInt8Values{2, "int8 [rows, K rounded up to a multiple of 64], contiguous and writeable"};
constexpr Expected kInt8RowScales{1, "float32 [rows], contiguous and writeable"};

int threads_of(py::handle value) {
    const int64_t threads = int_of(value, {"threads"});
    if (threads != static_cast<int>(threads)) {
        throw ArgumentError("threads", std::to_string(threads), "a number of threads");
    }
    return static_cast<int>(threads);
}

void splice(const py::object& out, const py::object& table, const py::object& table_scales, const py::object& segments,
            const py::object& threads, const py::object& path, const py::object& allow_16bit) {
    biomedgpt::SpliceOptions options;
    options.threads = threads_of(threads);
    options.path = text_of(path, {"path"});
    options.allow_16bit = bool_of(allow_16bit, {"allow_16bit"});
    SpliceCall call(out, Place());
    call.take_table(table, table_scales);
    call.take_segments(segments);
    const py::gil_scoped_release released;
    biomedgpt::splice(call.args(), options);
}

#if defined(BIOMEDGPT_HAVE_CUDA)

void require_success(cudaError_t code, const char* what) {
    if (code != cudaSuccess) throw biomedgpt::DeviceError(std::string(what) + ": " + cudaGetErrorString(code) + ".");
}

// Makes a device the current one, which kernels start on, until the end of a scope.
class CurrentDevice {
  public:
    explicit CurrentDevice(int device) {
        require_success(cudaGetDevice(&before_), "cudaGetDevice");
        require_success(cudaSetDevice(device), "cudaSetDevice");
    }
    ~CurrentDevice() { cudaSetDevice(before_); }
    CurrentDevice(const CurrentDevice&) = delete;
    CurrentDevice& operator=(const CurrentDevice&) = delete;

  private:
    int before_ = 0;
};

void splice_cuda(const py::object& out, const py::object& table, const py::object& table_scales,
                 const py::object& segments, const py::object& stream, const py::object& allow_16bit) {
    const int64_t number = int_of(stream, {"stream"});
    if (number < 0) throw ArgumentError("stream", std::to_string(number), "a cudaStream_t as a number, or 0");
    const bool rounded = bool_of(allow_16bit, {"allow_16bit"});
    SpliceCall call(out, Place{true, number, std::nullopt});
    call.take_table(table, table_scales);
    call.take_segments(segments);
    const py::gil_scoped_release released;
    const CurrentDevice current(call.place().device.value());
    biomedgpt::splice_cuda(call.args(), rounded, reinterpret_cast<CUstream_st*>(static_cast<intptr_t>(number)));
}

#else

void splice_cuda(const py::object&, const py::object&, const py::object&, const py::object&, const py::object&,
                 const py::object&) {
    throw biomedgpt::DeviceError("This build has no CUDA kernels; BIOMEDGPT_CUDA=ON makes one that has.");
}

#endif

py::tuple int4_records_shape(const py::object& rows, const py::object& columns, const py::object& group) {
    const biomedgpt::Int4Shape shape{int_of(rows, {"rows"}), int_of(columns, {"columns"}), int_of(group, {"group"})};
    biomedgpt::check_int4_shape(shape);
    return py::make_tuple(shape.panels(), shape.groups(), shape.record_bytes());
}

// What MatMulNBits' arrays say about the matrix they hold; columns of padding count.
biomedgpt::Int4Shape int4_shape_of(const TypedArray& values, const TypedArray& scales, py::handle group) {
    const int64_t size = int_of(group, {"group"});
    const biomedgpt::Int4Shape one{1, 1, size};
    biomedgpt::check_int4_shape(one);
    const biomedgpt::Int4Shape shape{scales.rows(), scales.columns() * size, size};
    biomedgpt::check_int4_shape(shape);
    values.require(shape.rows, shape.columns / 2);
    return shape;
}

void int4_pack(const py::object& records, const py::object& values, const py::object& scales, const py::object& group) {
    const TypedArray to(records, "records", kInt4Records, DType::u8, Use::filled);
    const TypedArray blocks(values, "values", kInt4Blocks, DType::u8, Use::read);
    const TypedArray block_scales(scales, "scales", kInt4Scales, DType::f16, Use::read);
    const biomedgpt::Int4Shape shape = int4_shape_of(blocks, block_scales, group);
    to.require(shape.panels(), shape.panel_bytes());
    const py::gil_scoped_release released;
    biomedgpt::int4_pack(shape, {blocks.data<uint8_t>(), block_scales.data<uint16_t>()}, to.data<uint8_t>());
}

void int4_unpack(const py::object& values, const py::object& scales, const py::object& records,
                 const py::object& group) {
    const TypedArray to(values, "values", kInt4Blocks, DType::u8, Use::filled);
    const TypedArray to_scales(scales, "scales", kInt4Scales, DType::f16, Use::filled);
    const TypedArray from(records, "records", kInt4Records, DType::u8, Use::read);
    const biomedgpt::Int4Shape shape = int4_shape_of(to, to_scales, group);
    from.require(shape.panels(), shape.panel_bytes());
    const py::gil_scoped_release released;
    biomedgpt::int4_unpack(shape, from.data<uint8_t>(), to.data<uint8_t>(), to_scales.data<uint16_t>());
}

void int4_quantize(const py::object& values, const py::object& scales, const py::object& zero_terms,
                   const py::object& x, const py::object& group, const py::object& path) {
    const TypedArray to(values, "values", kInt4Values, DType::i8, Use::filled);
    const TypedArray to_scales(scales, "scales", kInt4RowScales, DType::f32, Use::filled);
    const TypedArray to_terms(zero_terms, "zero_terms", kInt4ZeroTerms, DType::i32, Use::filled);
    const TypedArray from(x, "x", kInt4X, DType::f32, Use::read);
    const biomedgpt::Int4Shape shape{1, from.columns(), int_of(group, {"group"})};
    biomedgpt::check_int4_shape(shape);
    to.require(from.rows(), shape.groups() * shape.group);
    to_scales.require(from.rows(), shape.groups());
    to_terms.require(from.rows(), shape.groups());
    const std::string_view name = text_of(path, {"path"});
    const py::gil_scoped_release released;
    biomedgpt::int4_quantize(from.data<float>(), from.rows(), shape,
                             {to.data<int8_t>(), to_scales.data<float>(), to_terms.data<int32_t>()}, name);
}

// Of a pool that lives for one call.
int pool_threads_of(py::handle threads) {
    const int count = threads_of(threads);
    if (count < 1 || count > biomedgpt::kMaxThreads) {
        throw ArgumentError("threads", std::to_string(count), "1 to " + std::to_string(biomedgpt::kMaxThreads));
    }
    return count;
}

template <void (*kOp)(const biomedgpt::Int4Args&, const biomedgpt::Int4Options&)>
void int4_multiply(const py::object& y, const py::object& x, const py::object& records, const py::object& group,
                   const py::object& threads, const py::object& path) {
    const TypedArray to(y, "y", kInt4Y, DType::f32, Use::filled);
    const TypedArray from(x, "x", kInt4X, DType::f32, Use::read);
    const TypedArray weights(records, "records", kInt4Records, DType::u8, Use::read);
    to.require(from.rows(), to.columns());
    biomedgpt::PoolThreads pool(pool_threads_of(threads));
    biomedgpt::Int4Args args;
    args.x = from.data<float>();
    args.y = to.data<float>();
    args.rows = from.rows();
    args.weights.shape = {to.columns(), from.columns(), int_of(group, {"group"})};
    args.weights.records = weights.data<uint8_t>();
    args.weights.bytes = weights.rows() * weights.columns();
    const biomedgpt::Int4Options options{pool.parallel_for(), text_of(path, {"path"})};
    const py::gil_scoped_release released;
    kOp(args, options);
}

biomedgpt::KvShape kv_shape_of(const TypedArray& cache, int64_t head_size, py::handle format) {
    const int64_t block_bytes = int_of(format, {"block_bytes"});
    biomedgpt::KvShape shape{cache.rows(), head_size, 0, biomedgpt::kv_format(head_size, block_bytes)};
    shape.blocks = cache.columns() / block_bytes;
    cache.require(shape.heads, shape.blocks * block_bytes);
    return shape;
}

void causal_attention(const py::object& y, const py::object& qkv, const py::object& keys, const py::object& values,
                      const py::object& block_bytes, const py::object& first, const py::object& cos,
                      const py::object& sin, const py::object& threads, const py::object& path) {
    const TypedArray to(y, "y", kAttended, DType::f32, Use::filled);
    const TypedArray from(qkv, "qkv", kQkv, DType::f32, Use::read);
    const TypedArray key_cache(keys, "keys", kKvCache, DType::u8, Use::filled);
    const TypedArray value_cache(values, "values", kKvCache, DType::u8, Use::filled);
    const TypedArray cosines(cos, "cos", kRope, DType::f32, Use::read);
    const TypedArray sines(sin, "sin", kRope, DType::f32, Use::read);
    biomedgpt::PoolThreads pool(pool_threads_of(threads));
    biomedgpt::AttentionArgs args;
    const int64_t head_size = 2 * cosines.columns();
    args.cache.shape = kv_shape_of(key_cache, head_size, block_bytes);
    value_cache.require(key_cache.rows(), key_cache.columns());
    sines.require(cosines.rows(), cosines.columns());
    args.heads = to.columns() / head_size;
    to.require(from.rows(), args.heads * head_size);
    from.require(from.rows(), (args.heads + 2 * args.cache.shape.heads) * head_size);
    args.rows = from.rows();
    args.first = int_of(first, {"first"});
    args.qkv = from.data<float>();
    args.y = to.data<float>();
    args.cache.keys = key_cache.data<uint8_t>();
    args.cache.values = value_cache.data<uint8_t>();
    args.rope = {cosines.data<float>(), sines.data<float>(), cosines.rows()};
    const biomedgpt::AttentionOptions options{pool.parallel_for(), text_of(path, {"path"})};
    const py::gil_scoped_release released;
    biomedgpt::causal_attention(args, options);
}

py::list attention_paths() {
    py::list paths;
    for (const char* path : biomedgpt::attention_paths()) paths.append(path);
    return paths;
}

py::list int4_paths() {
    py::list paths;
    for (const char* path : biomedgpt::int4_paths()) paths.append(path);
    return paths;
}

py::tuple int8_records_shape(const py::object& rows, const py::object& columns) {
    const biomedgpt::Int8Shape shape{int_of(rows, {"rows"}), int_of(columns, {"columns"})};
    biomedgpt::check_int8_shape(shape);
    return py::make_tuple(shape.panels(), shape.panel_bytes());
}

biomedgpt::Int8Shape int8_shape_of(const TypedArray& values, const TypedArray& scales, const TypedArray& biases) {
    const biomedgpt::Int8Shape shape{values.rows(), values.columns()};
    biomedgpt::check_int8_shape(shape);
    scales.require(shape.rows);
    biases.require(shape.rows);
    return shape;
}

void int8_pack(const py::object& records, const py::object& values, const py::object& scales,
               const py::object& biases) {
    const TypedArray to(records, "records", kInt4Records, DType::u8, Use::filled);
    const TypedArray matrix(values, "values", kInt8Matrix, DType::i8, Use::read);
    const TypedArray of_rows(scales, "scales", kInt8Numbers, DType::f32, Use::read);
    const TypedArray added(biases, "biases", kInt8Numbers, DType::f32, Use::read);
    const biomedgpt::Int8Shape shape = int8_shape_of(matrix, of_rows, added);
    to.require(shape.panels(), shape.panel_bytes());
    const py::gil_scoped_release released;
    biomedgpt::int8_pack(shape, {matrix.data<int8_t>(), of_rows.data<float>(), added.data<float>()},
                         to.data<uint8_t>());
}

void int8_unpack(const py::object& values, const py::object& scales, const py::object& biases,
                 const py::object& records) {
    const TypedArray to(values, "values", kInt8Matrix, DType::i8, Use::filled);
    const TypedArray to_scales(scales, "scales", kInt8Numbers, DType::f32, Use::filled);
    const TypedArray to_biases(biases, "biases", kInt8Numbers, DType::f32, Use::filled);
    const TypedArray from(records, "records", kInt4Records, DType::u8, Use::read);
    const biomedgpt::Int8Shape shape = int8_shape_of(to, to_scales, to_biases);
    from.require(shape.panels(), shape.panel_bytes());
    const py::gil_scoped_release released;
    biomedgpt::int8_unpack(shape, from.data<uint8_t>(), to.data<int8_t>(), to_scales.data<float>(),
                           to_biases.data<float>());
}

void int8_quantize(const py::object& values, const py::object& scales, const py::object& x, const py::object& path) {
    const TypedArray to(values, "values", kInt8Values, DType::i8, Use::filled);
    const TypedArray to_scales(scales, "scales", kInt8RowScales, DType::f32, Use::filled);
    const TypedArray from(x, "x", kInt4X, DType::f32, Use::read);
    const biomedgpt::Int8Shape shape{1, from.columns()};
    biomedgpt::check_int8_shape(shape);
    to.require(from.rows(), shape.padded_columns());
    to_scales.require(from.rows());
    const std::string_view name = text_of(path, {"path"});
    const py::gil_scoped_release released;
    biomedgpt::int8_quantize(from.data<float>(), from.rows(), from.columns(),
                             {to.data<int8_t>(), to_scales.data<float>()}, name);
}

void int8_linear(const py::object& y, const py::object& x, const py::object& records, const py::object& residual,
                 const py::object& gelu, const py::object& threads, const py::object& path) {
    const TypedArray to(y, "y", kInt4Y, DType::f32, Use::filled);
    const TypedArray from(x, "x", kInt4X, DType::f32, Use::read);
    const TypedArray weights(records, "records", kInt4Records, DType::u8, Use::read);
    to.require(from.rows(), to.columns());
    biomedgpt::Int8Args args;
    args.x = from.data<float>();
    args.y = to.data<float>();
    args.rows = from.rows();
    args.weights.shape = {to.columns(), from.columns()};
    args.weights.records = weights.data<uint8_t>();
    args.weights.bytes = weights.rows() * weights.columns();
    args.gelu = bool_of(gelu, {"gelu"});
    std::optional<TypedArray> added;
    if (!residual.is_none()) {
        added.emplace(residual, "residual", kInt8Residual, DType::f32, Use::read);
        added->require(from.rows(), to.columns());
        args.residual = added->data<float>();
    }
    biomedgpt::PoolThreads pool(pool_threads_of(threads));
    const biomedgpt::Int8Options options{pool.parallel_for(), text_of(path, {"path"})};
    const py::gil_scoped_release released;
    biomedgpt::int8_linear(args, options);
}

py::list int8_paths() {
    py::list paths;
    for (const char* path : biomedgpt::int8_paths()) paths.append(path);
    return paths;
}

py::dict splice_paths() {
    py::dict paths;
    for (const biomedgpt::SplicePathInfo& path : biomedgpt::splice_paths()) paths[path.name] = path.operands_16bit;
    return paths;
}

py::dict cpu_features() {
    const biomedgpt::CpuFeatures& cpu = biomedgpt::cpu_features();
    py::dict features;
    features["avx2"] = cpu.avx2;
    features["fma"] = cpu.fma;
    features["f16c"] = cpu.f16c;
    features["avx512"] = cpu.avx512;
    features["avx512_bf16"] = cpu.avx512_bf16;
    features["avx_vnni"] = cpu.avx_vnni;
    features["avx512_vnni"] = cpu.avx512_vnni;
    features["amx"] = cpu.amx;
    features["amx_bf16"] = cpu.amx_bf16;
    features["amx_int8"] = cpu.amx_int8;
    features["neon"] = cpu.neon;
    features["neon_fp16"] = cpu.neon_fp16;
    features["neon_bf16"] = cpu.neon_bf16;
    features["neon_dotprod"] = cpu.neon_dotprod;
    features["neon_i8mm"] = cpu.neon_i8mm;
    return features;
}

py::tuple read_patterns() {
    const std::vector<const char*>& names = biomedgpt::read_patterns();
    py::tuple patterns(names.size());
    for (size_t i = 0; i < names.size(); ++i) patterns[i] = py::str(names[i]);
    return patterns;
}

uint64_t read_memory(const py::object& words, const py::object& pattern) {
    Place host;
    const Array array(words, {"words"}, kWords, host);
    if (array.dtype() != DType::i64) array.refuse();
    require_contiguous(array);
    const std::string_view name = text_of(pattern, {"pattern"});
    const py::gil_scoped_release released;
    return biomedgpt::read_memory(static_cast<const uint64_t*>(array.data()), array.size(), name);
}

py::list arithmetic_loops() {
    py::list loops;
    for (const biomedgpt::ArithmeticLoop& loop : biomedgpt::arithmetic_loops()) {
        loops.append(py::make_tuple(loop.name, loop.kind, loop.operations_per_step));
    }
    return loops;
}

double run_arithmetic(const py::object& name, const py::object& kind, const py::object& steps) {
    const std::string_view loop = text_of(name, {"name"}), operands = text_of(kind, {"kind"});
    const int64_t count = int_of(steps, {"steps"});
    const py::gil_scoped_release released;
    return biomedgpt::run_arithmetic(loop, operands, count);
}

std::unique_ptr<biomedgpt::CudaDecoder> make_decoder(const biomedgpt::DecoderModel& model, int64_t capacity) {
#if defined(BIOMEDGPT_HAVE_CUDA)
    return biomedgpt::make_cuda_decoder(model, capacity);
#else
    static_cast<void>(model), static_cast<void>(capacity);
    throw biomedgpt::DeviceError("This build has no CUDA kernels; BIOMEDGPT_CUDA=ON makes one that has.");
#endif
}

}  // namespace

constexpr char kSpliceDoc[] =
    R"(Fills out [rows, hidden], float32 or float16, from token embeddings and projected features.

Arrays may be of numpy, have the buffer protocol, or have DLPack with CPU memory; out is contiguous and writeable.

table: [vocab, hidden], float32, float16 or int8, contiguous; table_scales: [vocab] float32 for int8, otherwise None.
segments: ("tokens", row, ids) with ids [count], int64 or int32, or ("features", row, features, weight, bias,
    layer_norm_eps or None) with features [count, in] and weight [hidden, in], float32 or float16, and bias [hidden]
    float32. In any order, they cover every row of out exactly once, each from `row` on.
threads: an upper bound, from 1. path: "auto" or a key of splice_paths().
allow_16bit: whether operands of the products may be rounded to bfloat16.

Raises KernelArgumentError, with out untouched, for anything else.)";

constexpr char kSpliceCudaDoc[] = R"(Queues splice on a CUDA stream and returns without waiting for it.

As splice, but out, table, scales, features, weights and biases are DLPack tensors on one CUDA device; ids stay on the
host. They must live until the stream, a cudaStream_t as a number, has passed this call; whatever fills them on another
stream is waited for.

Raises KernelArgumentError, with out untouched, or PlatformError where CUDA is missing or fails.)";

constexpr char kInt4PackDoc[] = R"(Packs a matrix from MatMulNBits' layout into records, as csrc/int4/int4.h has them.

records: uint8 [panels, groups * bytes of a record], filled; see int4_records_shape.
values: uint8 [N, groups * group / 2]. scales: float16 [N, groups]. group: 128, 64 or 32.

Raises KernelArgumentError, with records untouched, for anything else. int4_unpack is the inverse.)";

constexpr char kInt4RecordsShapeDoc[] =
    R"((panels, groups, bytes of a record) of a matrix [rows, columns] in groups of columns.

Raises KernelArgumentError where no records hold such a matrix.)";

constexpr char kInt4LinearDoc[] = R"(y = x W^T with four-bit weights, and activations quantized to eight bits per group.

y: float32 [rows, N], filled. x: float32 [rows, K]. records: as int4_pack makes them, at an address that is a multiple
of 64, of N rows and K columns rounded up to whole groups; for int4_gate_up, those of gate and up by turns: then
y = silu(x Wgate^T) * (x Wup^T).
threads: an upper bound, from 1. path: "auto" or one of int4_paths(). Neither changes a bit of y.

Raises KernelArgumentError, with y untouched, for anything else.)";

constexpr char kInt4QuantizeDoc[] = R"(Quantizes x float32 [rows, K] as int4_linear does.

values: int8 [rows, groups * group], scales: float32 [rows, groups], zero_terms: int32 [rows, groups], -8 times the sum of
a group's values; all filled.

Raises KernelArgumentError, with nothing written, for anything else.)";

constexpr char kAttentionDoc[] =
    R"(Causal attention with rotary positions over a KV cache, as csrc/attention/attention.h has it.

y: float32 [rows, heads * head_size], filled. qkv: float32 [rows, (heads + 2 * kv_heads) * head_size]. keys, values:
uint8 [kv_heads, blocks * block_bytes], appended to. block_bytes: of 16 positions; says the element type. first:
positions that the cache holds. cos, sin: float32 [positions, head_size / 2].
threads: an upper bound, from 1. path: "auto" or one of attention_paths(). Neither changes a bit of y.

Raises KernelArgumentError, with nothing written, for anything else.)";

constexpr char kInt8PackDoc[] = R"(Packs a matrix into records, as csrc/int8/int8.h has them.

records: uint8 [panels, bytes of a panel], filled; see int8_records_shape.
values: int8 [N, K], -127 to 127. scales and biases: float32 [N].

Raises KernelArgumentError, with records untouched, for anything else. int8_unpack is the inverse.)";

constexpr char kInt8RecordsShapeDoc[] = R"((panels, bytes of a panel) of a matrix [rows, columns].

Raises KernelArgumentError where no records hold such a matrix.)";

constexpr char kInt8LinearDoc[] =
    R"(y = x W^T + b with eight-bit weights, and activations quantized to eight bits per row.

y: float32 [rows, N], filled. x: float32 [rows, K]. records: as int8_pack makes them, at an address that is a multiple
of 64. gelu: whether y is gelu(x W^T + b). residual: float32 [rows, N] that is added afterwards, or None.
threads: an upper bound, from 1. path: "auto" or one of int8_paths(). Neither changes a bit of y.

Raises KernelArgumentError, with y untouched, for anything else.)";

constexpr char kInt8QuantizeDoc[] = R"(Quantizes x float32 [rows, K] as int8_linear does.

values: int8 [rows, K rounded up to a multiple of 64], scales: float32 [rows]; both filled.

Raises KernelArgumentError, with nothing written, for anything else.)";

PYBIND11_MODULE(_native, module) {
    module.doc() = "The native kernels. Arrays are used in place: nothing is copied, cast or kept.";
    module.attr("__version__") = BIOMEDGPT_VERSION;
    py::register_local_exception_translator(&biomedgpt::python::translate_error);
    module.def("splice", &splice, kSpliceDoc, py::arg("out"), py::arg("table"), py::arg("table_scales"),
               py::arg("segments"), py::arg("threads") = 1, py::arg("path") = "auto", py::arg("allow_16bit") = false);
    module.def("splice_cuda", &splice_cuda, kSpliceCudaDoc, py::arg("out"), py::arg("table"), py::arg("table_scales"),
               py::arg("segments"), py::arg("stream") = 0, py::arg("allow_16bit") = false);
    module.def("splice_paths", &splice_paths);
    module.def("causal_attention", &causal_attention, kAttentionDoc, py::arg("y"), py::arg("qkv"), py::arg("keys"),
               py::arg("values"), py::arg("block_bytes"), py::arg("first"), py::arg("cos"), py::arg("sin"),
               py::arg("threads") = 1, py::arg("path") = "auto");
    module.def("attention_paths", &attention_paths);
    module.def("int4_records_shape", &int4_records_shape, kInt4RecordsShapeDoc, py::arg("rows"), py::arg("columns"),
               py::arg("group"));
    module.def("int4_pack", &int4_pack, kInt4PackDoc, py::arg("records"), py::arg("values"), py::arg("scales"),
               py::arg("group"));
    module.def("int4_unpack", &int4_unpack, py::arg("values"), py::arg("scales"), py::arg("records"), py::arg("group"));
    module.def("int4_linear", &int4_multiply<biomedgpt::int4_linear>, kInt4LinearDoc, py::arg("y"), py::arg("x"),
               py::arg("records"), py::arg("group"), py::arg("threads") = 1, py::arg("path") = "auto");
    module.def("int4_gate_up", &int4_multiply<biomedgpt::int4_gate_up>, kInt4LinearDoc, py::arg("y"), py::arg("x"),
               py::arg("records"), py::arg("group"), py::arg("threads") = 1, py::arg("path") = "auto");
    module.def("int4_quantize", &int4_quantize, kInt4QuantizeDoc, py::arg("values"), py::arg("scales"),
               py::arg("zero_terms"), py::arg("x"), py::arg("group"), py::arg("path") = "auto");
    module.def("int4_paths", &int4_paths);
    module.def("int8_records_shape", &int8_records_shape, kInt8RecordsShapeDoc, py::arg("rows"), py::arg("columns"));
    module.def("int8_pack", &int8_pack, kInt8PackDoc, py::arg("records"), py::arg("values"), py::arg("scales"),
               py::arg("biases"));
    module.def("int8_unpack", &int8_unpack, py::arg("values"), py::arg("scales"), py::arg("biases"),
               py::arg("records"));
    module.def("int8_linear", &int8_linear, kInt8LinearDoc, py::arg("y"), py::arg("x"), py::arg("records"),
               py::arg("residual") = py::none(), py::arg("gelu") = false, py::arg("threads") = 1,
               py::arg("path") = "auto");
    module.def("int8_quantize", &int8_quantize, kInt8QuantizeDoc, py::arg("values"), py::arg("scales"), py::arg("x"),
               py::arg("path") = "auto");
    module.def("int8_paths", &int8_paths);
    module.def("cpu_features", &cpu_features);
    module.def("read_patterns", &read_patterns);
    module.def("read_memory", &read_memory, py::arg("words"), py::arg("pattern"));
    module.def("arithmetic_loops", &arithmetic_loops);
    module.def("run_arithmetic", &run_arithmetic, py::arg("name"), py::arg("kind"), py::arg("steps"));
    biomedgpt::python::bind_decoder(module, &make_decoder);
    biomedgpt::python::bind_head_layout(module);
    module.def("cuda_compiled", &biomedgpt::cuda_compiled);
    module.def("cuda_device_count", &biomedgpt::cuda_device_count);
}
