// Between MatMulNBits' blocks and records.
#include <cstring>

#include "int4/int4.h"

namespace biomedgpt {
namespace {

constexpr int64_t kColumnsPerWord = 8;  // columns of one row in a block of a record: four bytes, here and there
constexpr int64_t kWord = 4;
constexpr int64_t kBlockBytes = kInt4PanelRows * kWord;
constexpr uint8_t kPaddingByte = kInt4ZeroPoint | kInt4ZeroPoint << 4;

int four_bits(const uint8_t* word, int index) {
    return word[index / 2] >> (index % 2 * 4) & 15;
}

// From eight columns in sequence to four low and four high halves of bytes.
void pack_word(const uint8_t* from, uint8_t* to) {
    for (int j = 0; j < kWord; ++j) to[j] = static_cast<uint8_t>(four_bits(from, j) | four_bits(from, j + 4) << 4);
}

void unpack_word(const uint8_t* from, uint8_t* to) {
    for (int j = 0; j < kWord; j += 2) {
        to[j / 2] = static_cast<uint8_t>((from[j] & 15) | (from[j + 1] & 15) << 4);
        to[j / 2 + 2] = static_cast<uint8_t>(from[j] >> 4 | (from[j + 1] >> 4) << 4);
    }
}

// Where one row's values and scale of one group lie in records.
struct Place {
    int64_t values;
    int64_t scale;

    Place(const Int4Shape& shape, int64_t row, int64_t group) {
        const int64_t in_panel = row % kInt4PanelRows;
        const int64_t record = row / kInt4PanelRows * shape.panel_bytes() + group * shape.record_bytes();
        values = record + in_panel * kWord;
        scale = record + shape.group / kColumnsPerWord * kBlockBytes + in_panel * int64_t{sizeof(uint16_t)};
    }
};

void pack_row(const Int4Shape& shape, const Int4Blocks& blocks, int64_t row, uint8_t* records) {
    const int64_t group_bytes = shape.group / 2;
    for (int64_t group = 0; group < shape.groups(); ++group) {
        const Place place(shape, row, group);
        const int64_t index = row * shape.groups() + group;
        const bool exists = row < shape.rows;
        for (int64_t word = 0; word < group_bytes / kWord; ++word) {
            uint8_t* to = records + place.values + word * kBlockBytes;
            if (exists) {
                pack_word(blocks.values + index * group_bytes + word * kWord, to);
            } else {
                std::memset(to, kPaddingByte, kWord);
            }
        }
        const uint16_t scale = exists ? blocks.scales[index] : uint16_t{0};
        std::memcpy(records + place.scale, &scale, sizeof scale);
    }
}

void unpack_row(const Int4Shape& shape, const uint8_t* records, int64_t row, uint8_t* values, uint16_t* scales) {
    const int64_t group_bytes = shape.group / 2;
    for (int64_t group = 0; group < shape.groups(); ++group) {
        const Place place(shape, row, group);
        const int64_t index = row * shape.groups() + group;
        for (int64_t word = 0; word < group_bytes / kWord; ++word) {
            unpack_word(records + place.values + word * kBlockBytes, values + index * group_bytes + word * kWord);
        }
        std::memcpy(scales + index, records + place.scale, sizeof *scales);
    }
}

}  // namespace

void int4_pack(const Int4Shape& shape, const Int4Blocks& blocks, uint8_t* records, const ParallelFor& parallel) {
    check_int4_shape(shape);
    parallel(shape.panels(), [&](int64_t panel) {
        for (int64_t i = 0; i < kInt4PanelRows; ++i) pack_row(shape, blocks, panel * kInt4PanelRows + i, records);
    });
}

void int4_unpack(const Int4Shape& shape, const uint8_t* records, uint8_t* values, uint16_t* scales,
                 const ParallelFor& parallel) {
    check_int4_shape(shape);
    parallel(shape.rows, [&](int64_t row) { unpack_row(shape, records, row, values, scales); });
}

}  // namespace biomedgpt
