// Element types, and a typed view of a row-major matrix that owns nothing.
#pragma once

#include <cstdint>
#include <string>

namespace biomedgpt {

enum class DType { f32, f16, i8, i32, i64, u8 };

int64_t size_of(DType dtype);
const char* name_of(DType dtype);

struct Matrix {
    const void* data = nullptr;
    DType dtype = DType::f32;
    int64_t rows = 0;
    int64_t columns = 0;
    int64_t row_stride = 0;  // in elements; the columns of a row are always adjacent

    const void* at(int64_t row, int64_t column) const {
        return static_cast<const char*>(data) + (row * row_stride + column) * size_of(dtype);
    }
};

// "float16 [32000, 4096]", as error messages show it.
std::string describe(const Matrix& matrix);

}  // namespace biomedgpt
