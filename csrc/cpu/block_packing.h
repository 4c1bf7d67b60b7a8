// Packs weights in blocks, and reads single rows of them.
#pragma once

#include <cstdint>

#include "api.h"

// Of one tile whose rows are k deep.
int64_t block_tile_bytes(int32_t type, int64_t span, int64_t k);

// Packs up to 16 rows, as files have them, one behind the other; `to` is where the tile's first head or block goes. Other
// columns become zeros. Of `tile`, type, span and together are read.
void pack_block_tile(const uint8_t* rows, int64_t num_rows, int64_t k, const Tile& tile, char* to);

// Row `row` of a matrix in blocks, dequantised; to [k].
void decode_block_row(const Matrix& w, int64_t row, float* to);
