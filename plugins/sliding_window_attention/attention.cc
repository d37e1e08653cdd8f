#include "sliding_window_attention/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "attention/row_tile.h"
#include "attention/tasks.h"
#include "sliding_window_attention/plan.h"

namespace longspan::sliding_window {
namespace {

using cpu::ColumnRange;
using cpu::ElementSize;

float Ramp(float x) { return x < 0.0f ? 0.0f : (x > 1.0f ? 1.0f : x); }

// The keys that one row of a tile sees. Bounds are inclusive and in the tile's key coordinate.
struct Band {
  int64_t position;  // of the row's own key, in the tile's key coordinate
  int64_t low;
  int64_t high;
};

// What a thread needs to run tasks.
class Worker {
 public:
  Worker(const Problem& problem, const Plan& plan, const cpu::TileKernels& kernels)
      : problem_(problem),
        plan_(plan),
        kernels_(kernels),
        tile_(problem, problem.attributes, problem.inputs[kSinks], plan.tile, kernels) {}

  void Carve(cpu::Arena* arena) {
    tile_.Carve(arena);
    bands_ = arena->Take<Band>(plan_.tile.rows);
    columns_ = arena->Take<int64_t>(plan_.tile.columns);
  }

  void Run(const Task& task);

 private:
  int FindRows();
  int FindGlobalRows();
  void AttendBand(bool global_row);
  void AttendGlobalKeys();
  void AttendColumns(int columns, bool contiguous, const cpu::ScoreEdit& edit);
  static void EditBand(void* worker, int row, ColumnRange range, float* scores, float* weights);
  static void EditGlobalKeys(void* worker, int row, ColumnRange range, float* scores, float* weights);
  const void* BiasRow(const TileRow& row) const;

  const void* InputAt(CommonInput plain, Input separate) const {
    const bool use_separate = task_->global && problem_.inputs[separate] != nullptr;
    return use_separate ? problem_.inputs[separate] : problem_.inputs[plain];
  }

  const Problem& problem_;
  const Plan& plan_;
  const cpu::TileKernels& kernels_;
  RowTile tile_;

  // Scratch.
  Band* bands_ = nullptr;       // as many as the tile has rows
  int64_t* columns_ = nullptr;  // key coordinate of each column of the current key tile, ascending

  // The current task.
  const Task* task_ = nullptr;
  const BatchMasks* masks_ = nullptr;
  int64_t step_ = 1;          // dilation
  int64_t first_key_ = 0;     // key index of key coordinate 0: the tile's keys are first_key_ + step_ * coordinate
  int64_t last_column_ = -1;  // largest coordinate of a key that exists
  bool contiguous_ = false;   // columns_ of the current key tile are consecutive
};

void Worker::Run(const Task& task) {
  task_ = &task;
  masks_ = &plan_.batches[static_cast<size_t>(task.batch)];
  const int rows = task.global ? FindGlobalRows() : FindRows();
  if (rows == 0) return;
  tile_.Begin(rows, InputAt(kQ, kGlobalQ), task.batch);
  AttendBand(task.global);
  if (!task.global && !masks_->global_keys.empty()) AttendGlobalKeys();
  tile_.Finish();
}

// Rows of a local task. The dilation is gone from here on: rows and keys of one residue class are dense in
// `coordinate`.
int Worker::FindRows() {
  const Attributes& a = problem_.attributes;
  step_ = Dilation(a, task_->head);
  const int64_t base = masks_->offset + task_->residue;
  first_key_ = (base % step_ + step_) % step_;
  last_column_ = masks_->length > first_key_ ? (masks_->length - 1 - first_key_) / step_ : -1;
  const auto* spans = static_cast<const float*>(problem_.inputs[kSpans]);
  const auto& globals = masks_->global_rows;
  int count = 0;
  for (int64_t t = task_->first; t < task_->first + task_->count; ++t) {
    const int64_t query = task_->residue + t * step_;
    if (!globals.empty() && std::binary_search(globals.begin(), globals.end(), static_cast<int32_t>(query))) continue;
    const int64_t position = (base - first_key_) / step_ + t;
    int64_t low = a.left_window_size < 0 ? 0 : std::max<int64_t>(0, position - a.left_window_size);
    int64_t high = a.right_window_size < 0 ? last_column_ : std::min(last_column_, position + a.right_window_size);
    if (a.is_causal) high = std::min(high, position);
    for (int64_t head = task_->head; head < task_->head + task_->heads; ++head) {
      Band band{position, low, high};
      if (spans != nullptr) {
        // Keys at this distance or more have weight 0: they are not part of the row at all.
        const double reach =
            (static_cast<double>(a.span_ramp) + static_cast<double>(spans[head])) / static_cast<double>(step_);
        const int64_t most = reach > 0 ? static_cast<int64_t>(std::ceil(std::min(reach, 1e15))) - 1 : -1;
        band.low = std::max(low, position - most);
        band.high = std::min(high, position + most);
      }
      tile_.rows()[count] = {query, head};
      bands_[count++] = band;
    }
  }
  return count;
}

int Worker::FindGlobalRows() {
  step_ = 1;
  first_key_ = 0;
  last_column_ = masks_->length - 1;
  int count = 0;
  for (int64_t t = task_->first; t < task_->first + task_->count; ++t) {
    const int64_t query = masks_->global_rows[static_cast<size_t>(t)];
    const int64_t position = masks_->offset + query;
    const int64_t high = problem_.attributes.is_causal ? std::min(last_column_, position) : last_column_;
    for (int64_t head = task_->head; head < task_->head + task_->heads; ++head) {
      tile_.rows()[count] = {query, head};
      bands_[count++] = {position, 0, high};
    }
  }
  return count;
}

// The band of local rows, global keys left out; all keys of global rows.
void Worker::AttendBand(bool global_row) {
  int64_t low = std::numeric_limits<int64_t>::max(), high = -1;
  for (int r = 0; r < tile_.count(); ++r) {
    if (bands_[r].low > bands_[r].high) continue;
    low = std::min(low, bands_[r].low);
    high = std::max(high, bands_[r].high);
  }
  const auto mask = [&](Input input) -> const bool* {
    const auto* data = static_cast<const bool*>(problem_.inputs[input]);
    return data == nullptr ? nullptr : data + task_->batch * problem_.shapes.seq_k;
  };
  const bool* valid = masks_->holes ? mask(kAttnMask) : nullptr;
  const bool* left_out = masks_->holes && !global_row ? mask(kGlobalMask) : nullptr;
  cpu::ScoreEdit edit;
  if (!global_row && (problem_.inputs[kBandBias] != nullptr || problem_.inputs[kSpans] != nullptr)) {
    edit = {EditBand, this, problem_.inputs[kSpans] != nullptr};
  }
  while (low <= high) {
    int count = 0;
    for (; low <= high && count < plan_.tile.columns; ++low) {
      const int64_t key = first_key_ + low * step_;
      if (valid != nullptr && !valid[key]) continue;
      if (left_out != nullptr && left_out[key]) continue;
      columns_[count++] = low;
    }
    if (count > 0) AttendColumns(count, columns_[count - 1] - columns_[0] == count - 1, edit);
  }
}

// Global keys of local rows, once each whether or not they are in the band.
void Worker::AttendGlobalKeys() {
  // From here the key coordinate is the key's index.
  for (int r = 0; r < tile_.count(); ++r) {
    const int64_t position = masks_->offset + tile_.rows()[r].query;
    bands_[r] = {position, 0, problem_.attributes.is_causal ? position : std::numeric_limits<int32_t>::max()};
  }
  const int64_t band_step = step_;
  first_key_ = 0;
  step_ = 1;
  cpu::ScoreEdit edit;
  if (problem_.inputs[kBandBias] != nullptr) edit = {EditGlobalKeys, this, false};
  const auto& keys = masks_->global_keys;
  for (size_t first = 0; first < keys.size(); first += static_cast<size_t>(plan_.tile.columns)) {
    const size_t count = std::min(keys.size() - first, static_cast<size_t>(plan_.tile.columns));
    std::copy_n(keys.begin() + static_cast<ptrdiff_t>(first), count, columns_);
    AttendColumns(static_cast<int>(count), false, edit);
  }
  step_ = band_step;
}

// Packs the keys columns_[0 .. columns) and lets every row attend to those between its bounds.
void Worker::AttendColumns(int columns, bool contiguous, const cpu::ScoreEdit& edit) {
  contiguous_ = contiguous;
  tile_.PackKeys(columns, InputAt(kK, kGlobalK), InputAt(kV, kGlobalV),
                 [this](int c) { return first_key_ + columns_[c] * step_; });
  for (int r = 0; r < tile_.count(); ++r) {
    const Band& band = bands_[r];
    if (contiguous) {
      const auto clamp = [&](int64_t c) { return static_cast<int>(std::clamp<int64_t>(c - columns_[0], 0, columns)); };
      tile_.ranges()[r] = {clamp(band.low), clamp(band.high + 1)};
    } else {
      const int64_t* begin = columns_;
      const int64_t* end = begin + columns;
      tile_.ranges()[r] = {static_cast<int>(std::lower_bound(begin, end, band.low) - begin),
                           static_cast<int>(std::upper_bound(begin, end, band.high) - begin)};
    }
  }
  tile_.Attend(columns, edit);
}

const void* Worker::BiasRow(const TileRow& row) const {
  const Shape& shape = *problem_.input_shapes[kBandBias];
  const int64_t b = shape[0] > 1 ? task_->batch : 0;
  const int64_t h = shape[1] > 1 ? row.head : 0;
  const int64_t i = shape[2] > 1 ? row.query : 0;
  const int64_t index = ((b * shape[1] + h) * shape[2] + i) * shape[3];
  return static_cast<const char*>(problem_.inputs[kBandBias]) +
         index * static_cast<int64_t>(ElementSize(problem_.type));
}

void Worker::EditBand(void* worker, int r, ColumnRange range, float* scores, float* weights) {
  Worker& w = *static_cast<Worker*>(worker);
  const TileRow& row = w.tile_.rows()[r];
  const int64_t position = w.bands_[r].position;
  const Attributes& a = w.problem_.attributes;
  if (w.problem_.inputs[kBandBias] != nullptr) {
    const void* bias = w.BiasRow(row);
    const int64_t shift = a.left_window_size - position;  // index in the band = coordinate + shift
    if (w.contiguous_) {
      const int64_t index = w.columns_[range.first] + shift;
      w.kernels_.add[static_cast<int>(w.problem_.type)](
          static_cast<const char*>(bias) + index * static_cast<int64_t>(ElementSize(w.problem_.type)), cpu::kLog2E,
          range.last - range.first, scores + range.first);
    } else {
      for (int c = range.first; c < range.last; ++c) {
        scores[c] += LoadElement(bias, w.columns_[c] + shift, w.problem_.type) * cpu::kLog2E;
      }
    }
  }
  if (w.problem_.inputs[kSpans] != nullptr) {
    const float reach = a.span_ramp + static_cast<const float*>(w.problem_.inputs[kSpans])[row.head];
    const float inverse = 1.0f / a.span_ramp;
    if (w.contiguous_) {
      // Whole numbers below 2^24 are exact in float, and this form vectorises.
      const auto start = static_cast<float>(w.columns_[range.first] - position);
      const auto step = static_cast<float>(w.step_);
      float* out = weights + range.first;
      for (int i = 0; i < range.last - range.first; ++i) {
        out[i] = Ramp((reach - std::fabs(start + static_cast<float>(i)) * step) * inverse);
      }
    } else {
      for (int c = range.first; c < range.last; ++c) {
        const auto distance = static_cast<float>(std::abs(w.columns_[c] - position) * w.step_);
        weights[c] = Ramp((reach - distance) * inverse);
      }
    }
  }
}

// Bias of the global keys that are in the band.
void Worker::EditGlobalKeys(void* worker, int r, ColumnRange range, float* scores, float*) {
  Worker& w = *static_cast<Worker*>(worker);
  const TileRow& row = w.tile_.rows()[r];
  const int64_t position = w.bands_[r].position;
  const Attributes& a = w.problem_.attributes;
  const int64_t step = Dilation(a, row.head);
  const void* bias = w.BiasRow(row);
  for (int c = range.first; c < range.last; ++c) {
    const int64_t difference = w.columns_[c] - position;
    const int64_t steps = difference / step;
    if (difference % step != 0 || steps < -a.left_window_size || steps > a.right_window_size) continue;
    scores[c] += LoadElement(bias, steps + a.left_window_size, w.problem_.type) * cpu::kLog2E;
  }
}

}  // namespace

void Compute(const Problem& problem, const cpu::TileKernels& kernels, cpu::Executor& executor) {
  const Plan plan = MakePlan(problem);
  RunTasks(plan.tasks, [&] { return Worker(problem, plan, kernels); }, executor);
}

}  // namespace longspan::sliding_window
