#include "common/dtype.h"

namespace biomedgpt {

int64_t size_of(DType dtype) {
    switch (dtype) {
        case DType::i8:
        case DType::u8:
            return 1;
        case DType::f16:
            return 2;
        case DType::f32:
        case DType::i32:
            return 4;
        case DType::i64:
            return 8;
    }
    return 0;
}

const char* name_of(DType dtype) {
    switch (dtype) {
        case DType::f32:
            return "float32";
        case DType::f16:
            return "float16";
        case DType::i8:
            return "int8";
        case DType::i32:
            return "int32";
        case DType::i64:
            return "int64";
        case DType::u8:
            return "uint8";
    }
    return "unknown";
}

std::string describe(const Matrix& matrix) {
    std::string text = name_of(matrix.dtype);
    text += " [" + std::to_string(matrix.rows) + ", " + std::to_string(matrix.columns) + "]";
    if (matrix.row_stride != matrix.columns && matrix.rows > 1) {
        text += " with row stride " + std::to_string(matrix.row_stride);
    }
    return text;
}

}  // namespace biomedgpt
