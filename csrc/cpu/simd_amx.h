// Products of bfloat16 in the tile registers of AMX: one instruction multiplies 16 rows, 32 elements deep, with 32 rows
// of 16 columns, which are 1 KiB of a packed matrix as it lies in memory.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "api.h"

namespace {

// By number, as instructions name them. The compilers' own functions for these do not all say that they read memory.
template <int tile>
inline void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
inline void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(tile));
}
template <int sum, int left, int right>
inline void tile_dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(left), "i"(right));
}

// The shape of every tile register, as LDTILECFG reads it.
struct alignas(64) TileShapes {
  uint8_t palette = 1, first_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int64_t count, int bytes) {
    rows[tile] = uint8_t(count);
    row_bytes[tile] = uint16_t(bytes);
  }
  void load() const { asm volatile("ldtilecfg %0" : : "m"(*this) : "memory"); }
};

// An operand kind as those in kernels.h. Rows are computed alike whatever their number, but not as VDPBF16PS does it: a
// tile keeps sums of the even and of the odd elements of 32 and adds them up last.
struct TilesBf16 {
  using A = uint16_t;
  using B = uint16_t;
  static constexpr int kDepth = 32;
  static constexpr Format kFormat = kBFloat16;
  static constexpr int kMostRows = 32;
  static constexpr int kQueryRows = 16;
  static constexpr int64_t kTileRows = 16;

  // Holds the shapes while products are made. Up to 16 rows: sums in 0 ... 3, from the left 4, from the right 5, and 6
  // and 7 half as deep. More rows: sums of the first 16 in 0 and 1, of the others in 2 and 3, from the left 4 and 5,
  // from the right 6 and 7.
  class Session {
   public:
    Session() = default;
    Session(const Session&) = delete;
    ~Session() { asm volatile("tilerelease"); }

    void rows(int64_t count) {
      if (count == rows_) return;
      rows_ = count;
      TileShapes shapes;
      const int64_t first = count < kTileRows ? count : kTileRows, second = count - first;
      for (int tile = 0; tile < 4; ++tile) shapes.set(tile, tile < 2 || second == 0 ? first : second, 64);
      shapes.set(4, first, 64);
      shapes.set(5, second == 0 ? 16 : second, 64);
      shapes.set(6, second == 0 ? first : 16, second == 0 ? 32 : 64);
      shapes.set(7, second == 0 ? 8 : 16, 64);
      shapes.load();
    }

   private:
    int64_t rows_ = 0;
  };

  // As `product` in kernels.h.
  template <class TileAt>
  static void product(const A* a, int64_t lda, int64_t rows, TileAt&& tile, int64_t tiles, int64_t steps, float* out,
                      int64_t ldo, bool again) {
    int64_t j = 0;
    if (rows > kTileRows) {
      for (; j + 2 <= tiles; j += 2) two_rows<2>(a, lda, tile(j), tile(j + 1), steps, out + j * 16, ldo, again);
      if (j < tiles) two_rows<1>(a, lda, tile(j), nullptr, steps, out + j * 16, ldo, again);
      return;
    }
    for (; j + 4 <= tiles; j += 4) {
      const B* const b[] = {tile(j), tile(j + 1), tile(j + 2), tile(j + 3)};
      one_row<4>(a, lda, b, steps, out + j * 16, ldo, again);
    }
    for (; j < tiles; ++j) {
      const B* const b[] = {tile(j)};
      one_row<1>(a, lda, b, steps, out + j * 16, ldo, again);
    }
  }

  // sums[0 ... rows)[16 column ... 16 (column + tiles)) += weights · values over `count` tiles of 16 keys, for up to 16
  // rows. `weigh(t)`, which makes the weights of a tile, is called one tile ahead: its work and the tile registers' go
  // on at the same time.
  template <int tiles, class Weigh>
  static void add_values(const A* weights, int64_t ldw, const B* const* v_tiles, int64_t count, int64_t column,
                         float* sums, int64_t lds, Weigh&& weigh) {
    float* to = sums + column * 16;
    load_sums<tiles>(to, lds * int64_t(sizeof(float)));
    weigh(0);
    for (int64_t t = 0; t < count; ++t) {
      if (t + 1 < count) weigh(t + 1);
      const B* values = v_tiles[t] + column * 256;
      tile_load<6>(weights + t * 16, ldw * int64_t(sizeof(A)));
      add_columns<tiles>(values);
    }
    store_sums<tiles>(to, lds * int64_t(sizeof(float)));
  }

 private:
  static constexpr int64_t kRight = 16 * kDepth;  // elements of a tile from the right
  static constexpr int64_t kAhead = 2;            // steps

  // Tile registers do not wait for the processor's own prefetchers to catch up.
  static void prefetch(const B* from) {
    for (int i = 0; i < kRight; i += 32) _mm_prefetch(reinterpret_cast<const char*>(from + i), _MM_HINT_T0);
  }

  template <int columns>
  static void two_rows(const A* a, int64_t lda, const B* first, const B* second, int64_t steps, float* out,
                       int64_t ldo, bool again) {
    const int64_t stride = lda * int64_t(sizeof(A));
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    for (int64_t s = 0; s < steps; ++s, a += kDepth, first += kRight) {
      if (!again) {
        prefetch(first + kAhead * kRight);
        if constexpr (columns == 2) prefetch(second + kAhead * kRight);
      }
      tile_load<4>(a, stride);
      tile_load<6>(first, 64);
      tile_dot<0, 4, 6>();
      if constexpr (columns == 2) {
        tile_load<7>(second, 64);
        tile_dot<1, 4, 7>();
      }
      tile_load<5>(a + kTileRows * lda, stride);
      tile_dot<2, 5, 6>();
      if constexpr (columns == 2) {
        tile_dot<3, 5, 7>();
        second += kRight;
      }
    }
    const int64_t line = ldo * int64_t(sizeof(float));
    tile_store<0>(out, line);
    tile_store<2>(out + kTileRows * ldo, line);
    if constexpr (columns == 2) {
      tile_store<1>(out + 16, line);
      tile_store<3>(out + kTileRows * ldo + 16, line);
    }
  }

  template <int columns>
  static void one_row(const A* a, int64_t lda, const B* const (&start)[columns], int64_t steps, float* out,
                      int64_t ldo, bool again) {
    const int64_t stride = lda * int64_t(sizeof(A));
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    for (int64_t s = 0; s < steps; ++s, a += kDepth) {
      if (!again)
        for (int j = 0; j < columns; ++j) prefetch(start[j] + (s + kAhead) * kRight);
      tile_load<4>(a, stride);
      tile_load<5>(start[0] + s * kRight, 64);
      tile_dot<0, 4, 5>();
      if constexpr (columns == 4) {
        tile_load<5>(start[1] + s * kRight, 64);
        tile_dot<1, 4, 5>();
        tile_load<5>(start[2] + s * kRight, 64);
        tile_dot<2, 4, 5>();
        tile_load<5>(start[3] + s * kRight, 64);
        tile_dot<3, 4, 5>();
      }
    }
    store_sums<columns>(out, ldo * int64_t(sizeof(float)));
  }

  template <int columns>
  static void load_sums(const float* from, int64_t stride) {
    tile_load<0>(from, stride);
    if constexpr (columns > 1) tile_load<1>(from + 16, stride);
    if constexpr (columns > 2) tile_load<2>(from + 32, stride), tile_load<3>(from + 48, stride);
  }

  template <int columns>
  static void store_sums(float* to, int64_t stride) {
    tile_store<0>(to, stride);
    if constexpr (columns > 1) tile_store<1>(to + 16, stride);
    if constexpr (columns > 2) tile_store<2>(to + 32, stride), tile_store<3>(to + 48, stride);
  }

  // Eight pairs of the rows in tile 6 with those of neighbouring tiles of 16 columns.
  template <int columns>
  static void add_columns(const B* values) {
    tile_load<7>(values, 64);
    tile_dot<0, 6, 7>();
    if constexpr (columns > 1) {
      tile_load<7>(values + 256, 64);
      tile_dot<1, 6, 7>();
    }
    if constexpr (columns > 2) {
      tile_load<7>(values + 512, 64);
      tile_dot<2, 6, 7>();
      tile_load<7>(values + 768, 64);
      tile_dot<3, 6, 7>();
    }
  }
};

}  // namespace
