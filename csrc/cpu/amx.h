// Products in tiles of Intel AMX: those of multi_lora and adapted_linear, and scores, of bfloat16 matrices or, with each
// number split into two bfloat16 numbers, of nearly float32's precision. Of the four products of two split numbers the
// smallest is left out.
#pragma once

#include <cstdint>

namespace slm_fast::amx {

constexpr int64_t kRows = 16;    // of a tile: keys or tokens, or pairs of what is summed over
constexpr int64_t kStep = 32;    // features per tile
constexpr int64_t kPiece = 128;  // features that a tile sums up, before sums are added outside of tiles
// The error of split products, as a share of |a| |b|: the product left out, and what each split loses (2^-18 each).
constexpr double kLost = 0x3p-18;

bool usable();       // the processor has AMX, and the system lets this process use it
void choose(bool);   // whether to use it
bool chosen();

// The calling thread's tiles, for as long as this lives; none if not `wanted`. Their products sum over `pairs` pairs.
struct Tiles {
  const bool wanted;
  explicit Tiles(bool wanted, int64_t pairs = kRows);
  ~Tiles();
  Tiles(const Tiles&) = delete;
};

// scores[key][query] = key . query, of split numbers if low_words is not 0.
struct Scores {
  const char* keys;  // rows of kStep bfloat16 numbers, kRows to a tile
  int64_t row_bytes, step_bytes, tile_bytes;  // to a key's next row: of the next key, features, tile of keys
  int64_t low_bytes;      // to the low parts; 0 if keys have none
  const uint32_t* panel;  // [steps * kRows][columns] pairs of features
  int64_t low_words;      // to the low parts
  int64_t key_tiles, query_tiles, steps, columns;
  float* scores;          // [kRows * key_tiles][columns]
};
void score(const Scores& of);

// sums[query][key] of a piece of the features. A tile of keys is kRows keys of kStep bfloat16 numbers, a tile of queries
// kRows pairs of features of kRows queries.
struct Screened {
  const char* keys;     // [key_tiles][steps] tiles
  int64_t key_tiles, steps;
  const char* queries;  // [query_tiles][...] tiles, of which the first `steps`
  int64_t query_bytes;  // to the next tile of queries
  int64_t query_tiles;
  float* sums;          // [query_tiles][kRows * key_tiles][kRows]
  int64_t sum_numbers;  // to the next tile of queries
  bool more;            // adds to sums
  int64_t ahead_bytes;  // to keys that are prefetched meanwhile, as many as these; 0: none
};
void screen(const Screened& of);

// Rows of bfloat16 numbers, in place or as tiles.
struct Tiled {
  const char* rows;
  int64_t row_bytes, step_bytes, tile_bytes;  // to the next row, the next kStep numbers, the next kRows rows
};

// sums[token][row] = x[token] . a[row], for rows transposed into a panel.
struct Shrunk {
  Tiled x;  // [kRows * token_tiles][kStep * steps]
  int64_t token_tiles;
  const uint32_t* panel;  // [steps * kRows][columns] pairs of features
  int64_t row_tiles, steps, columns;
  float* sums;            // [kRows * token_tiles][width]
  int64_t width;
};
void shrink(const Shrunk& of);

// sums[token][column] = coefficients[token] . panel[column], for two tiles of columns.
struct Expanded {
  const uint32_t* coefficients;  // [kRows * token_tiles][stride] pairs of rows
  int64_t stride, token_tiles;
  const uint32_t* panel;         // [steps * pairs][columns] pairs of rows
  int64_t steps, pairs, columns;
  float* sums;                   // [kRows * token_tiles][2 * kRows]
};
void expand(const Expanded& of);

// Sums over features of 32 rows of x times 32 rows of a weight, and over rows of rank of coefficients times slots. A
// step of rows is two tiles of kRows rows of kStep numbers; one of panels, two tiles of kRows pairs of kRows columns.
constexpr int64_t kBlock = 2 * kRows;  // rows, and columns
constexpr int64_t kStepNumbers = kBlock * kStep;
struct Product {
  Tiled x;                 // [kBlock][kStep * steps]
  const uint16_t* weight;  // [steps][kStepNumbers]
  int64_t steps;
  const uint16_t *coefficients, *slots;  // [slot_steps][kStepNumbers]
  int64_t slot_steps;
  float* sums;  // [2 tiles of rows][2 of columns][kRows][kRows]
  uintptr_t ahead;  // what is prefetched meanwhile
  int64_t ahead_bytes;
};
// What becomes of a product: y = sums + bias, rounded to bfloat16.
struct Rounded {
  const float* sums;
  const uint16_t* bias;  // [kBlock] or null
  uint16_t* y;
  int64_t stride, rows;  // 0 rows: nothing
};
void multiply(const Product& of, const Rounded& before);  // rounds an earlier product meanwhile
void round(const Rounded& of);

}  // namespace slm_fast::amx
