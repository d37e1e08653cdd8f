// A tile of query rows on its way through the tile kernels: what operators share between their plan and the kernels.
#ifndef LONGSPAN_ATTENTION_ROW_TILE_H_
#define LONGSPAN_ATTENTION_ROW_TILE_H_

#include <cstddef>
#include <cstdint>

#include "attention/operands.h"
#include "cpu/arena.h"
#include "cpu/tile_kernels.h"

namespace longspan {

// Where the vectors of a (B, H, S, W) or (B, S, H*W) tensor are, in bytes.
struct Strides {
  Strides(const Shapes& shapes, int64_t heads, int64_t sequence, int64_t width, cpu::ElementType type) {
    const auto size = static_cast<int64_t>(cpu::ElementSize(type));
    batch = heads * sequence * width * size;
    head = (shapes.split_heads ? sequence : 1) * width * size;
    row = (shapes.split_heads ? 1 : heads) * width * size;
  }
  int64_t Offset(int64_t b, int64_t h, int64_t s) const { return b * batch + h * head + s * row; }

  int64_t batch, head, row;
};

// One element of a tensor as a float.
float LoadElement(const void* data, int64_t index, cpu::ElementType type);

// Most query rows (queries times heads) and most keys of a tile.
struct TileSize {
  int rows = 0;
  int columns = 0;  // a multiple of kMaxLanes
};

// Tiles that stay within an L2 cache of 1 MB, and of so few rows that every core gets a few.
TileSize ChooseTileSize(const Shapes& shapes);

// One row of a tile: a query of one query head.
struct TileRow {
  int64_t query;
  int64_t head;
};

// The rows that one thread is working on. All belong to one batch entry and to heads that share their keys.
//
//   rows()[0 .. count) = …; Begin(count, …);
//   per key tile: PackKeys(…); ranges()[0 .. count) = …; Attend(…);
//   Finish();
class RowTile {
 public:
  RowTile(const Execution& execution, const CommonAttributes& attributes, const void* sinks, const TileSize& size,
          const cpu::TileKernels& kernels);

  // Takes the buffers.
  void Carve(cpu::Arena* arena);

  TileRow* rows() { return rows_; }
  cpu::ColumnRange* ranges() { return ranges_; }
  int count() const { return tile_.rows; }

  // Packs the queries of rows()[0 .. count) with the scale, and starts their softmax, from the sinks where given.
  void Begin(int count, const void* q, int64_t batch);

  // Packs `columns` keys and their values; key_of(c) is the index of the key in column c.
  template <typename KeyOf>
  void PackKeys(int columns, const void* k, const void* v, const KeyOf& key_of) {
    const int64_t kv_head = rows_[0].head / shapes_.Group();
    const char* first = static_cast<const char*>(k) + k_.Offset(batch_, kv_head, 0);
    for (int c = 0; c < columns; ++c) pointers_[c] = first + key_of(c) * k_.row;
    kernels_.pack_transposed[type_](pointers_, columns, tile_.depth, 1.0f, keys_);
    first = static_cast<const char*>(v) + v_.Offset(batch_, kv_head, 0);
    for (int c = 0; c < columns; ++c) pointers_[c] = first + key_of(c) * v_.row;
    kernels_.pack_rows[type_](pointers_, columns, static_cast<int>(shapes_.v_head_size), tile_.width, values_);
  }

  // Lets every row attend to the columns of its range.
  void Attend(int columns, const cpu::ScoreEdit& edit) {
    kernels_.attend(tile_, {columns, keys_, values_}, ranges_, edit);
  }

  // Writes the rows of Y, and of lse where wanted.
  void Finish();

 private:
  const Execution& execution_;
  const Shapes& shapes_;
  const CommonAttributes& attributes_;
  const void* sinks_;
  const TileSize size_;
  const cpu::TileKernels& kernels_;
  const int type_;
  const Strides q_, k_, v_, y_;
  int64_t batch_ = 0;

  // Scratch.
  cpu::QueryTile tile_;
  float* keys_ = nullptr;
  float* values_ = nullptr;
  TileRow* rows_ = nullptr;
  cpu::ColumnRange* ranges_ = nullptr;
  const void** pointers_ = nullptr;
};

}  // namespace longspan

#endif  // LONGSPAN_ATTENTION_ROW_TILE_H_
