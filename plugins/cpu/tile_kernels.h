// Attention on tiles: the primitives that every CPU operator of this library is made of.
//
// An operator gathers some query rows into a QueryTile and some keys into a KeyTile, says for each row which contiguous
// range of the tile's columns it may see, and calls `attend`; after the last key tile it divides by the totals. What a
// window, a block list or a padding mask is, is the operator's business: it becomes the choice of keys and the ranges.
//
// All arithmetic is float32. Scores live in log2 units (the operator folds log2(e) into the packed queries), so that
// the softmax needs exp2 alone.
#ifndef LONGSPAN_CPU_TILE_KERNELS_H_
#define LONGSPAN_CPU_TILE_KERNELS_H_

#include <cstddef>
#include <cstdint>

namespace longspan::cpu {

// Storage type of Q, K, V and Y.
enum class ElementType { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };
constexpr int kElementTypes = 3;
constexpr size_t ElementSize(ElementType type) { return type == ElementType::kFloat32 ? 4 : 2; }

// Most keys in one KeyTile, and the row pitch of a score strip; the extra 16 spread the rows over the cache's sets.
constexpr int kMaxTileColumns = 256;
constexpr int kStripPitch = kMaxTileColumns + 16;

// Widest vector of any ISA in floats. Widths and buffers are padded to it, so that one layout serves every ISA.
constexpr int kMaxLanes = 16;
constexpr int64_t PadToLanes(int64_t count) { return (count + kMaxLanes - 1) / kMaxLanes * kMaxLanes; }

// log2(e) and its inverse: scores are kept in log2 units.
constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;

// Running maximum of a row that has seen no key. Finite, so that no difference of two maxima is NaN.
constexpr float kNoTop = -3.402823466e+38f;

// Query rows and their running softmax.
struct QueryTile {
  int rows = 0;
  int depth = 0;             // head size
  int width = 0;             // value head size, padded to kMaxLanes
  float* queries = nullptr;  // from pack_transposed: panels of `lanes` rows, [panel][depth][lanes]
  float* out = nullptr;      // [rows][width], sum of p * V
  float* top = nullptr;      // [rows], largest score so far in log2 units, kNoTop at first
  float* total = nullptr;    // [rows], sum of p = exp2(score - top)
  float softcap = 0;         // 0: packed queries give log2-unit scores; else scores are softcap * log2(e) * tanh(q . k)
};

// Keys and values that a QueryTile attends to.
struct KeyTile {
  int columns = 0;
  const float* keys = nullptr;    // from pack_transposed: [panel][depth][lanes]
  const float* values = nullptr;  // from pack_rows: [columns][width]
};

// Columns [first, last) of a KeyTile that one row may see; empty when last <= first.
struct ColumnRange {
  int first;
  int last;
};

// Operator-specific terms, applied per row between the two products.
struct ScoreEdit {
  // Adds to scores[first .. last) (log2 units) and, when `weighted`, fills weights[first .. last) with factors of p.
  void (*apply)(void* context, int row, ColumnRange range, float* scores, float* weights) = nullptr;
  void* context = nullptr;
  bool weighted = false;
};

// One instruction set's implementation.
struct TileKernels {
  const char* name;  // as LONGSPAN_CPU_ISA spells it
  int lanes;         // floats per vector = rows or keys per packed panel

  // Packs `count` vectors of `depth` elements, each multiplied by `scale`, into panels [panel][depth][lanes];
  // the last panel is filled up with zeros. Indexed by ElementType.
  void (*pack_transposed[kElementTypes])(const void* const* vectors, int count, int depth, float scale, float* panels);

  // Copies `count` rows of `width` elements to float rows of `padded` elements, zeros behind. Indexed by ElementType.
  void (*pack_rows[kElementTypes])(const void* const* rows, int count, int width, int padded, float* out);

  // One online-softmax step: updates out, top and total of every row with the columns that its range holds.
  void (*attend)(const QueryTile& queries, const KeyTile& keys, const ColumnRange* ranges, const ScoreEdit& edit);

  // For a ScoreEdit: scores[i] += terms[i] * factor for i in [0, count). Indexed by the ElementType of the terms.
  void (*add[kElementTypes])(const void* terms, float factor, int count, float* scores);

  // For a ScoreEdit: makes scores[i] -inf for the i in [0, count) whose bit first + i is not set; bit n is bit n % 8 of
  // byte n / 8.
  void (*forbid_unset)(const uint8_t* bits, int64_t first, int count, float* scores);

  // Writes row * factor as `width` elements. Indexed by ElementType.
  void (*store_row[kElementTypes])(const float* row, float factor, int width, void* out);
};

extern const TileKernels kBaselineKernels;
#if defined(LONGSPAN_X86)
extern const TileKernels kAvx2Kernels;
extern const TileKernels kAvx512Kernels;
#endif

}  // namespace longspan::cpu

#endif  // LONGSPAN_CPU_TILE_KERNELS_H_
