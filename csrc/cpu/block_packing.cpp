// Weights in blocks: rows as files have them → tiles, and single rows of tiles → float32.
//
// Compiled for any x86-64 processor. blocks.h says how tiles lie in memory.

#include "block_packing.h"

#include <algorithm>
#include <cstring>

namespace {

constexpr int64_t kColumns = 16;

// Bytes of a tile's head, of the scales of a block, of a step of 8, and of a row's blocks that share a head in a file.
struct Layout {
  int64_t head, scales, step, source;
  int64_t block() const { return scales + 4 * step; }
};

Layout layout_of(int32_t type, int64_t span) {
  switch (type) {
    case kQ4_0: case kIQ4_NL: return {0, 32, 64, 18};
    case kQ4_1: return {0, 64, 64, 20};
    case kQ5_0: return {0, 32, 80, 22};
    case kQ5_1: return {0, 64, 80, 24};
    case kQ8_0: return {0, 32, 128, 34};
    case kQ4_K: return {64, 32, 64, 144};
    case kQ5_K: return {64, 32, 80, 176};
    case kQ6_K: return {32, 32, 96, 210};
    default: return {128, 0, 64, 8 + span * kBlockDepth / 2};
  }
}

// A block of one row: the numbers as they are stored, without what their type subtracts, and what stands beside them.
struct Block {
  uint8_t numbers[kBlockDepth];
  uint8_t head[8], scales[4];  // bytes of this column in a tile
};

// Low nibbles first, then the high ones of the same bytes.
void halves(const uint8_t* from, int64_t count, uint8_t* to) {
  for (int64_t i = 0; i < count; ++i) {
    to[i] = from[i] & 15;
    to[i + count] = from[i] >> 4;
  }
}

// Of 256 weights: the 6-bit scale and shift of the blocks, in 12 bytes.
void small_scales(const uint8_t* from, int64_t block, uint8_t* to) {
  if (block < 4) {
    to[0] = from[block] & 63;
    to[1] = from[block + 4] & 63;
  } else {
    const uint8_t low = from[block + 4];
    to[0] = uint8_t((low & 15) | (from[block - 4] >> 6) << 4);
    to[1] = uint8_t((low >> 4) | (from[block] >> 6) << 4);
  }
}

// Block `index` of those of a row that share a head. The forms are GGUF's (ggml's block structs), and of groups a
// float32 scale and shift and then the nibbles in order.
void read_source(int32_t type, const uint8_t* from, int64_t index, Block& block) {
  uint8_t* numbers = block.numbers;
  switch (type) {
    case kQ4_0: case kIQ4_NL:
      std::memcpy(block.scales, from, 2);
      return halves(from + 2, 16, numbers);
    case kQ4_1:
      std::memcpy(block.scales, from, 4);
      return halves(from + 4, 16, numbers);
    case kQ5_0: case kQ5_1: {
      const int64_t size = type == kQ5_0 ? 2 : 4;
      std::memcpy(block.scales, from, size);
      uint32_t high;
      std::memcpy(&high, from + size, 4);
      halves(from + size + 4, 16, numbers);
      for (int64_t i = 0; i < kBlockDepth; ++i) numbers[i] |= uint8_t((high >> i & 1) << 4);
      return;
    }
    case kQ8_0:
      std::memcpy(block.scales, from, 2);
      std::memcpy(numbers, from + 2, 32);
      return;
    case kQ4_K: case kQ5_K: {
      std::memcpy(block.head, from, 4);
      small_scales(from + 4, index, block.scales);
      const uint8_t* low = from + (type == kQ4_K ? 16 : 48) + index / 2 * 32;
      for (int64_t i = 0; i < kBlockDepth; ++i) {
        numbers[i] = index % 2 ? low[i] >> 4 : low[i] & 15;
        if (type == kQ5_K) numbers[i] |= uint8_t((from[16 + i] >> index & 1) << 4);
      }
      return;
    }
    case kQ6_K: {
      std::memcpy(block.head, from + 208, 2);
      std::memcpy(block.scales, from + 192 + 2 * index, 2);
      const uint8_t *low = from + index / 4 * 64 + index % 2 * 32, *high = from + 128 + index / 4 * 32;
      for (int64_t i = 0; i < kBlockDepth; ++i) {
        const uint8_t nibble = index % 4 < 2 ? low[i] & 15 : low[i] >> 4;
        numbers[i] = uint8_t(nibble | (high[i] >> 2 * (index % 4) & 3) << 4);
      }
      return;
    }
    default:
      std::memcpy(block.head, from, 8);
      for (int64_t i = 0; i < kBlockDepth; ++i) {
        const uint8_t pair = from[8 + (index * kBlockDepth + i) / 2];
        numbers[i] = i % 2 ? pair >> 4 : pair & 15;
      }
  }
}

// Bytes [count][16][size] of which one column is given or wanted.
void put_column(const uint8_t* from, int64_t count, int64_t size, int64_t column, char* to) {
  for (int64_t i = 0; i < count; ++i) std::memcpy(to + (i * kColumns + column) * size, from + i * size, size);
}
void get_column(const char* from, int64_t count, int64_t size, int64_t column, uint8_t* to) {
  for (int64_t i = 0; i < count; ++i) std::memcpy(to + i * size, from + (i * kColumns + column) * size, size);
}

// How many bytes one of the scales of a block has.
int64_t size_of_scale(int32_t type) { return type == kQ4_K || type == kQ5_K || type == kQ6_K ? 1 : 2; }
int64_t size_of_head(int32_t type) { return type == kGroups ? 4 : 2; }
int64_t num_bits(int32_t type) {
  switch (type) {
    case kQ5_0: case kQ5_1: case kQ5_K: return 5;
    case kQ6_K: return 6;
    case kQ8_0: return 8;
    default: return 4;
  }
}

void write_block(int32_t type, const Layout& layout, const Block& block, int64_t column, char* to) {
  const int64_t scale = size_of_scale(type), bits = num_bits(type);
  put_column(block.scales, layout.scales / kColumns / scale, scale, column, to);
  to += layout.scales;
  for (int64_t step = 0; step < 4; ++step, to += layout.step) {
    const uint8_t* numbers = block.numbers + 8 * step;
    if (bits == 8) {
      put_column(numbers, 8, 1, column, to);
      continue;
    }
    uint32_t low = 0, high = 0;
    for (int i = 0; i < 8; ++i) {
      low |= uint32_t(numbers[i] & 15) << 4 * i;
      high |= uint32_t(numbers[i] >> 4) << (bits - 4) * i;
    }
    std::memcpy(to + 4 * column, &low, 4);
    std::memcpy(to + 64 + (bits - 4) * column, &high, bits - 4);  // little-endian: its low bytes
  }
}

void read_block(int32_t type, const Layout& layout, const char* from, int64_t column, Block& block) {
  const int64_t scale = size_of_scale(type), bits = num_bits(type);
  get_column(from, layout.scales / kColumns / scale, scale, column, block.scales);
  from += layout.scales;
  for (int64_t step = 0; step < 4; ++step, from += layout.step) {
    uint8_t* numbers = block.numbers + 8 * step;
    if (bits == 8) {
      get_column(from, 8, 1, column, numbers);
      continue;
    }
    uint32_t low, high = 0;
    std::memcpy(&low, from + 4 * column, 4);
    std::memcpy(&high, from + 64 + (bits - 4) * column, bits - 4);
    for (int i = 0; i < 8; ++i)
      numbers[i] = uint8_t((low >> 4 * i & 15) | (high >> (bits - 4) * i & ((1u << (bits - 4)) - 1)) << 4);
  }
}

float from_half(const uint8_t* at) {
  uint16_t half;
  std::memcpy(&half, at, 2);
  const uint32_t sign = uint32_t(half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 1023;
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * float(fraction) * 0x1p-24f;
  const uint32_t bits = sign | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// scale * number + shift of depth i.
struct Line {
  float scale, shift;
};

Line line_of(int32_t type, const Block& block, int64_t half) {
  const auto of_head = [&](int64_t i) { return from_half(block.head + 2 * i); };
  const auto of_block = [&](int64_t i) { return from_half(block.scales + 2 * i); };
  switch (type) {
    case kQ4_0: return {of_block(0), of_block(0) * -8.0f};
    case kQ5_0: return {of_block(0), of_block(0) * -16.0f};
    case kQ4_1: case kQ5_1: return {of_block(0), of_block(1)};
    case kQ8_0: case kIQ4_NL: return {of_block(0), 0.0f};
    case kQ4_K: case kQ5_K: return {of_head(0) * float(block.scales[0]), -of_head(1) * float(block.scales[1])};
    case kQ6_K: {
      const float scale = of_head(0) * float(int8_t(block.scales[half]));
      return {scale, scale * -32.0f};
    }
    default: {
      Line line;
      std::memcpy(&line, block.head, sizeof(line));
      return line;
    }
  }
}

float number_of(int32_t type, uint8_t stored) {
  constexpr int8_t kPicked[] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
  return type == kQ8_0 ? float(int8_t(stored)) : type == kIQ4_NL ? float(kPicked[stored]) : float(stored);
}

}  // namespace

int64_t block_tile_bytes(int32_t type, int64_t span, int64_t k) {
  const Layout layout = layout_of(type, span);
  return k / kBlockDepth / span * (layout.head + span * layout.block());
}

void pack_block_tile(const uint8_t* rows, int64_t num_rows, int64_t k, const Tile& tile, char* to) {
  const Layout layout = layout_of(tile.type, tile.span);
  const int64_t spans = k / kBlockDepth / tile.span, span_bytes = layout.head + tile.span * layout.block();
  for (int64_t s = 0; s < spans; ++s, to += tile.together * span_bytes) {
    std::memset(to, 0, span_bytes);  // columns that are padding are zeros
    for (int64_t column = 0; column < num_rows; ++column) {
      const uint8_t* from = rows + (column * spans + s) * layout.source;
      Block block{};
      for (int64_t b = 0; b < tile.span; ++b) {
        read_source(tile.type, from, b, block);
        write_block(tile.type, layout, block, column, to + layout.head + b * layout.block());
      }
      const int64_t size = size_of_head(tile.type);
      put_column(block.head, layout.head / kColumns / size, size, column, to);
    }
  }
}

void decode_block_row(const Matrix& w, int64_t row, float* to) {
  const Tile& tile = static_cast<const Tile*>(w.data)[row / kColumns];
  const int64_t column = row % kColumns, size = size_of_head(tile.type);
  const Layout layout = layout_of(tile.type, tile.span);
  const int64_t spans = w.k / kBlockDepth / tile.span, span_bytes = layout.head + tile.span * layout.block();
  const char* from = tile.data;
  for (int64_t s = 0; s < spans; ++s, from += tile.together * span_bytes) {
    Block block;
    get_column(from, layout.head / kColumns / size, size, column, block.head);
    for (int64_t b = 0; b < tile.span; ++b, to += kBlockDepth) {
      read_block(tile.type, layout, from + layout.head + b * layout.block(), column, block);
      for (int64_t half = 0; half < 2; ++half) {
        const Line line = line_of(tile.type, block, half);
        // A scale of half precision times a number is exact: it makes no difference whether it is rounded before the sum.
        for (int64_t i = half * kBlockDepth / 2; i < (half + 1) * kBlockDepth / 2; ++i)
          to[i] = line.scale * number_of(tile.type, block.numbers[i]) + line.shift;
      }
    }
  }
}
