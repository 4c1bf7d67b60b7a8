// Products with weights that stay in blocks: 32 along K share a scale, as GGUF files have them.
//
// A tile has 16 columns. Of a block it holds, one behind the other,
//   the scales        of all columns, see the types below
//   4 x a step of 8   nibbles: a word a column, depth i in bits 4i ... 4i + 3; then, of five bits, a byte a column with
//                     the highest bit of depth i in bit i; of six bits, 16 bits a column with the highest two in 2i, 2i + 1
//                     bytes: [8][16], signed
// Some types have a head before every `span` blocks. Tiles that are `together` neighbours take turns, head and blocks of
// one before those of the next, so that they are read in one stream.
//
// Every weight becomes scale * number + shift in float32, rounded once, which is to the bit what dequantising it first
// gives. So a product does not depend on whether its weights are decoded in registers, for few rows, or in a panel.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "operands.h"

namespace {

// How the numbers of 16 columns lie in a step.
template <int bits>
struct Numbers {
  static_assert(bits == 4 || bits == 5 || bits == 6);
  static constexpr int64_t kStep = 64 + 16 * (bits - 4);
  Simd::Words low, high;
  ALWAYS_INLINE void load(const char* at) {
    low = Simd::load_words(at);
    if constexpr (bits == 5) high = Simd::load_bytes(at + 64);
    if constexpr (bits == 6) high = Simd::load_shorts(at + 64);
  }
  template <int i>
  ALWAYS_INLINE V get() const {
    const V v = Simd::field<4, 4 * i>(low);
    if constexpr (bits == 5) return Simd::add_where_bit<i>(v, high, Simd::set1(16.0f));
    if constexpr (bits == 6) return Simd::fma(Simd::field<2, 2 * i>(high), Simd::set1(16.0f), v);
    return v;
  }
};

struct Bytes {
  static constexpr int64_t kStep = 128;
  const char* at;
  ALWAYS_INLINE void load(const char* from) { at = from; }
  template <int i>
  ALWAYS_INLINE V get() const {
    return Simd::load_int8(at + 16 * i);
  }
};

// Sixteen numbers, by a nibble each.
struct Picked {
  static constexpr int64_t kStep = 64;
  Simd::Words low;
  ALWAYS_INLINE void load(const char* at) { low = Simd::load_words(at); }
  template <int i>
  ALWAYS_INLINE V get() const {
    alignas(64) static constexpr float kValues[] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                                    1,    13,   25,  38,  53,  69,  89,  113};
    return Simd::pick<4 * i>(low, kValues);
  }
};

// What a weight is made of beside its number.
struct Scales {
  V scale, shift;  // of the block or half block at hand
  V of_scales, of_shifts;  // of the head
};

// The types. kHead, kScales: bytes. kHalves: each half of a block has scales of its own.
struct WithoutHead {
  static constexpr int64_t kHead = 0;
  static constexpr bool kHalves = false, kShifts = true;
  static void head(Scales&, const char*) {}
};

template <int bits>
struct Symmetric : WithoutHead {  // a half-precision scale; numbers count from the middle of their range
  using In = Numbers<bits>;
  static constexpr int64_t kScales = 32;
  static ALWAYS_INLINE void scales(Scales& s, const char* at, int) {
    s.scale = Simd::load_half(at);
    s.shift = Simd::mul(s.scale, Simd::set1(float(-(1 << (bits - 1)))));
  }
};

template <int bits>
struct Affine : WithoutHead {  // a scale and a shift in half precision
  using In = Numbers<bits>;
  static constexpr int64_t kScales = 64;
  static ALWAYS_INLINE void scales(Scales& s, const char* at, int) {
    s.scale = Simd::load_half(at);
    s.shift = Simd::load_half(at + 32);
  }
};

template <class Kind>
struct Scaled : WithoutHead {  // a scale alone
  using In = Kind;
  static constexpr bool kShifts = false;
  static constexpr int64_t kScales = 32;
  static ALWAYS_INLINE void scales(Scales& s, const char* at, int) { s.scale = Simd::load_half(at); }
};

template <int bits>
struct SuperAffine {  // scale and shift are small numbers times those of 256 weights
  using In = Numbers<bits>;
  static constexpr int64_t kHead = 64, kScales = 32;
  static constexpr bool kHalves = false, kShifts = true;
  static ALWAYS_INLINE void head(Scales& s, const char* at) {
    s.of_scales = Simd::load_half(at);
    s.of_shifts = Simd::sub(Simd::zero(), Simd::load_half(at + 32));
  }
  static ALWAYS_INLINE void scales(Scales& s, const char* at, int) {
    s.scale = Simd::mul(s.of_scales, Simd::load_int8(at));
    s.shift = Simd::mul(s.of_shifts, Simd::load_int8(at + 16));
  }
};

struct SuperSymmetric {
  using In = Numbers<6>;
  static constexpr int64_t kHead = 32, kScales = 32;
  static constexpr bool kHalves = true, kShifts = true;
  static ALWAYS_INLINE void head(Scales& s, const char* at) { s.of_scales = Simd::load_half(at); }
  static ALWAYS_INLINE void scales(Scales& s, const char* at, int half) {
    s.scale = Simd::mul(s.of_scales, Simd::load_int8(at + 16 * half));
    s.shift = Simd::mul(s.scale, Simd::set1(-32.0f));
  }
};

struct Grouped {  // a float32 scale and shift for `span` blocks
  using In = Numbers<4>;
  static constexpr int64_t kHead = 128, kScales = 0;
  static constexpr bool kHalves = false, kShifts = true;
  static ALWAYS_INLINE void head(Scales& s, const char* at) {
    s.scale = Simd::load(reinterpret_cast<const float*>(at));
    s.shift = Simd::load(reinterpret_cast<const float*>(at + 64));
  }
  static ALWAYS_INLINE void scales(Scales&, const char*, int) {}
};

template <class F>
ALWAYS_INLINE void with_type(int32_t type, F&& f) {
  switch (type) {
    case kQ4_0: return f(Symmetric<4>());
    case kQ4_1: return f(Affine<4>());
    case kQ5_0: return f(Symmetric<5>());
    case kQ5_1: return f(Affine<5>());
    case kQ8_0: return f(Scaled<Bytes>());
    case kQ4_K: return f(SuperAffine<4>());
    case kQ5_K: return f(SuperAffine<5>());
    case kQ6_K: return f(SuperSymmetric());
    case kIQ4_NL: return f(Scaled<Picked>());
    default: return f(Grouped());
  }
}

// Decoding takes so many instructions a byte that the processor does not reach far enough ahead by itself: one row took
// twice as long without. Twice or half the distance made no difference.
constexpr int64_t kFetchedAhead = 2560;

// Reads a tile from its first block to its last.
template <class Type>
class BlockReader {
 public:
  static constexpr int64_t kBlock = Type::kScales + 4 * Type::In::kStep;

  ALWAYS_INLINE void open(const Tile& tile) {
    at_ = tile.data;
    others_ = (tile.together - 1) * (Type::kHead + tile.span * kBlock);
  }
  ALWAYS_INLINE void head() {
    Type::head(scales_, at_);
    at_ += Type::kHead;
  }
  ALWAYS_INLINE void half(int i) {
    if (i == 0 || Type::kHalves) Type::scales(scales_, at_, i);
  }
  ALWAYS_INLINE void step(int i) {
    in_.load(at_ + Type::kScales + i * Type::In::kStep);
    const char* ahead = at_ + kFetchedAhead + i * (kBlock / 4);
    _mm_prefetch(ahead, _MM_HINT_T0);
    if (kBlock > 256) _mm_prefetch(ahead + 64, _MM_HINT_T0);
  }
  ALWAYS_INLINE void end_block() { at_ += kBlock; }
  // The span is over.
  ALWAYS_INLINE void pass_others() { at_ += others_; }
  // The weights of depth i of the step.
  template <int i>
  ALWAYS_INLINE V weight() const {
    const V number = in_.template get<i>();
    if constexpr (Type::kShifts) return Simd::fma(number, scales_.scale, scales_.shift);
    return Simd::mul(number, scales_.scale);
  }

 private:
  const char* at_;
  int64_t others_;
  Scales scales_;
  typename Type::In in_;
};

// Reads tiles from[places[0]] ..., all of one type and span, and calls f(depth, readers) for each step of 8.
template <class Type, int tiles, class F>
ALWAYS_INLINE void read_blocks(const Tile* from, const int64_t* places, int64_t k, Ahead& ahead, F&& f) {
  BlockReader<Type> readers[tiles];
  for (int j = 0; j < tiles; ++j) readers[j].open(from[places[j]]);
  const int64_t span = from[places[0]].span;
  for (int64_t block = 0, left = 0, depth = 0; block < k / kBlockDepth; ++block) {
    if (left == 0) {
      left = span;
      for (int j = 0; j < tiles; ++j) readers[j].head();
    }
    for (int half = 0; half < 2; ++half) {
      ahead.fetch();
      for (int j = 0; j < tiles; ++j) readers[j].half(half);
      for (int step = 2 * half; step < 2 * half + 2; ++step, depth += 8) {
        for (int j = 0; j < tiles; ++j) readers[j].step(step);
        f(depth, readers);
      }
    }
    for (int j = 0; j < tiles; ++j) readers[j].end_block();
    if (--left == 0)
      for (int j = 0; j < tiles; ++j) readers[j].pass_others();
  }
}

template <class Kind, int i, class Type, int rows, int tiles>
ALWAYS_INLINE void add_weights(V (&acc)[rows][tiles], const typename Kind::A* const (&x)[rows], int64_t depth,
                               const BlockReader<Type> (&readers)[tiles]) {
  V even[tiles], odd[tiles];
  for (int j = 0; j < tiles; ++j) {
    even[j] = readers[j].template weight<i>();
    odd[j] = readers[j].template weight<i + 1>();
  }
  Kind::add_pair(acc, x, depth + i, even, odd);
}

// Calls f(integral_constant<n>) with n rows or a few more: every number of its own would double the time to compile.
template <class F>
ALWAYS_INLINE void with_some_rows(int64_t rows, F&& f) {
  if (rows == 1) return f(std::integral_constant<int, 1>());
  if (rows == 2) return f(std::integral_constant<int, 2>());
  if (rows <= 4) return f(std::integral_constant<int, 4>());
  if (rows <= 6) return f(std::integral_constant<int, 6>());
  return f(std::integral_constant<int, Simd::kMostRows>());
}

// out[i][16 places[j] ...] = a[i] · tile places[j] of the first `count` rows; the last one is computed again in the place
// of those that lack.
template <class Kind, class Type, int rows, int tiles>
void few_rows(const typename Kind::A* a, int64_t lda, int64_t count, const Tile* from, const int64_t* places, int64_t k,
              float* out, int64_t ldo, Ahead& ahead) {
  V acc[rows][tiles];
  const typename Kind::A* x[rows];
  for (int i = 0; i < rows; ++i) x[i] = a + std::min<int64_t>(i, count - 1) * lda;
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < tiles; ++j) acc[i][j] = Simd::zero();
  read_blocks<Type, tiles>(from, places, k, ahead, [&](int64_t depth, const BlockReader<Type>(&readers)[tiles])
                                               __attribute__((always_inline)) {
    add_weights<Kind, 0>(acc, x, depth, readers);
    add_weights<Kind, 2>(acc, x, depth, readers);
    add_weights<Kind, 4>(acc, x, depth, readers);
    add_weights<Kind, 6>(acc, x, depth, readers);
  });
  for (int i = 0; i < rows && i < count; ++i)
    for (int j = 0; j < tiles; ++j) Simd::store(out + i * ldo + places[j] * kLanes, acc[i][j]);
}

ALWAYS_INLINE void store_pair(float* to, V even, V odd) {
  Simd::store(to, even);
  Simd::store(to + kLanes, odd);
}
ALWAYS_INLINE void store_pair(uint16_t* to, V even, V odd) { Simd::store_rounded_pairs(to, even, odd); }

// A tile as products of many rows take it, [k][16] of float32 or [k/2][16][2] of bfloat16.
template <class B>
void decode_tile(const Tile& tile, int64_t k, B* to) {
  with_type(tile.type, [&](auto type) __attribute__((always_inline)) {
    using Type = decltype(type);
    const int64_t place = 0;
    Ahead ahead;
    ahead.expect_nothing();
    read_blocks<Type, 1>(&tile, &place, k, ahead, [&](int64_t depth, const BlockReader<Type>(&readers)[1])
                                             __attribute__((always_inline)) {
      B* at = to + depth * kLanes;
      store_pair(at, readers[0].template weight<0>(), readers[0].template weight<1>());
      store_pair(at + 2 * kLanes, readers[0].template weight<2>(), readers[0].template weight<3>());
      store_pair(at + 4 * kLanes, readers[0].template weight<4>(), readers[0].template weight<5>());
      store_pair(at + 6 * kLanes, readers[0].template weight<6>(), readers[0].template weight<7>());
    });
  });
}

}  // namespace
