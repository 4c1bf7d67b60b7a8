// Products with packed matrices, and the linear layers made of them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "activations.h"
#include "blocks.h"
#include "norms.h"

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

// What happens to a finished line of a linear layer: up to kUnitColumns of a row, bias and int8 factors applied. It may
// change the line. A call for each line costs nothing beside its product, and there is one copy of the products.
struct Finish {
  virtual void operator()(int64_t row, int64_t column, float* line, int64_t width) const = 0;
};

struct Store final : Finish {
  float* out;
  int64_t ldo;
  Store(float* out, int64_t ldo) : out(out), ldo(ldo) {}
  void operator()(int64_t row, int64_t column, float* line, int64_t width) const override {
    std::memcpy(out + row * ldo + column, line, width * sizeof(float));
  }
};

struct Accumulate final : Finish {
  float* hidden;
  int64_t ldo;
  Residual residual;
  Accumulate(float* hidden, int64_t ldo, Residual residual) : hidden(hidden), ldo(ldo), residual(residual) {}
  void operator()(int64_t row, int64_t column, float* line, int64_t width) const override {
    float* to = hidden + row * ldo + column;
    if (residual.keep == 1.0f && residual.add == 1.0f)
      for (int64_t i = 0; i < width; ++i) to[i] += line[i];
    else
      for (int64_t i = 0; i < width; ++i) to[i] = residual.keep * to[i] + residual.add * line[i];
  }
};

// Writes activation(line), or activation(gate) · up where columns alternate, 16 of the gate and 16 of the up projection.
template <class A>
struct Activate final : Finish {
  A* out;
  int64_t ldo;
  int32_t activation, gated;
  Activate(A* out, int64_t ldo, int32_t activation, int32_t gated)
      : out(out), ldo(ldo), activation(activation), gated(gated) {}
  void operator()(int64_t row, int64_t column, float* line, int64_t width) const override {
    with_activation<A>(activation, [&](auto function) {
      if (gated) {
        A* to = out + row * ldo + column / 2;
        for (int64_t i = 0; i < width; i += 2 * kLanes, to += kLanes)
          store_row(to, Simd::mul(function(Simd::load(line + i)), Simd::load(line + i + kLanes)));
      } else {
        A* to = out + row * ldo + column;
        for (int64_t i = 0; i < width; i += kLanes) store_row(to + i, function(Simd::load(line + i)));
      }
    });
  }
};

// Makes logits of a line, whose place has room for a multiple of 16.
inline void shape_logits(const Projection& projection, float* line, int64_t width) {
  if (projection.softcap != 0.0f) {
    const V cap = Simd::set1(projection.softcap), factor = Simd::set1(projection.factor / projection.softcap);
    for (int64_t i = 0; i < width; i += kLanes)
      Simd::store(line + i, capped(Simd::mul(Simd::load(line + i), factor), cap));
  } else if (projection.factor != 1.0f) {
    for (int64_t i = 0; i < width; ++i) line[i] *= projection.factor;
  }
}

struct StoreLogits final : Finish {
  const Projection& projection;
  float* out;
  StoreLogits(const Projection& projection, float* out) : projection(projection), out(out) {}
  void operator()(int64_t row, int64_t column, float* line, int64_t width) const override {
    shape_logits(projection, line, width);
    std::memcpy(out + row * projection.w.n + column, line, width * sizeof(float));
  }
};

// Keeps the highest logit of each piece of kUnitColumns alone, and its column, the first of equals. A row that has a
// place for its logits gets all of them instead.
struct Highest final : Finish {
  const Projection& projection;
  float* values;  // [rows][pieces]
  int64_t* indices;
  int64_t pieces;
  float* const* rows;  // null: no row has a place
  Highest(const Projection& projection, const Buffers& buffers, float* const* rows)
      : projection(projection), values(buffers.bases), indices(buffers.indices),
        pieces(ceil_div(projection.w.n, kUnitColumns)), rows(rows) {}
  void operator()(int64_t row, int64_t column, float* line, int64_t width) const override {
    shape_logits(projection, line, width);
    if (rows && rows[row]) {
      std::memcpy(rows[row] + column, line, width * sizeof(float));
      return;
    }
    const float* top = std::max_element(line, line + width);
    const int64_t at = row * pieces + column / kUnitColumns;
    values[at] = *top;
    indices[at] = column + (top - line);
  }
  int64_t column_of(int64_t row) const {
    const float* first = values + row * pieces;
    return indices[row * pieces + (std::max_element(first, first + pieces) - first)];
  }
};

// A unit of work is kUnitColumns of up to kUnitRows rows.
constexpr int64_t kUnitTiles = kUnitColumns / kLanes;
constexpr int64_t kUnitRows = 192;

inline void finish_lines(const Matrix& w, int64_t row, int64_t rows, int64_t column, float* block, int64_t width,
                         const Finish& finish) {
  for (int64_t i = 0; i < rows; ++i) {
    float* line = block + i * kUnitColumns;
    if (w.scale)
      for (int64_t j = 0; j < width; ++j) line[j] *= w.scale[column + j];
    if (w.bias)
      for (int64_t j = 0; j < width; ++j) line[j] += w.bias[column + j];
    finish(row + i, column, line, width);
  }
}

template <class Kind>
inline void linear_unit(const typename Kind::A* x, int64_t lda, int64_t first_row, int64_t end_row, const Matrix& w,
                        const typename Kind::B* tiles, int64_t column, int64_t count, const Finish& finish,
                        Ahead& ahead) {
  const int64_t stride = w.k * kLanes, steps = w.k / Kind::kDepth, width = std::min(count * kLanes, w.n - column);
  alignas(64) float block[Kind::kMostRows * kUnitColumns];
  typename Kind::Session session;
  ahead.spread(num_fetches(end_row - first_row, count, steps));
  for (int64_t row = first_row, some; row < end_row; row += some) {
    some = next_rows<Kind>(end_row - row, Kind::kMostRows);
    session.rows(some);
    product<Kind>(x + row * lda, lda, some, [&](int64_t j) { return tiles + j * stride; }, count, steps, block,
                  kUnitColumns, ahead, row > first_row);
    finish_lines(w, row, some, column, block, width, finish);
  }
}

// Tiles in blocks that a few rows take at a time; decoding needs registers too.
constexpr int tiles_in_blocks_for(int rows) { return rows <= 2 || Simd::kTiles == 1 ? Simd::kTiles : Simd::kTiles / 2; }

// The same for a few rows and weights in blocks, which are decoded in registers; tiles of one type go together.
template <class Kind>
inline void blocks_unit(const typename Kind::A* x, int64_t lda, int64_t row, int64_t rows, const Matrix& w,
                        const Tile* tiles, int64_t column, int64_t count, const Finish& finish, Ahead& ahead) {
  alignas(64) float block[Kind::kMostRows * kUnitColumns];
  ahead.spread(num_fetches(rows, count, w.k));
  bool done[kUnitTiles] = {};
  for (int64_t first = 0; first < count; ++first) {
    if (done[first]) continue;
    int64_t places[kUnitTiles], found = 0;
    for (int64_t j = first; j < count; ++j)
      if (tiles[j].type == tiles[first].type && tiles[j].span == tiles[first].span) {
        places[found++] = j;
        done[j] = true;
      }
    with_type(tiles[first].type, [&](auto type) {
      using Type = decltype(type);
      with_some_rows(rows, [&](auto r) {
        constexpr int wide = tiles_in_blocks_for(decltype(r)::value);
        int64_t j = 0;
        for (; j + wide <= found; j += wide)
          few_rows<Kind, Type, r, wide>(x + row * lda, lda, rows, tiles, places + j, w.k, block, kUnitColumns,
                                                  ahead);
        if constexpr (wide > 1)
          for (; j < found; ++j)
            few_rows<Kind, Type, r, 1>(x + row * lda, lda, rows, tiles, places + j, w.k, block, kUnitColumns,
                                                 ahead);
      });
    });
  }
  finish_lines(w, row, rows, column, block, std::min(count * kLanes, w.n - column), finish);
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
  bool in_blocks() const { return w.format == kBlocks || w.format == kBlocksAsBFloat16; }
  const char* weights(int64_t unit) const {
    return static_cast<const char*>(w.data) + first_tile(unit) * kLanes * w.k * size_of(w.format);
  }
  const Tile* blocks(int64_t unit) const { return static_cast<const Tile*>(w.data) + first_tile(unit); }
  void expect(int64_t unit, Ahead& ahead) const {
    if (unit >= count) return;
    if (!in_blocks()) return ahead.expect(weights(unit), num_tiles(unit) * kLanes * w.k * size_of(w.format));
    const Tile* tiles = blocks(unit);
    if (tiles->together == num_tiles(unit)) return ahead.expect(tiles->data, num_tiles(unit) * tiles->bytes);
    // Types may differ; a few lines too many or too few do no harm.
    for (int64_t j = 0; j < num_tiles(unit); ++j) ahead.expect(tiles[j].data, tiles->bytes);
  }

 private:
  static int64_t size_of(int32_t format) { return format == kFloat32 ? 4 : format == kBFloat16 ? 2 : 1; }
};

// Expects what unit `i` of the next phase reads; refers to a function that outlives it.
class Next {
 public:
  template <class F>
  Next(const F& f) : object_(&f), call_([](const void* object, int64_t i, Ahead& ahead) {
    (*static_cast<const F*>(object))(i, ahead);
  }) {}
  void operator()(int64_t i, Ahead& ahead) const { call_(object_, i, ahead); }

 private:
  const void* object_;
  void (*call_)(const void*, int64_t, Ahead&);
};

constexpr auto kNothingNext = [](int64_t, Ahead&) {};

// Expects what this thread will read after unit `i`: threads take turns as long as units are alike. Past the end, it is
// what `next` says.
template <class Units>
ALWAYS_INLINE void look_ahead(const Member& member, const Units& units, int64_t i, Ahead& ahead, const Next& next) {
  const int64_t later = i + member.team_size();
  if (later < units.count)
    units.expect(later, ahead);
  else
    next(later - units.count, ahead);
}

// The same, for later.
template <class Units>
struct LookAhead {
  const Member& member;
  const Units& units;
  int64_t i;
  Ahead& ahead;
  const Next& next;
  void operator()() const { look_ahead(member, units, i, ahead, next); }
};

// x Wᵀ + b, every finished line given to `finish`. `Kind` says what `x` is and how weights of its own format multiply;
// int8 weights and
// weights in blocks go with every kind.
template <class Kind>
void linear(Member& member, const Buffers& buffers, const typename Kind::A* x, int64_t lda, int64_t rows,
            const Matrix& w, const Finish& finish, const Next& next) {
  const LinearUnits units(w, rows);
  Ahead ahead;
  member.for_each(units.count, [&](int64_t unit) {
    const int64_t count = units.num_tiles(unit), column = units.first_tile(unit) * kLanes;
    const int64_t row = unit % units.row_units * kUnitRows, end = std::min(rows, row + kUnitRows);
    ahead.expect_nothing();
    if (looks_ahead<Kind>(end - row)) look_ahead(member, units, unit, ahead, next);
    if (units.in_blocks()) {
      const Tile* tiles = units.blocks(unit);
      using Decoded = typename ForBlocks<Kind>::Decoded;
      if constexpr (!kInTiles<Kind>)
        if (end - row <= Simd::kMostRows)
          return blocks_unit<Decoded>(x, lda, row, end - row, w, tiles, column, count, finish, ahead);
      auto* panel = reinterpret_cast<typename Decoded::B*>(buffers.panels + member.index * buffers.panel_size);
      for (int64_t j = 0; j < count; ++j) decode_tile(tiles[j], w.k, panel + j * kLanes * w.k);
      linear_unit<Decoded>(x, lda, row, end, w, panel, column, count, finish, ahead);
      return;
    }
    const char* weights = units.weights(unit);
    if (w.format != kInt8) {
      linear_unit<Kind>(x, lda, row, end, w, reinterpret_cast<const typename Kind::B*>(weights), column, count, finish,
                        ahead);
      return;
    }
    const auto* data = reinterpret_cast<const int8_t*>(weights);
    if constexpr (!kInTiles<Kind>)
      if (end - row <= Simd::kMostRows)
        return linear_unit<typename ForInt8<Kind>::Few>(x, lda, row, end, w, data, column, count, finish, ahead);
    uint16_t* panel = buffers.panels + member.index * buffers.panel_size;
    expand_int8(data, count * kLanes * w.k, panel);
    linear_unit<typename ForInt8<Kind>::Many>(x, lda, row, end, w, panel, column, count, finish, ahead);
  });
}

}  // namespace
