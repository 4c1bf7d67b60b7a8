// The kernels, written once over `Simd`; each isa_*.cpp includes this with the flags of its instruction set.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "api.h"
#include "parallel.h"

namespace {

#define ALWAYS_INLINE inline __attribute__((always_inline))

using V = Simd::V;
constexpr int kLanes = 16;
constexpr float kLog2E = 1.44269504f;  // e^x = 2^(x log2(e))
constexpr int64_t kMaxHeadDim = 512;
constexpr int64_t kMostUnitRows = 128;  // at least kUnitQueries; one token may have that many in a KV head

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// 2^x, as precise as its use: polynomials over [0, 1) fitted by weighted least squares, with relative errors below 8e-8
// for what stays float32 and 8e-5 for what becomes bfloat16 (whose step is 4e-3), times a power of two.
template <class A>
ALWAYS_INLINE V exp2(V x) {
  const V f = Simd::fraction(x);
  V p;
  if constexpr (std::is_same_v<A, float>) {
    p = Simd::set1(1.877575555e-3f);
    p = Simd::fma(p, f, Simd::set1(8.989342804e-3f));
    p = Simd::fma(p, f, Simd::set1(5.582631577e-2f));
    p = Simd::fma(p, f, Simd::set1(2.401536178e-1f));
    p = Simd::fma(p, f, Simd::set1(6.931530731e-1f));
    p = Simd::fma(p, f, Simd::set1(9.999999251e-1f));
  } else {
    p = Simd::set1(7.802442484e-2f);
    p = Simd::fma(p, f, Simd::set1(2.260672948e-1f));
    p = Simd::fma(p, f, Simd::set1(6.958334925e-1f));
    p = Simd::fma(p, f, Simd::set1(9.999252208e-1f));
  }
  return Simd::scale(p, x);
}

// Operand kinds ------------------------------------------------------------------------------------------------------
//
// A: what multiplies from the left, row-major in memory. B: packed, from the right. kDepth: elements along K of a step,
// which takes 16 * kDepth elements of B.

// Kinds whose sums are registers of 16 lanes.
struct InLanes {
  static constexpr int kMostRows = Simd::kMostRows;
  static constexpr int kQueryRows = Simd::kMostRows;
  // What the processor is told before products of so many rows: nothing.
  struct Session {
    void rows(int64_t) {}
  };
};

// acc[i][j] += x[i] w[j], with x[i] at a[i * lda]
template <int rows, int tiles>
ALWAYS_INLINE void add_outer(V (&acc)[rows][tiles], const float* a, int64_t lda, const V (&w)[tiles]) {
  for (int i = 0; i < rows; ++i) {
    const V x = Simd::set1(a[i * lda]);
    for (int j = 0; j < tiles; ++j) acc[i][j] = Simd::fma(x, w[j], acc[i][j]);
  }
}

struct Float32 : InLanes {
  using A = float;
  using B = float;
  static constexpr int kDepth = 1;
  static constexpr Format kFormat = kFloat32;

  template <int rows, int tiles>
  static ALWAYS_INLINE void step(V (&acc)[rows][tiles], const A* a, int64_t lda, const B* const (&b)[tiles]) {
    V w[tiles];
    for (int j = 0; j < tiles; ++j) w[j] = Simd::load(b[j]);
    add_outer(acc, a, lda, w);
  }
};

struct WidenedBf16 : InLanes {
  using A = float;
  using B = uint16_t;
  static constexpr int kDepth = 2;
  static constexpr Format kFormat = kBFloat16;

  template <int rows, int tiles>
  static ALWAYS_INLINE void step(V (&acc)[rows][tiles], const A* a, int64_t lda, const B* const (&b)[tiles]) {
    V w[tiles];
    for (int j = 0; j < tiles; ++j) w[j] = Simd::even(b[j]);
    add_outer(acc, a, lda, w);
    for (int j = 0; j < tiles; ++j) w[j] = Simd::odd(b[j]);
    add_outer(acc, a + 1, lda, w);
  }
};

#ifdef __AVX512BF16__
struct DotBf16 : InLanes {
  using A = uint16_t;
  using B = uint16_t;
  static constexpr int kDepth = 2;
  static constexpr Format kFormat = kBFloat16;

  template <int rows, int tiles>
  static ALWAYS_INLINE void step(V (&acc)[rows][tiles], const A* a, int64_t lda, const B* const (&b)[tiles]) {
    __m512bh w[tiles];
    for (int j = 0; j < tiles; ++j) w[j] = (__m512bh)_mm512_loadu_si512(b[j]);
    for (int i = 0; i < rows; ++i) {
      int32_t pair;
      std::memcpy(&pair, a + i * lda, 4);
      const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
      for (int j = 0; j < tiles; ++j) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], x, w[j]);
    }
  }
};
#endif

struct WidenedInt8 : InLanes {
  using A = float;
  using B = int8_t;
  static constexpr int kDepth = 4;
  static constexpr Format kFormat = kInt8;

  template <int rows, int tiles>
  static ALWAYS_INLINE void step(V (&acc)[rows][tiles], const A* a, int64_t lda, const B* const (&b)[tiles]) {
    add<0>(acc, a, lda, b);
    add<1>(acc, a, lda, b);
    add<2>(acc, a, lda, b);
    add<3>(acc, a, lda, b);
  }

 private:
  template <int depth, int rows, int tiles>
  static ALWAYS_INLINE void add(V (&acc)[rows][tiles], const A* a, int64_t lda, const B* const (&b)[tiles]) {
    V w[tiles];
    for (int j = 0; j < tiles; ++j) w[j] = Simd::byte<depth>(b[j]);
    add_outer(acc, a + depth, lda, w);
  }
};

#ifdef __AVX512BF16__
struct DotInt8 : InLanes {
  using A = uint16_t;
  using B = int8_t;
  static constexpr int kDepth = 4;
  static constexpr Format kFormat = kInt8;

  template <int rows, int tiles>
  static ALWAYS_INLINE void step(V (&acc)[rows][tiles], const A* a, int64_t lda, const B* const (&b)[tiles]) {
    __m512bh first[tiles], second[tiles];
    for (int j = 0; j < tiles; ++j) {
      // Whole numbers below 256 are exact in bfloat16.
      first[j] = (__m512bh)Simd::pairs(Simd::byte<0>(b[j]), Simd::byte<1>(b[j]));
      second[j] = (__m512bh)Simd::pairs(Simd::byte<2>(b[j]), Simd::byte<3>(b[j]));
    }
    for (int i = 0; i < rows; ++i) {
      int32_t pair[2];
      std::memcpy(pair, a + i * lda, 8);
      const __m512bh x = (__m512bh)_mm512_set1_epi32(pair[0]), y = (__m512bh)_mm512_set1_epi32(pair[1]);
      for (int j = 0; j < tiles; ++j) {
        acc[i][j] = _mm512_dpbf16_ps(acc[i][j], x, first[j]);
        acc[i][j] = _mm512_dpbf16_ps(acc[i][j], y, second[j]);
      }
    }
  }
};
#endif

template <class Kind>
constexpr bool kInTiles = !std::is_base_of_v<InLanes, Kind>;

// Beside a kind: those that take int8 weights, few rows at a time and, made bfloat16 first, many.
template <class Kind>
struct ForInt8 {
  using Few = WidenedInt8;
  using Many = WidenedBf16;
};
#ifdef __AVX512BF16__
template <>
struct ForInt8<DotBf16> {
  using Few = DotInt8;
  using Many = DotBf16;
};
#endif
#ifdef __AMX_BF16__
template <>
struct ForInt8<TilesBf16> {
  using Many = TilesBf16;
};
#endif

inline void store_row(float* out, V v) { Simd::store(out, v); }
inline void store_row(uint16_t* out, V v) { Simd::store_bf16(out, v); }

// Memory that will be read --------------------------------------------------------------------------------------------

constexpr int64_t kKeys = 512;  // keys whose scores are in memory at a time
constexpr int64_t kKeyTiles = kKeys / kLanes;

// What a thread reads in its next unit of work, fetched into the second-level cache line after line while it computes.
// Otherwise the first rows of a unit wait for memory and the others leave it idle. Requested in one burst, or in leaps
// from page to page, the lines would hold up the products behind them.
class Ahead {
 public:
  void expect_nothing() {
    count_ = next_piece_ = 0;
    next_ = end_ = nullptr;
  }
  // One more piece; all pieces of a unit have the same size.
  void expect(const void* start, int64_t bytes) {
    pieces_[count_++] = static_cast<const char*>(start);
    bytes_ = bytes;
  }
  // All of it shall be fetched in `calls` calls of fetch().
  void spread(int64_t calls) { lines_ = ceil_div(count_ * bytes_, 64 * std::max<int64_t>(calls, 1)); }

  ALWAYS_INLINE void fetch() {
    for (int64_t i = 0; i < lines_; ++i, next_ += 64) {
      if (next_ >= end_) {
        if (next_piece_ == count_) return;
        next_ = pieces_[next_piece_++];
        end_ = next_ + bytes_;
      }
      _mm_prefetch(next_, _MM_HINT_T1);
    }
  }

 private:
  const char* pieces_[2 * kKeyTiles];
  int64_t count_ = 0, next_piece_ = 0, bytes_ = 0, lines_ = 0;
  const char *next_ = nullptr, *end_ = nullptr;
};

// Where a few rows read memory once, or tile registers outrun it, its speed is the limit and the processor's own
// prefetchers reach it better: decoding 8 sequences in tiles took a third longer with than without.
template <class Kind>
inline bool looks_ahead(int64_t rows) {
  return !kInTiles<Kind> && rows > Simd::kRows;
}

// Matrix products ----------------------------------------------------------------------------------------------------

constexpr int64_t kStepsBetween = 16;  // of a product, between two fetches of what comes next

// acc[i][j] += sum over `steps` of a[i] b[j]
template <class Kind, int rows, int tiles>
ALWAYS_INLINE void multiply(V (&acc)[rows][tiles], const typename Kind::A* a, int64_t lda,
                            const typename Kind::B* const (&start)[tiles], int64_t steps, Ahead& ahead) {
  const typename Kind::B* b[tiles];
  for (int j = 0; j < tiles; ++j) b[j] = start[j];
  for (int64_t s = 0; s < steps;) {
    ahead.fetch();
    for (const int64_t end = std::min(steps, s + kStepsBetween); s < end; ++s) {
      Kind::step(acc, a, lda, b);
      a += Kind::kDepth;
      for (int j = 0; j < tiles; ++j) b[j] += kLanes * Kind::kDepth;
    }
  }
}

// out[i][16 j ...] = a[i] · tile j, for tiles whose starts are given by `tile(j)`.
template <class Kind, int rows, int tiles, class TileAt>
ALWAYS_INLINE void block_of(const typename Kind::A* a, int64_t lda, TileAt&& tile, int64_t steps, float* out,
                            int64_t ldo, Ahead& ahead) {
  V acc[rows][tiles];
  const typename Kind::B* b[tiles];
  for (int j = 0; j < tiles; ++j) b[j] = tile(j);
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < tiles; ++j) acc[i][j] = Simd::zero();
  multiply<Kind>(acc, a, lda, b, steps, ahead);
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < tiles; ++j) Simd::store(out + i * ldo + j * kLanes, acc[i][j]);
}

// Calls f(integral_constant<rows>) for a run-time number of rows, 1 ... 8.
template <class F>
ALWAYS_INLINE void with_rows(int64_t rows, F&& f) {
  switch (rows) {
    case 1: return f(std::integral_constant<int, 1>());
    case 2: return f(std::integral_constant<int, 2>());
    case 3: return f(std::integral_constant<int, 3>());
    case 4: return f(std::integral_constant<int, 4>());
    case 5: return f(std::integral_constant<int, 5>());
    case 6: return f(std::integral_constant<int, 6>());
    case 7: return f(std::integral_constant<int, 7>());
    default: return f(std::integral_constant<int, 8>());
  }
}
static_assert(Simd::kMostRows <= 8);

// Tiles that rows take at a time: what the registers hold.
constexpr int tiles_for(int rows) { return rows <= Simd::kRows || Simd::kTiles == 1 ? Simd::kTiles : Simd::kTiles / 2; }

// How many of the rows that are left go together, `most` at a time: in lanes no small remainder, for which the weights
// would be read once more.
template <class Kind>
inline int64_t next_rows(int64_t left, int64_t most) {
  return left <= most ? left : kInTiles<Kind> ? most : Simd::kRows;
}

// How often a product in lanes fetches what comes next.
inline int64_t num_fetches(int64_t rows, int64_t tiles, int64_t steps) {
  return ceil_div(rows, Simd::kRows) * ceil_div(tiles, Simd::kTiles) * ceil_div(steps, kStepsBetween);
}

// out[0 ... rows)[0 ... 16 tiles) = a · tiles; any number of tiles. `again`: the tiles are in a cache from rows before.
template <class Kind, class TileAt>
ALWAYS_INLINE void product(const typename Kind::A* a, int64_t lda, int64_t rows, TileAt&& tile, int64_t tiles,
                           int64_t steps, float* out, int64_t ldo, [[maybe_unused]] Ahead& ahead,
                           [[maybe_unused]] bool again) {
  if constexpr (kInTiles<Kind>) {
    Kind::product(a, lda, rows, tile, tiles, steps, out, ldo, again);
  } else {
    with_rows(rows, [&](auto r) {
      constexpr int wide = tiles_for(decltype(r)::value);
      int64_t j = 0;
      for (; j + wide <= tiles; j += wide)
        block_of<Kind, r, wide>(a, lda, [&](int i) { return tile(j + i); }, steps, out + j * kLanes, ldo, ahead);
      for (; j < tiles; ++j)
        block_of<Kind, r, 1>(a, lda, [&](int) { return tile(j); }, steps, out + j * kLanes, ldo, ahead);
    });
  }
}

// What happens to a finished block of a linear layer: rows × (16 tiles) of float32, bias and int8 factors applied.
struct Store {
  float* out;
  int64_t ldo;
  void operator()(int64_t row, int64_t column, const float* block, int64_t width) const {
    std::memcpy(out + row * ldo + column, block, width * sizeof(float));
  }
};

struct Accumulate {
  float* out;
  int64_t ldo;
  void operator()(int64_t row, int64_t column, const float* block, int64_t width) const {
    float* to = out + row * ldo + column;
    for (int64_t i = 0; i < width; ++i) to[i] += block[i];
  }
};

// Keeps the highest of each piece of kUnitColumns alone, and its column, the first of equals.
struct Highest {
  float* values;      // [rows][pieces]
  int64_t* indices;
  int64_t pieces;
  void operator()(int64_t row, int64_t column, const float* block, int64_t width) const {
    const float* top = std::max_element(block, block + width);
    const int64_t at = row * pieces + column / kUnitColumns;
    values[at] = *top;
    indices[at] = column + (top - block);
  }
};

// Columns alternate, 16 of the gate and 16 of the up projection; writes silu(gate) · up.
template <class A>
struct SiluMul {
  A* out;
  int64_t ldo;
  void operator()(int64_t row, int64_t column, const float* block, int64_t width) const {
    A* to = out + row * ldo + column / 2;
    for (int64_t i = 0; i < width; i += 2 * kLanes, to += kLanes) {
      const V gate = Simd::load(block + i), up = Simd::load(block + i + kLanes);
      const V power = exp2<A>(Simd::mul(gate, Simd::set1(-kLog2E)));
      store_row(to, Simd::mul(Simd::div(gate, Simd::add(Simd::set1(1.0f), power)), up));
    }
  }
};

// A unit of work is kUnitColumns of up to kUnitRows rows.
constexpr int64_t kUnitTiles = kUnitColumns / kLanes;
constexpr int64_t kUnitRows = 192;

template <class Kind, class Epilogue>
inline void linear_unit(const typename Kind::A* x, int64_t lda, int64_t first_row, int64_t end_row, const Matrix& w,
                        const typename Kind::B* tiles, int64_t column, int64_t count, Epilogue& epilogue, Ahead& ahead) {
  const int64_t stride = w.k * kLanes, steps = w.k / Kind::kDepth, width = std::min(count * kLanes, w.n - column);
  alignas(64) float block[Kind::kMostRows * kUnitColumns];
  typename Kind::Session session;
  ahead.spread(num_fetches(end_row - first_row, count, steps));
  for (int64_t row = first_row, some; row < end_row; row += some) {
    some = next_rows<Kind>(end_row - row, Kind::kMostRows);
    session.rows(some);
    product<Kind>(x + row * lda, lda, some, [&](int64_t j) { return tiles + j * stride; }, count, steps, block,
                  kUnitColumns, ahead, row > first_row);
    for (int64_t i = 0; i < some; ++i) {
      float* line = block + i * kUnitColumns;
      if (w.scale)
        for (int64_t j = 0; j < width; ++j) line[j] *= w.scale[column + j];
      if (w.bias)
        for (int64_t j = 0; j < width; ++j) line[j] += w.bias[column + j];
      epilogue(row + i, column, line, width);
    }
  }
}

// int8 tiles → bfloat16 tiles; exact.
inline void expand_int8(const int8_t* from, int64_t size, uint16_t* to) {
  for (int64_t i = 0; i < size; i += 64) {
    Simd::store_pairs(to + i, Simd::byte<0>(from + i), Simd::byte<1>(from + i));
    Simd::store_pairs(to + i + 32, Simd::byte<2>(from + i), Simd::byte<3>(from + i));
  }
}

// The units of a linear layer; those that run at the same time share their weights.
struct LinearUnits {
  const Matrix& w;
  int64_t rows, tiles, row_units, count;

  LinearUnits(const Matrix& w, int64_t rows)
      : w(w), rows(rows), tiles(ceil_div(w.n, kLanes)), row_units(ceil_div(rows, kUnitRows)),
        count(ceil_div(tiles, kUnitTiles) * row_units) {}

  int64_t first_tile(int64_t unit) const { return unit / row_units * kUnitTiles; }
  int64_t num_tiles(int64_t unit) const { return std::min(kUnitTiles, tiles - first_tile(unit)); }
  const char* weights(int64_t unit) const {
    return static_cast<const char*>(w.data) + first_tile(unit) * kLanes * w.k * size_of(w.format);
  }
  void expect(int64_t unit, Ahead& ahead) const {
    if (unit < count) ahead.expect(weights(unit), num_tiles(unit) * kLanes * w.k * size_of(w.format));
  }

 private:
  static int64_t size_of(int32_t format) { return format == kFloat32 ? 4 : format == kBFloat16 ? 2 : 1; }
};

// Expects what this thread will read after unit `i`: threads take turns as long as units are alike. Past the end,
// `then(j, ahead)` expects what unit `j` of the next phase reads.
template <class Units, class Then>
ALWAYS_INLINE void look_ahead(const Member& member, const Units& units, int64_t i, Ahead& ahead, Then&& then) {
  const int64_t next = i + member.team_size();
  if (next < units.count)
    units.expect(next, ahead);
  else
    then(next - units.count, ahead);
}

// x Wᵀ + b, every finished piece given to `epilogue`. `Kind` says what `x` is and how weights of its own format
// multiply; int8 weights go with every kind. `then(i, ahead)` expects what unit `i` of the next phase reads.
template <class Kind, class Epilogue, class Then>
void linear(Member& member, const Buffers& buffers, const typename Kind::A* x, int64_t lda, int64_t rows,
            const Matrix& w, Epilogue epilogue, Then&& then) {
  const LinearUnits units(w, rows);
  Ahead ahead;
  member.for_each(units.count, [&](int64_t unit) {
    const int64_t count = units.num_tiles(unit), column = units.first_tile(unit) * kLanes;
    const int64_t row = unit % units.row_units * kUnitRows, end = std::min(rows, row + kUnitRows);
    ahead.expect_nothing();
    if (looks_ahead<Kind>(end - row)) look_ahead(member, units, unit, ahead, then);
    const char* weights = units.weights(unit);
    if (w.format != kInt8) {
      linear_unit<Kind>(x, lda, row, end, w, reinterpret_cast<const typename Kind::B*>(weights), column, count,
                        epilogue, ahead);
      return;
    }
    const auto* data = reinterpret_cast<const int8_t*>(weights);
    if constexpr (!kInTiles<Kind>)
      if (end - row <= Simd::kMostRows)
        return linear_unit<typename ForInt8<Kind>::Few>(x, lda, row, end, w, data, column, count, epilogue, ahead);
    uint16_t* panel = buffers.panels + member.index * buffers.panel_size;
    expand_int8(data, count * kLanes * w.k, panel);
    linear_unit<typename ForInt8<Kind>::Many>(x, lda, row, end, w, panel, column, count, epilogue, ahead);
  });
}

// Small operations ---------------------------------------------------------------------------------------------------

template <class A>
inline void rms_norm_row(const float* x, int64_t size, const float* weight, float eps, A* out) {
  V squares = Simd::zero();
  for (int64_t i = 0; i < size; i += kLanes) {
    const V v = Simd::load(x + i);
    squares = Simd::fma(v, v, squares);
  }
  const V factor = Simd::set1(1.0f / std::sqrt(Simd::sum(squares) / float(size) + eps));
  for (int64_t i = 0; i < size; i += kLanes)
    store_row(out + i, Simd::mul(Simd::mul(Simd::load(x + i), factor), Simd::load(weight + i)));
}

// Sets the values in the lanes after `lane` to 0, in one head's tile.
template <class C>
inline void clear_values_after(C* tile, int64_t lane, int64_t d) {
  for (C* to = tile; to < tile + kLanes * d; to += kLanes * kLanes) {
    if constexpr (std::is_same_v<C, float>) {
      std::memset(to + (lane + 1) * kLanes, 0, (kLanes - 1 - lane) * kLanes * sizeof(C));
    } else {
      for (int64_t i = 0; lane % 2 == 0 && i < kLanes; ++i) to[(lane / 2 * kLanes + i) * 2 + 1] = 0;
      std::memset(to + (lane / 2 + 1) * 2 * kLanes, 0, (kLanes / 2 - 1 - lane / 2) * 2 * kLanes * sizeof(C));
    }
  }
}

// q and k of one token are turned (Su et al., 2021; first half against second half), K and V written into their tiles,
// and `take_q(head, turned)` called for each query head.
template <class C, class TakeQ>
inline void rope_and_write_token(const Stack& stack, const Batch& batch, int64_t token, const float* qkv, C* k_cache,
                                 C* v_cache, TakeQ&& take_q) {
  const int64_t heads = stack.num_heads, kv_heads = stack.num_kv_heads, d = stack.head_dim, half = d / 2;
  const float* cosines = stack.cos_sin + batch.positions[token] * d;
  const float* sines = cosines + half;
  const int64_t slot = batch.slots[token], tile = slot / kLanes, lane = slot % kLanes;
  constexpr int64_t kDepth = sizeof(float) / sizeof(C);  // elements along K that lie together in a packed matrix
  alignas(64) float turned[kMaxHeadDim];
  alignas(64) C stored[kMaxHeadDim];
  for (int64_t h = 0; h < heads + kv_heads; ++h) {
    const float* x = qkv + h * d;
    for (int64_t i = 0; i < half; ++i) {
      turned[i] = x[i] * cosines[i] - x[half + i] * sines[i];
      turned[half + i] = x[half + i] * cosines[i] + x[i] * sines[i];
    }
    if (h < heads) {
      take_q(h, turned);
      continue;
    }
    C* to = k_cache + (tile * kv_heads + h - heads) * kLanes * d;
    for (int64_t i = 0; i < d; i += kLanes) store_row(stored + i, Simd::load(turned + i));
    for (int64_t i = 0; i < d; i += kDepth)
      std::memcpy(to + i * kLanes + lane * kDepth, stored + i, sizeof(C) * kDepth);
  }
  // Tiles are multiplied whole, values after the last key by 0: an infinity or NaN that a former owner of the block left
  // there would spread. So the first run of tokens that is written into a tile clears what comes after it.
  auto in_tile = [&](int64_t other) {
    return other >= 0 && other < batch.num_tokens && batch.slots[other] / kLanes == tile;
  };
  const bool clears = !in_tile(token + 1) && (lane == 0 || in_tile(token - 1));
  for (int64_t h = 0; h < kv_heads; ++h) {
    const float* x = qkv + (heads + kv_heads + h) * d;
    C* to = v_cache + (tile * kv_heads + h) * kLanes * d;
    if (clears) clear_values_after(to, lane, d);
    for (int64_t i = 0; i < d; i += kLanes, to += kLanes * kLanes) {
      store_row(stored, Simd::load(x + i));
      for (int64_t j = 0; j < kLanes; ++j) to[(lane / kDepth * kLanes + j) * kDepth + lane % kDepth] = stored[j];
    }
  }
}

// Attention ----------------------------------------------------------------------------------------------------------

// Where the keys and values of one KV head lie, a tile of 16 slots at a time.
template <class C>
struct HeadTiles {
  const C *k_cache, *v_cache;
  const AttentionUnit* unit;
  int64_t per_block;  // tiles of a block
  int64_t kv_heads, kv_head, size;

  // Elements before the tile.
  int64_t at(int64_t tile) const {
    const int64_t index = unit->table == nullptr ? unit->first_slot / kLanes + tile
                                                 : unit->table[tile / per_block] * per_block + tile % per_block;
    return (index * kv_heads + kv_head) * size;
  }
  // The first keys from `first_key` on, then their values.
  void expect(int64_t first_key, Ahead& ahead) const {
    const int64_t first = first_key / kLanes;
    const int64_t end = std::min(first + kKeyTiles, ceil_div(unit->end_key, kLanes));
    for (const C* cache : {k_cache, v_cache})
      for (int64_t tile = first; tile < end; ++tile) ahead.expect(cache + at(tile), size * int64_t(sizeof(C)));
  }
};

// What the softmax of some rows of queries needs between one run of keys and the next.
struct SoftmaxRows {
  float* base;   // of the weights 2^(score - base); kHidden until a key is visible
  float* shift;  // what is subtracted: the base, or 0 where there is none yet, so that hidden scores weigh nothing
  float* lanes;  // [row][kLanes] sums of weights, not yet added up over the lanes
  float* sums;   // [row][d] sums of weighted values

  SoftmaxRows from(int64_t row, int64_t d) const {
    return {base + row, shift + row, lanes + row * kLanes, sums + row * d};
  }
};

// As online softmax does (Milakov and Gimelshein, 2018), but a base follows the highest score only when that has left
// it far behind: any base will do while no weight overflows.
template <int rows>
ALWAYS_INLINE void raise_bases(const float* scores, int64_t tiles, const SoftmaxRows& state, int64_t d) {
  constexpr float kFar = 40.0f;
  V tops[rows], most = Simd::set1(kHidden);
  for (int i = 0; i < rows; ++i) {
    tops[i] = Simd::load(scores + i * kKeys);
    for (int64_t t = 1; t < tiles; ++t) tops[i] = Simd::max(tops[i], Simd::load(scores + i * kKeys + t * kLanes));
    most = Simd::max(most, Simd::sub(tops[i], Simd::set1(state.base[i])));
  }
  if (!Simd::any_above(most, Simd::set1(kFar))) return;
  for (int i = 0; i < rows; ++i) {
    const float next = Simd::highest(tops[i]);
    if (next - state.base[i] <= kFar) continue;
    const V factor = Simd::set1(state.base[i] == kHidden ? 0.0f : std::exp2(state.base[i] - next));
    state.base[i] = state.shift[i] = next;
    Simd::store(state.lanes + i * kLanes, Simd::mul(Simd::load(state.lanes + i * kLanes), factor));
    for (float* sum = state.sums + i * d; sum < state.sums + (i + 1) * d; sum += kLanes)
      Simd::store(sum, Simd::mul(Simd::load(sum), factor));
  }
}

// Weights of one tile of keys.
template <int rows, class A>
ALWAYS_INLINE void weigh(const float* scores, const SoftmaxRows& state, A* weights) {
  for (int i = 0; i < rows; ++i) {
    const V p = exp2<A>(Simd::sub(Simd::load(scores + i * kKeys), Simd::set1(state.shift[i])));
    Simd::store(state.lanes + i * kLanes, Simd::add(Simd::load(state.lanes + i * kLanes), p));
    store_row(weights + i * kKeys, p);
  }
}

// sums[i][16 column ...] += weights[i] · values, over `count` tiles of 16 keys. Where the weights are still scores, those
// of the next tile are made while this one is multiplied: the powers then take turns with the products in the
// processor's units instead of following them.
template <class Kind, int rows, int tiles, bool weighs, class C>
ALWAYS_INLINE void add_values(const float* scores, typename Kind::A* weights, const C* const* v_tiles, int64_t count,
                              int64_t column, const SoftmaxRows& state, int64_t d, Ahead& ahead) {
  if constexpr (weighs) weigh<rows>(scores, state, weights);
  V acc[rows][tiles];
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < tiles; ++j) acc[i][j] = Simd::load(state.sums + i * d + (column + j) * kLanes);
  for (int64_t t = 0; t < count; ++t) {
    if constexpr (weighs)
      if (t + 1 < count) weigh<rows>(scores + (t + 1) * kLanes, state, weights + (t + 1) * kLanes);
    const C* b[tiles];
    for (int j = 0; j < tiles; ++j) b[j] = v_tiles[t] + (column + j) * kLanes * kLanes;
    multiply<Kind>(acc, weights + t * kLanes, kKeys, b, kLanes / Kind::kDepth, ahead);
  }
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < tiles; ++j) Simd::store(state.sums + i * d + (column + j) * kLanes, acc[i][j]);
}

// The weights of `rows`, up to Simd::kMostRows, from their scores, and their products with the values.
template <class Kind, class C>
ALWAYS_INLINE void attend_in_lanes(int64_t rows, const float* scores, typename Kind::A* weights,
                                   const C* const* v_tiles, int64_t count, const SoftmaxRows& state, int64_t d,
                                   Ahead& ahead) {
  with_rows(rows, [&](auto r) {
    raise_bases<r>(scores, count, state, d);
    auto add = [&](auto width, auto weighs, int64_t column) {
      add_values<Kind, r, width, weighs>(scores, weights, v_tiles, count, column, state, d, ahead);
    };
    constexpr int wide = tiles_for(decltype(r)::value);
    using Wide = std::integral_constant<int, wide>;
    using One = std::integral_constant<int, 1>;
    const int64_t d_tiles = d / kLanes;
    int64_t column = d_tiles >= wide ? wide : 1;
    if (d_tiles >= wide)
      add(Wide(), std::true_type(), 0);
    else
      add(One(), std::true_type(), 0);
    for (; column + wide <= d_tiles; column += wide) add(Wide(), std::false_type(), column);
    for (; column < d_tiles; ++column) add(One(), std::false_type(), column);
  });
}

// The weights of `rows`, up to 16, from scores that were made in tile registers, and their products with the values.
template <class Kind, class C>
ALWAYS_INLINE void attend_in_tiles(int64_t rows, const float* scores, typename Kind::A* weights,
                                   const C* const* v_tiles, int64_t count, const SoftmaxRows& state, int64_t d) {
  for (int64_t i = 0, some; i < rows; i += some) {
    some = std::min<int64_t>(rows - i, Simd::kMostRows);
    with_rows(some, [&](auto r) { raise_bases<r>(scores + i * kKeys, count, state.from(i, d), d); });
  }
  auto add = [&](auto tiles, int64_t column) {
    Kind::template add_values<tiles>(weights, kKeys, v_tiles, count, column, state.sums, d, [&](int64_t t) {
      if (column > 0) return;
      for (int64_t i = 0; i < rows; ++i)
        weigh<1>(scores + i * kKeys + t * kLanes, state.from(i, d), weights + i * kKeys + t * kLanes);
    });
  };
  const int64_t d_tiles = d / kLanes;  // an even number, since depths in tiles are multiples of 32
  int64_t column = 0;
  for (; column + 4 <= d_tiles; column += 4) add(std::integral_constant<int, 4>(), column);
  if (column < d_tiles) add(std::integral_constant<int, 2>(), column);
}

// One unit: the queries of some neighbouring tokens of one KV head against some keys. Leaves, for every row, the
// unnormalised sum of values, the base of its weights and their sum; scores are in powers of two. `then()` expects what
// the thread reads after it.
template <class Kind, class C, class Then>
void attention_unit(const Stack& stack, const Batch& batch, const HeadTiles<C>& own, const typename Kind::A* q,
                    float* sums, float* base, float* totals, Ahead& ahead, Then&& then) {
  using A = typename Kind::A;
  const AttentionUnit& unit = *own.unit;
  const int64_t d = stack.head_dim, per_kv = stack.num_heads / stack.num_kv_heads;
  const int64_t rows = unit.num_tokens * per_kv, d_tiles = d / kLanes;
  const A* queries = q + (own.kv_head * batch.num_tokens + unit.first_token) * per_kv * d;
  alignas(64) float scores[Kind::kQueryRows * kKeys];
  alignas(64) A weights[Kind::kQueryRows * kKeys];
  typename Kind::Session session;

  alignas(64) float lanes[kMostUnitRows * kLanes];
  alignas(64) float shift[kMostUnitRows];
  std::fill_n(base, rows, kHidden);
  std::fill_n(shift, rows, 0.0f);
  std::memset(lanes, 0, rows * kLanes * sizeof(float));
  std::memset(sums, 0, rows * d * sizeof(float));
  for (int64_t key = unit.first_key; key < unit.end_key; key += kKeys) {
    const int64_t tiles = std::min(kKeyTiles, ceil_div(unit.end_key - key, kLanes));
    const C *k_tiles[kKeyTiles], *v_tiles[kKeyTiles];
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t start = own.at(key / kLanes + t);
      k_tiles[t] = own.k_cache + start, v_tiles[t] = own.v_cache + start;
    }
    ahead.expect_nothing();
    if (looks_ahead<Kind>(rows)) {
      if (key + kKeys < unit.end_key)
        own.expect(key + kKeys, ahead);
      else
        then();
      ahead.spread(num_fetches(rows, tiles, d / Kind::kDepth) + tiles * num_fetches(rows, d_tiles, kLanes / Kind::kDepth));
    }
    for (int64_t row = 0, some; row < rows; row += some) {
      some = next_rows<Kind>(rows - row, Kind::kQueryRows);
      // Keys that the last of these rows may see; without a causal limit, all.
      auto limit = [&](int64_t r) {
        return unit.causal ? std::min(unit.end_key, unit.first_position + r / per_kv + 1) : unit.end_key;
      };
      const int64_t seen = std::min(tiles, ceil_div(limit(row + some - 1) - key, kLanes));
      if (seen <= 0) continue;
      session.rows(some);
      product<Kind>(queries + row * d, d, some, [&](int64_t t) { return k_tiles[t]; }, seen, d / Kind::kDepth, scores,
                    kKeys, ahead, true);
      for (int64_t i = 0; i < some; ++i) {
        float* line = scores + i * kKeys;
        const int64_t visible = limit(row + i) - key;
        for (int64_t t = std::max<int64_t>(visible, 0) / kLanes; t < seen; ++t)
          Simd::store(line + t * kLanes, Simd::hide_from(Simd::load(line + t * kLanes), int(visible - t * kLanes)));
      }
      const SoftmaxRows state = {base + row, shift + row, lanes + row * kLanes, sums + row * d};
      if constexpr (kInTiles<Kind>)
        attend_in_tiles<Kind>(some, scores, weights, v_tiles, seen, state, d);
      else
        attend_in_lanes<Kind>(some, scores, weights, v_tiles, seen, state, d, ahead);
    }
  }
  for (int64_t r = 0; r < rows; ++r) totals[r] = Simd::sum(Simd::load(lanes + r * kLanes));
}

// Joins the parts of one query row by their log-sum-exps and writes it, normalised.
template <class A>
inline void merge_row(const AttentionPlan& plan, const Buffers& parts, int64_t token, int64_t head, const Stack& stack,
                      A* out) {
  const int64_t d = stack.head_dim, per_kv = stack.num_heads / stack.num_kv_heads;
  auto row_of = [&](int64_t part) {
    const AttentionUnit& unit = plan.units[plan.parts[part]];
    return unit.first_row + (head / per_kv * unit.num_tokens + token - unit.first_token) * per_kv + head % per_kv;
  };
  const int64_t first = plan.parts_of[token], end = plan.parts_of[token + 1];
  float top = kHidden;
  for (int64_t p = first; p < end; ++p) top = std::max(top, parts.bases[row_of(p)]);
  float total = 0.0f;
  V sum[kMaxHeadDim / kLanes];
  for (int64_t i = 0; i < d / kLanes; ++i) sum[i] = Simd::zero();
  for (int64_t p = first; p < end; ++p) {
    const int64_t row = row_of(p);
    const float weight = std::exp2(parts.bases[row] - top);
    total += weight * parts.totals[row];
    for (int64_t i = 0; i < d / kLanes; ++i)
      sum[i] = Simd::fma(Simd::load(parts.sums + row * d + i * kLanes), Simd::set1(weight), sum[i]);
  }
  const V norm = Simd::set1(1.0f / total);
  for (int64_t i = 0; i < d / kLanes; ++i) store_row(out + i * kLanes, Simd::mul(sum[i], norm));
}

// The units of attention, of each KV head apart.
template <class C>
struct AttentionUnits {
  const Stack& stack;
  const Batch& batch;
  const AttentionPlan& plan;
  const C *k_cache, *v_cache;
  const int64_t count = plan.num_units * stack.num_kv_heads;

  HeadTiles<C> operator[](int64_t i) const {
    return {k_cache, v_cache, plan.units + i / stack.num_kv_heads, batch.block_size / kLanes, stack.num_kv_heads,
            i % stack.num_kv_heads, kLanes * stack.head_dim};
  }
  void expect(int64_t i, Ahead& ahead) const {
    if (i >= count) return;
    const HeadTiles<C> tiles = (*this)[i];
    tiles.expect(tiles.unit->first_key, ahead);
  }
};

template <class Kind, class C, class Out, class Then>
void attention(Member& member, const AttentionUnits<C>& units, const Buffers& buffers, Out* out, Then&& then) {
  const Stack& stack = units.stack;
  const Batch& batch = units.batch;
  const int64_t per_kv = stack.num_heads / stack.num_kv_heads, d = stack.head_dim;
  const auto* q = static_cast<const typename Kind::A*>(buffers.q);
  Ahead ahead;
  member.for_each(units.count, [&](int64_t i) {
    const HeadTiles<C> own = units[i];
    const int64_t row = own.unit->first_row + own.kv_head * own.unit->num_tokens * per_kv;
    attention_unit<Kind>(stack, batch, own, q, buffers.sums + row * d, buffers.bases + row, buffers.totals + row,
                         ahead, [&] { look_ahead(member, units, i, ahead, then); });
  });
  member.for_each_range(batch.num_tokens, 2, [&](int64_t from, int64_t to) {
    for (int64_t token = from; token < to; ++token)
      for (int64_t head = 0; head < stack.num_heads; ++head)
        merge_row(units.plan, buffers, token, head, stack, out + (token * stack.num_heads + head) * d);
  });
}

template <class C, class TakeQ>
void rope_and_write(Member& member, const Stack& stack, const Batch& batch, const float* qkv, C* k_cache, C* v_cache,
                    TakeQ&& take_q) {
  const int64_t size = (stack.num_heads + 2 * stack.num_kv_heads) * stack.head_dim;
  member.for_each_range(batch.num_tokens, 2, [&](int64_t from, int64_t to) {
    for (int64_t t = from; t < to; ++t)
      rope_and_write_token(stack, batch, t, qkv + t * size, k_cache, v_cache,
                           [&](int64_t head, const float* turned) { take_q(t, head, turned); });
  });
}

// Writes a query, scaled, where `attention` reads it: [KVH][num_tokens][heads per KV head][D], so that the rows that
// read one KV head lie together.
template <class A>
inline void store_query(const Stack& stack, const Batch& batch, int64_t token, int64_t head, const float* from, A* q) {
  const int64_t per_kv = stack.num_heads / stack.num_kv_heads, d = stack.head_dim;
  A* to = q + ((head / per_kv * batch.num_tokens + token) * per_kv + head % per_kv) * d;
  const V factor = Simd::set1(stack.scale * kLog2E);
  for (int64_t i = 0; i < d; i += kLanes) store_row(to + i, Simd::mul(Simd::load(from + i), factor));
}

template <class A>
void rms_norm(Member& member, const float* x, int64_t rows, int64_t size, const float* weight, float eps, A* out) {
  member.for_each_range(rows, 4, [&](int64_t from, int64_t to) {
    for (int64_t r = from; r < to; ++r) rms_norm_row(x + r * size, size, weight, eps, out + r * size);
  });
}

// The stack of layers ------------------------------------------------------------------------------------------------

// Moves the wanted rows to the front.
template <class T>
inline void keep_wanted(const Batch& batch, T* rows, int64_t size) {
  for (int64_t i = 0; i < batch.num_wanted; ++i)
    std::memmove(rows + i * size, rows + batch.wanted[i] * size, size * sizeof(T));
}

// Between the products everything is float32; the residual stream is never rounded. The last layer does nothing more for
// tokens that are not wanted once their K and V are written; those that are, are in front then.
template <class Kind, class C>
void run_stack(Member& member, const Stack& stack, const Batch& batch, const AttentionPlan& plan,
               const Buffers& buffers, float* hidden) {
  using A = typename Kind::A;
  const int64_t size = stack.hidden_size, inner_size = stack.intermediate_size;
  const int64_t heads_size = stack.num_heads * stack.head_dim;
  const int64_t qkv_size = heads_size + 2 * stack.num_kv_heads * stack.head_dim;
  A *x = static_cast<A*>(buffers.x), *attended = static_cast<A*>(buffers.attended);
  A* inner = static_cast<A*>(buffers.inner);
  int64_t tokens = batch.num_tokens;
  for (int64_t i = 0; i < stack.num_layers; ++i) {
    const Layer& layer = stack.layers[i];
    C *k_cache = static_cast<C*>(layer.k_cache), *v_cache = static_cast<C*>(layer.v_cache);
    const AttentionUnits<C> attention_units = {stack, batch, plan, k_cache, v_cache};
    auto then_linear = [&](const Matrix& w) {
      return [&](int64_t unit, Ahead& ahead) { LinearUnits(w, tokens).expect(unit, ahead); };
    };
    rms_norm(member, hidden, tokens, size, layer.input_norm, stack.norm_eps, x);
    linear<Kind>(member, buffers, x, size, tokens, layer.qkv, Store{buffers.qkv, qkv_size},
                 [&](int64_t unit, Ahead& ahead) { attention_units.expect(unit, ahead); });
    rope_and_write(member, stack, batch, buffers.qkv, k_cache, v_cache,
                   [&](int64_t token, int64_t head, const float* turned) {
                     store_query(stack, batch, token, head, turned, static_cast<A*>(buffers.q));
                   });
    const bool narrows = i + 1 == stack.num_layers && batch.wanted;
    if (narrows && batch.num_wanted == 0) return;
    attention<Kind>(member, attention_units, buffers, attended, then_linear(layer.o));
    if (narrows) {
      member.for_each(2, [&](int64_t which) {
        if (which == 0)
          keep_wanted(batch, hidden, size);
        else
          keep_wanted(batch, attended, heads_size);
      });
      tokens = batch.num_wanted;
    }
    linear<Kind>(member, buffers, attended, heads_size, tokens, layer.o, Accumulate{hidden, size},
                 then_linear(layer.gate_up));
    rms_norm(member, hidden, tokens, size, layer.post_attention_norm, stack.norm_eps, x);
    linear<Kind>(member, buffers, x, size, tokens, layer.gate_up, SiluMul<A>{inner, inner_size},
                 then_linear(layer.down));
    linear<Kind>(member, buffers, inner, inner_size, tokens, layer.down, Accumulate{hidden, size},
                 [&](int64_t unit, Ahead& ahead) {
                   if (i + 1 < stack.num_layers) then_linear(stack.layers[i + 1].qkv)(unit, ahead);
                 });
  }
  rms_norm(member, hidden, tokens, size, stack.final_norm, stack.norm_eps, hidden);
}

// Entry points -------------------------------------------------------------------------------------------------------

// Calls f with the kind of operands for a format and an arithmetic.
template <class F>
void with_kind([[maybe_unused]] int32_t format, [[maybe_unused]] int32_t arithmetic, F&& f) {
#ifdef __AMX_BF16__
  return f(TilesBf16());  // called for nothing else
#else
  if (format == kFloat32) return f(Float32());
#ifdef __AVX512BF16__
  if (arithmetic != kWiden) return f(DotBf16());
#endif
  return f(WidenedBf16());
#endif
}

// x Wᵀ + b for rows of float32; they become left operands in buffers.x.
template <class Epilogue>
void linear_of(Member& member, const float* x, int64_t rows, const Matrix& w, const Buffers& buffers,
               int32_t arithmetic, const Epilogue& epilogue) {
  with_kind(w.format, arithmetic, [&](auto kind) {
    using Kind = decltype(kind);
    auto* operands = static_cast<typename Kind::A*>(buffers.x);
    member.for_each_range(rows, 4, [&](int64_t from, int64_t end) {
      for (int64_t i = from * w.k; i < end * w.k; i += kLanes) store_row(operands + i, Simd::load(x + i));
    });
    linear<Kind>(member, buffers, operands, w.k, rows, w, epilogue, [](int64_t, Ahead&) {});
  });
}

void enter_stack(Team& team, int index, const Stack& stack, const Batch& batch, const AttentionPlan& plan,
                 const Buffers& buffers, float* hidden) {
  Member member(team, index);
  with_kind(stack.cache_format, stack.arithmetic, [&](auto kind) {
    using Kind = decltype(kind);
    run_stack<Kind, typename Kind::B>(member, stack, batch, plan, buffers, hidden);
  });
}

void enter_linear(Team& team, int index, const float* x, int64_t rows, const Matrix& w, const Buffers& buffers,
                  int32_t arithmetic, float* out) {
  Member member(team, index);
  linear_of(member, x, rows, w, buffers, arithmetic, Store{out, w.n});
}

void enter_swiglu(Team& team, int index, const float* x, int64_t rows, const Matrix& w, const Buffers& buffers,
                  int32_t arithmetic, float* out) {
  Member member(team, index);
  linear_of(member, x, rows, w, buffers, arithmetic, SiluMul<float>{out, w.n / 2});
}

void enter_rms_norm(Team& team, int index, const float* x, int64_t rows, int64_t size, const float* weight, float eps,
                    float* out) {
  Member member(team, index);
  rms_norm(member, x, rows, size, weight, eps, out);
}

void enter_rope_and_write(Team& team, int index, const Stack& stack, const Batch& batch, const float* qkv,
                          void* k_cache, void* v_cache, float* q) {
  Member member(team, index);
  const int64_t d = stack.head_dim;
  auto take_q = [&](int64_t token, int64_t head, const float* turned) {
    std::memcpy(q + (token * stack.num_heads + head) * d, turned, d * sizeof(float));
  };
  if (stack.cache_format == kFloat32)
    rope_and_write(member, stack, batch, qkv, static_cast<float*>(k_cache), static_cast<float*>(v_cache), take_q);
  else
    rope_and_write(member, stack, batch, qkv, static_cast<uint16_t*>(k_cache), static_cast<uint16_t*>(v_cache), take_q);
}

void enter_attention(Team& team, int index, const Stack& stack, const Batch& batch, const AttentionPlan& plan,
                     const Buffers& buffers, const float* q, const void* k_cache, const void* v_cache, float* out) {
  Member member(team, index);
  with_kind(stack.cache_format, stack.arithmetic, [&](auto kind) {
    using Kind = decltype(kind);
    using C = typename Kind::B;
    auto* queries = static_cast<typename Kind::A*>(buffers.q);
    member.for_each_range(batch.num_tokens, 4, [&](int64_t from, int64_t to) {
      for (int64_t t = from; t < to; ++t)
        for (int64_t h = 0; h < stack.num_heads; ++h)
          store_query(stack, batch, t, h, q + (t * stack.num_heads + h) * stack.head_dim, queries);
    });
    const AttentionUnits<C> units = {stack, batch, plan, static_cast<const C*>(k_cache),
                                     static_cast<const C*>(v_cache)};
    attention<Kind>(member, units, buffers, out, [](int64_t, Ahead&) {});
  });
}

void enter_most_likely(Team& team, int index, const float* x, int64_t rows, const Matrix& w, const Buffers& buffers,
                       int32_t arithmetic, int64_t* out) {
  Member member(team, index);
  const Highest highest{buffers.bases, buffers.indices, ceil_div(w.n, kUnitColumns)};
  linear_of(member, x, rows, w, buffers, arithmetic, highest);
  member.for_each(rows, [&](int64_t row) {
    const float* values = highest.values + row * highest.pieces;
    out[row] = highest.indices[row * highest.pieces + (std::max_element(values, values + highest.pieces) - values)];
  });
}

constexpr Kernels kKernels = {enter_stack,    enter_linear,         enter_swiglu,    enter_most_likely,
                              enter_rms_norm, enter_rope_and_write, enter_attention};

}  // namespace
