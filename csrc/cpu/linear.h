// Products with packed matrices, and the linear layers made of them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "operands.h"

namespace {

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
  int64_t column_of(int64_t row) const {
    const float* first = values + row * pieces;
    return indices[row * pieces + (std::max_element(first, first + pieces) - first)];
  }
};

// Rows that have a place for their products are stored; of the others the highest are kept.
struct StoreSome {
  float* const* rows;
  Highest highest;
  void operator()(int64_t row, int64_t column, const float* block, int64_t width) const {
    if (rows[row])
      std::memcpy(rows[row] + column, block, width * sizeof(float));
    else
      highest(row, column, block, width);
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

}  // namespace
