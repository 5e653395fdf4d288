#include "decoder/head_layout.h"

#include <cstring>

#include "int4/int4.h"

namespace biomedgpt {
namespace {

constexpr int64_t kColumns = 4, kBlockBytes = kInt4PanelRows * kColumns;
constexpr uint8_t kZero = 128;

}  // namespace

int64_t int8_head_bytes(int64_t rows, int64_t columns, int64_t group) {
    const Int4Shape shape{rows, columns, group};
    check_int4_shape(shape);
    return shape.panels() * shape.groups() * kInt4PanelRows * (group + 2);
}

void int8_head_pack(int64_t rows, int64_t columns, int64_t group, const uint8_t* values, const uint16_t* scales,
                    uint8_t* records) {
    const Int4Shape shape{rows, columns, group};
    check_int4_shape(shape);
    const int64_t record_bytes = kInt4PanelRows * (group + 2);
    for (int64_t row = 0; row < shape.panels() * kInt4PanelRows; ++row) {
        for (int64_t g = 0; g < shape.groups(); ++g) {
            uint8_t* record = records + (row / kInt4PanelRows * shape.groups() + g) * record_bytes;
            const int64_t in_panel = row % kInt4PanelRows, index = row * shape.groups() + g;
            for (int64_t block = 0; block < group / kColumns; ++block) {
                uint8_t* to = record + block * kBlockBytes + in_panel * kColumns;
                if (row < rows) {
                    std::memcpy(to, values + index * group + block * kColumns, kColumns);
                } else {
                    std::memset(to, kZero, kColumns);
                }
            }
            const uint16_t scale = row < rows ? scales[index] : uint16_t{0};
            std::memcpy(record + group * kInt4PanelRows + in_panel * 2, &scale, sizeof scale);
        }
    }
}

}  // namespace biomedgpt
