#include "attention/row_tile.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/elements.h"
#include "cpu/executor.h"

namespace longspan {
namespace {

// A tile of rows, and a tile of keys, take at most this many floats each: together they stay within an L2 cache of 1
// MB.
constexpr int64_t kTileFloats = 65536;
// Enough rows to make packing the keys a few percent of the work.
constexpr int64_t kMaxRows = 192;
constexpr int64_t kMinRows = 32;
constexpr int64_t kMinColumns = 32;

}  // namespace

float LoadElement(const void* data, int64_t index, cpu::ElementType type) {
  switch (type) {
    case cpu::ElementType::kFloat32:
      return static_cast<const float*>(data)[index];
    case cpu::ElementType::kFloat16:
      return cpu::ToFloat(static_cast<const cpu::Half*>(data)[index]);
    case cpu::ElementType::kBFloat16:
      return cpu::ToFloat(static_cast<const cpu::BFloat16*>(data)[index]);
  }
  return 0;
}

TileSize ChooseTileSize(const Shapes& shapes) {
  const int64_t floats = shapes.head_size + cpu::PadToLanes(shapes.v_head_size);
  const int64_t fit =
      std::max<int64_t>(1, kTileFloats / std::max<int64_t>(1, floats)) / cpu::kMaxLanes * cpu::kMaxLanes;
  int64_t rows = std::clamp<int64_t>(fit, kMinRows, kMaxRows);
  // Small problems: smaller tiles, so that every core gets a few.
  const auto threads = static_cast<int64_t>(cpu::HardwareThreads());
  const int64_t total = shapes.batch * shapes.q_num_heads * shapes.seq_q;
  while (rows >= 2 * kMinRows && total / rows < 4 * threads) rows /= 2;
  return {static_cast<int>(rows), static_cast<int>(std::clamp<int64_t>(fit, kMinColumns, cpu::kMaxTileColumns))};
}

RowTile::RowTile(const Execution& execution, const CommonAttributes& attributes, const void* sinks,
                 const TileSize& size, const cpu::TileKernels& kernels)
    : execution_(execution),
      shapes_(execution.shapes),
      attributes_(attributes),
      sinks_(sinks),
      size_(size),
      kernels_(kernels),
      type_(static_cast<int>(execution.type)),
      q_(shapes_, shapes_.q_num_heads, shapes_.seq_q, shapes_.head_size, execution.type),
      k_(shapes_, shapes_.kv_num_heads, shapes_.seq_k, shapes_.head_size, execution.type),
      v_(shapes_, shapes_.kv_num_heads, shapes_.seq_k, shapes_.v_head_size, execution.type),
      y_(shapes_, shapes_.q_num_heads, shapes_.seq_q, shapes_.v_head_size, execution.type) {}

void RowTile::Carve(cpu::Arena* arena) {
  const int64_t width = cpu::PadToLanes(shapes_.v_head_size);
  tile_.queries = arena->Take<float>(cpu::PadToLanes(size_.rows) * shapes_.head_size);
  tile_.out = arena->Take<float>(size_.rows * width);
  tile_.top = arena->Take<float>(size_.rows);
  tile_.total = arena->Take<float>(size_.rows);
  keys_ = arena->Take<float>(size_.columns * shapes_.head_size);
  values_ = arena->Take<float>(size_.columns * width);
  rows_ = arena->Take<TileRow>(size_.rows);
  ranges_ = arena->Take<cpu::ColumnRange>(size_.rows);
  pointers_ = arena->Take<const void*>(std::max(size_.rows, size_.columns));
}

void RowTile::Begin(int count, const void* q, int64_t batch) {
  batch_ = batch;
  tile_.rows = count;
  tile_.depth = static_cast<int>(shapes_.head_size);
  tile_.width = static_cast<int>(cpu::PadToLanes(shapes_.v_head_size));
  tile_.softcap = attributes_.softcap;
  for (int r = 0; r < count; ++r) {
    pointers_[r] = static_cast<const char*>(q) + q_.Offset(batch, rows_[r].head, rows_[r].query);
  }
  const double scale = attributes_.scale ? *attributes_.scale : 1.0 / std::sqrt(static_cast<double>(shapes_.head_size));
  const double factor = tile_.softcap > 0 ? scale / tile_.softcap : scale * static_cast<double>(cpu::kLog2E);
  kernels_.pack_transposed[type_](pointers_, count, tile_.depth, static_cast<float>(factor), tile_.queries);
  std::memset(tile_.out, 0, static_cast<size_t>(count) * static_cast<size_t>(tile_.width) * sizeof(float));
  for (int r = 0; r < count; ++r) {
    tile_.top[r] = cpu::kNoTop;
    tile_.total[r] = 0;
    if (sinks_ == nullptr) continue;
    const float sink = LoadElement(sinks_, rows_[r].head, execution_.type) * cpu::kLog2E;
    if (sink == -std::numeric_limits<float>::infinity()) continue;  // no weight
    tile_.top[r] = std::min(sink, -cpu::kNoTop);
    tile_.total[r] = 1;
  }
}

void RowTile::Finish() {
  for (int r = 0; r < tile_.rows; ++r) {
    const TileRow& row = rows_[r];
    float* out = tile_.out + static_cast<ptrdiff_t>(r) * tile_.width;
    const float total = tile_.total[r];
    if (total == 0) std::memset(out, 0, static_cast<size_t>(tile_.width) * sizeof(float));
    kernels_.store_row[type_](out, total == 0 ? 0.0f : 1.0f / total, static_cast<int>(shapes_.v_head_size),
                              static_cast<char*>(execution_.output) + y_.Offset(batch_, row.head, row.query));
    if (execution_.lse != nullptr) {
      execution_.lse[(batch_ * shapes_.q_num_heads + row.head) * shapes_.seq_q + row.query] =
          total == 0 ? -std::numeric_limits<float>::infinity() : tile_.top[r] * cpu::kLn2 + std::log(total);
    }
  }
}

}  // namespace longspan
