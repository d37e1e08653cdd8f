#include "sliding_window_attention/attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <thread>

#include "cpu/elements.h"
#include "sliding_window_attention/plan.h"

namespace longspan {
namespace {

using cpu::ColumnRange;
using cpu::ElementSize;
using cpu::ElementType;

// Where the vectors of a (B, H, S, W) or (B, S, H*W) tensor are, in bytes.
struct Strides {
  Strides(const Shapes& shapes, int64_t heads, int64_t sequence, int64_t width, ElementType type) {
    const auto size = static_cast<int64_t>(ElementSize(type));
    batch = heads * sequence * width * size;
    head = (shapes.split_heads ? sequence : 1) * width * size;
    row = (shapes.split_heads ? 1 : heads) * width * size;
  }
  int64_t Offset(int64_t b, int64_t h, int64_t s) const { return b * batch + h * head + s * row; }

  int64_t batch, head, row;
};

float LoadElement(const void* data, int64_t index, ElementType type) {
  switch (type) {
    case ElementType::kFloat32:
      return static_cast<const float*>(data)[index];
    case ElementType::kFloat16:
      return cpu::ToFloat(static_cast<const cpu::Half*>(data)[index]);
    case ElementType::kBFloat16:
      return cpu::ToFloat(static_cast<const cpu::BFloat16*>(data)[index]);
  }
  return 0;
}

// out[i] += data[i] * log2(e)
template <typename T>
void AddBias(const T* data, int count, float* out) {
  for (int i = 0; i < count; ++i) out[i] += cpu::ToFloat(data[i]) * cpu::kLog2E;
}

float Ramp(float x) { return x < 0.0f ? 0.0f : (x > 1.0f ? 1.0f : x); }

// Carves arrays out of one block of memory; with no block it only measures.
class Arena {
 public:
  explicit Arena(char* memory) : memory_(memory) {}
  template <typename T>
  T* Take(int64_t count) {
    T* result = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + used_);
    used_ += (static_cast<size_t>(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return result;
  }
  size_t Used() const { return used_; }

  static constexpr size_t kAlignment = 64;

 private:
  char* memory_;
  size_t used_ = 0;
};

// One query row of a tile. Key bounds are inclusive and in the tile's key coordinate.
struct Row {
  int64_t query;     // row index in Q
  int64_t head;      // query head
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
        type_(static_cast<int>(problem.type)),
        q_(problem.shapes, problem.shapes.q_num_heads, problem.shapes.seq_q, problem.shapes.head_size, problem.type),
        k_(problem.shapes, problem.shapes.kv_num_heads, problem.shapes.seq_k, problem.shapes.head_size, problem.type),
        v_(problem.shapes, problem.shapes.kv_num_heads, problem.shapes.seq_k, problem.shapes.v_head_size, problem.type),
        y_(problem.shapes, problem.shapes.q_num_heads, problem.shapes.seq_q, problem.shapes.v_head_size, problem.type) {
    Carve(nullptr);
  }

  size_t ScratchBytes() const { return scratch_bytes_ + Arena::kAlignment; }

  void SetScratch(void* memory) {
    const auto address = reinterpret_cast<uintptr_t>(memory);
    const uintptr_t aligned = (address + Arena::kAlignment - 1) / Arena::kAlignment * Arena::kAlignment;
    Carve(static_cast<char*>(memory) + (aligned - address));
  }

  void Run(const Task& task);

 private:
  void Carve(char* memory);
  void FindRows();
  void FindGlobalRows();
  void Begin();
  void Finish();
  void AttendBand(bool global_row);
  void AttendGlobalKeys();
  void AttendColumns(int columns, bool contiguous, const cpu::ScoreEdit& edit);
  static void EditBand(void* worker, int row, ColumnRange range, float* scores, float* weights);
  static void EditGlobalKeys(void* worker, int row, ColumnRange range, float* scores, float* weights);
  const void* BiasRow(const Row& row) const;

  const char* InputAt(Input plain, Input separate) const {
    const bool use_separate = task_->global && problem_.inputs[separate] != nullptr;
    return static_cast<const char*>(problem_.inputs[use_separate ? separate : plain]);
  }

  const Problem& problem_;
  const Plan& plan_;
  const cpu::TileKernels& kernels_;
  const int type_;
  const Strides q_, k_, v_, y_;
  size_t scratch_bytes_ = 0;

  // Scratch.
  cpu::QueryTile tile_;
  float* keys_ = nullptr;
  float* values_ = nullptr;
  Row* rows_ = nullptr;
  ColumnRange* ranges_ = nullptr;
  int64_t* columns_ = nullptr;  // key coordinate of each column of the current key tile, ascending
  const void** pointers_ = nullptr;

  // The current task.
  const Task* task_ = nullptr;
  const BatchMasks* masks_ = nullptr;
  int64_t step_ = 1;          // dilation
  int64_t first_key_ = 0;     // key index of key coordinate 0: the tile's keys are first_key_ + step_ * coordinate
  int64_t last_column_ = -1;  // largest coordinate of a key that exists
  bool contiguous_ = false;   // columns_ of the current key tile are consecutive
};

void Worker::Carve(char* memory) {
  const Shapes& s = problem_.shapes;
  const int64_t rows = plan_.max_rows, columns = plan_.max_columns, width = cpu::PadToLanes(s.v_head_size);
  Arena arena(memory);
  tile_.queries = arena.Take<float>(cpu::PadToLanes(rows) * s.head_size);
  tile_.out = arena.Take<float>(rows * width);
  tile_.top = arena.Take<float>(rows);
  tile_.total = arena.Take<float>(rows);
  keys_ = arena.Take<float>(columns * s.head_size);
  values_ = arena.Take<float>(columns * width);
  rows_ = arena.Take<Row>(rows);
  ranges_ = arena.Take<ColumnRange>(rows);
  columns_ = arena.Take<int64_t>(columns);
  pointers_ = arena.Take<const void*>(std::max(rows, columns));
  scratch_bytes_ = arena.Used();
}

void Worker::Run(const Task& task) {
  task_ = &task;
  masks_ = &plan_.batches[static_cast<size_t>(task.batch)];
  if (task.global) {
    FindGlobalRows();
  } else {
    FindRows();
  }
  if (tile_.rows == 0) return;
  Begin();
  AttendBand(task.global);
  if (!task.global && !masks_->global_keys.empty()) AttendGlobalKeys();
  Finish();
}

// Rows of a local task. The dilation is gone from here on: rows and keys of one residue class are dense in
// `coordinate`.
void Worker::FindRows() {
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
      Row row{query, head, position, low, high};
      if (spans != nullptr) {
        // Keys at this distance or more have weight 0: they are not part of the row at all.
        const double reach =
            (static_cast<double>(a.span_ramp) + static_cast<double>(spans[head])) / static_cast<double>(step_);
        const int64_t most = reach > 0 ? static_cast<int64_t>(std::ceil(std::min(reach, 1e15))) - 1 : -1;
        row.low = std::max(low, position - most);
        row.high = std::min(high, position + most);
      }
      rows_[count++] = row;
    }
  }
  tile_.rows = count;
}

void Worker::FindGlobalRows() {
  step_ = 1;
  first_key_ = 0;
  last_column_ = masks_->length - 1;
  int count = 0;
  for (int64_t t = task_->first; t < task_->first + task_->count; ++t) {
    const int64_t query = masks_->global_rows[static_cast<size_t>(t)];
    const int64_t position = masks_->offset + query;
    const int64_t high = problem_.attributes.is_causal ? std::min(last_column_, position) : last_column_;
    for (int64_t head = task_->head; head < task_->head + task_->heads; ++head) {
      rows_[count++] = {query, head, position, 0, high};
    }
  }
  tile_.rows = count;
}

void Worker::Begin() {
  const Shapes& s = problem_.shapes;
  const Attributes& a = problem_.attributes;
  tile_.depth = static_cast<int>(s.head_size);
  tile_.width = static_cast<int>(cpu::PadToLanes(s.v_head_size));
  tile_.softcap = a.softcap;
  const char* q = InputAt(kQ, kGlobalQ);
  for (int r = 0; r < tile_.rows; ++r) pointers_[r] = q + q_.Offset(task_->batch, rows_[r].head, rows_[r].query);
  const double scale = a.scale ? *a.scale : 1.0 / std::sqrt(static_cast<double>(s.head_size));
  const double factor = a.softcap > 0 ? scale / a.softcap : scale * static_cast<double>(cpu::kLog2E);
  kernels_.pack_transposed[type_](pointers_, tile_.rows, tile_.depth, static_cast<float>(factor), tile_.queries);
  std::memset(tile_.out, 0, static_cast<size_t>(tile_.rows) * static_cast<size_t>(tile_.width) * sizeof(float));
  for (int r = 0; r < tile_.rows; ++r) {
    tile_.top[r] = cpu::kNoTop;
    tile_.total[r] = 0;
    if (problem_.inputs[kSinks] == nullptr) continue;
    const float sink = LoadElement(problem_.inputs[kSinks], rows_[r].head, problem_.type) * cpu::kLog2E;
    if (sink == -std::numeric_limits<float>::infinity()) continue;  // no weight
    tile_.top[r] = std::min(sink, -cpu::kNoTop);
    tile_.total[r] = 1;
  }
}

// The band of local rows, global keys left out; all keys of global rows.
void Worker::AttendBand(bool global_row) {
  int64_t low = std::numeric_limits<int64_t>::max(), high = -1;
  for (int r = 0; r < tile_.rows; ++r) {
    if (rows_[r].low > rows_[r].high) continue;
    low = std::min(low, rows_[r].low);
    high = std::max(high, rows_[r].high);
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
    for (; low <= high && count < plan_.max_columns; ++low) {
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
  for (int r = 0; r < tile_.rows; ++r) {
    Row& row = rows_[r];
    row.position = masks_->offset + row.query;
    row.low = 0;
    row.high = problem_.attributes.is_causal ? row.position : std::numeric_limits<int32_t>::max();
  }
  const int64_t band_step = step_;
  first_key_ = 0;
  step_ = 1;
  cpu::ScoreEdit edit;
  if (problem_.inputs[kBandBias] != nullptr) edit = {EditGlobalKeys, this, false};
  const auto& keys = masks_->global_keys;
  for (size_t first = 0; first < keys.size(); first += static_cast<size_t>(plan_.max_columns)) {
    const size_t count = std::min(keys.size() - first, static_cast<size_t>(plan_.max_columns));
    std::copy_n(keys.begin() + static_cast<ptrdiff_t>(first), count, columns_);
    AttendColumns(static_cast<int>(count), false, edit);
  }
  step_ = band_step;
}

// Packs the keys columns_[0 .. columns) and lets every row attend to those between its bounds.
void Worker::AttendColumns(int columns, bool contiguous, const cpu::ScoreEdit& edit) {
  const Shapes& s = problem_.shapes;
  contiguous_ = contiguous;
  const int64_t kv_head = task_->head / (s.q_num_heads / s.kv_num_heads);
  const char* k = InputAt(kK, kGlobalK) + k_.Offset(task_->batch, kv_head, 0);
  const char* v = InputAt(kV, kGlobalV) + v_.Offset(task_->batch, kv_head, 0);
  for (int c = 0; c < columns; ++c) pointers_[c] = k + (first_key_ + columns_[c] * step_) * k_.row;
  kernels_.pack_transposed[type_](pointers_, columns, tile_.depth, 1.0f, keys_);
  for (int c = 0; c < columns; ++c) pointers_[c] = v + (first_key_ + columns_[c] * step_) * v_.row;
  kernels_.pack_rows[type_](pointers_, columns, static_cast<int>(s.v_head_size), tile_.width, values_);
  for (int r = 0; r < tile_.rows; ++r) {
    const Row& row = rows_[r];
    if (contiguous) {
      const auto clamp = [&](int64_t c) { return static_cast<int>(std::clamp<int64_t>(c - columns_[0], 0, columns)); };
      ranges_[r] = {clamp(row.low), clamp(row.high + 1)};
    } else {
      const int64_t* begin = columns_;
      const int64_t* end = begin + columns;
      ranges_[r] = {static_cast<int>(std::lower_bound(begin, end, row.low) - begin),
                    static_cast<int>(std::upper_bound(begin, end, row.high) - begin)};
    }
  }
  kernels_.attend(tile_, {columns, keys_, values_}, ranges_, edit);
}

const void* Worker::BiasRow(const Row& row) const {
  const Shape& shape = problem_.band_bias_shape;
  const int64_t b = shape[0] > 1 ? task_->batch : 0;
  const int64_t h = shape[1] > 1 ? row.head : 0;
  const int64_t i = shape[2] > 1 ? row.query : 0;
  const int64_t index = ((b * shape[1] + h) * shape[2] + i) * shape[3];
  return static_cast<const char*>(problem_.inputs[kBandBias]) +
         index * static_cast<int64_t>(ElementSize(problem_.type));
}

void Worker::EditBand(void* worker, int r, ColumnRange range, float* scores, float* weights) {
  const Worker& w = *static_cast<const Worker*>(worker);
  const Row& row = w.rows_[r];
  const Attributes& a = w.problem_.attributes;
  if (w.problem_.inputs[kBandBias] != nullptr) {
    const void* bias = w.BiasRow(row);
    const int64_t shift = a.left_window_size - row.position;  // index in the band = coordinate + shift
    if (w.contiguous_) {
      const int64_t index = w.columns_[range.first] + shift;
      const int count = range.last - range.first;
      float* out = scores + range.first;
      switch (w.problem_.type) {
        case ElementType::kFloat32:
          AddBias(static_cast<const float*>(bias) + index, count, out);
          break;
        case ElementType::kFloat16:
          AddBias(static_cast<const cpu::Half*>(bias) + index, count, out);
          break;
        case ElementType::kBFloat16:
          AddBias(static_cast<const cpu::BFloat16*>(bias) + index, count, out);
          break;
      }
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
      const auto start = static_cast<float>(w.columns_[range.first] - row.position);
      const auto step = static_cast<float>(w.step_);
      float* out = weights + range.first;
      for (int i = 0; i < range.last - range.first; ++i) {
        out[i] = Ramp((reach - std::fabs(start + static_cast<float>(i)) * step) * inverse);
      }
    } else {
      for (int c = range.first; c < range.last; ++c) {
        const auto distance = static_cast<float>(std::abs(w.columns_[c] - row.position) * w.step_);
        weights[c] = Ramp((reach - distance) * inverse);
      }
    }
  }
}

// Bias of the global keys that are in the band.
void Worker::EditGlobalKeys(void* worker, int r, ColumnRange range, float* scores, float*) {
  const Worker& w = *static_cast<const Worker*>(worker);
  const Row& row = w.rows_[r];
  const Attributes& a = w.problem_.attributes;
  const int64_t step = Dilation(a, row.head);
  const void* bias = w.BiasRow(row);
  for (int c = range.first; c < range.last; ++c) {
    const int64_t difference = w.columns_[c] - row.position;
    const int64_t steps = difference / step;
    if (difference % step != 0 || steps < -a.left_window_size || steps > a.right_window_size) continue;
    scores[c] += LoadElement(bias, steps + a.left_window_size, w.problem_.type) * cpu::kLog2E;
  }
}

void Worker::Finish() {
  const Shapes& s = problem_.shapes;
  for (int r = 0; r < tile_.rows; ++r) {
    const Row& row = rows_[r];
    float* out = tile_.out + static_cast<ptrdiff_t>(r) * tile_.width;
    const float total = tile_.total[r];
    if (total == 0) std::memset(out, 0, static_cast<size_t>(tile_.width) * sizeof(float));
    kernels_.store_row[type_](out, total == 0 ? 0.0f : 1.0f / total, static_cast<int>(s.v_head_size),
                              static_cast<char*>(problem_.output) + y_.Offset(task_->batch, row.head, row.query));
    if (problem_.lse != nullptr) {
      problem_.lse[(task_->batch * s.q_num_heads + row.head) * s.seq_q + row.query] =
          total == 0 ? -std::numeric_limits<float>::infinity() : tile_.top[r] * cpu::kLn2 + std::log(total);
    }
  }
}

// What the threads of one execution share.
struct Run {
  const Problem& problem;
  const Plan& plan;
  const cpu::TileKernels& kernels;
  cpu::Executor& executor;
  std::atomic<size_t> next{0};
  std::atomic<bool> out_of_memory{false};
};

// Runs tasks until none is left.
void Drain(void* context, size_t) {
  Run& run = *static_cast<Run*>(context);
  size_t index = run.next.fetch_add(1);
  if (index >= run.plan.tasks.size()) return;
  Worker worker(run.problem, run.plan, run.kernels);
  void* scratch = run.executor.Allocate(worker.ScratchBytes());
  if (scratch == nullptr) {
    run.out_of_memory = true;
    return;
  }
  worker.SetScratch(scratch);
  for (; index < run.plan.tasks.size(); index = run.next.fetch_add(1)) worker.Run(run.plan.tasks[index]);
  run.executor.Free(scratch);
}

}  // namespace

void SlidingWindowAttention(const Problem& problem, const cpu::TileKernels& kernels, cpu::Executor& executor) {
  const Plan plan = MakePlan(problem);
  if (plan.tasks.empty()) return;
  Run run{problem, plan, kernels, executor};
  // One call per core, each running tasks in the plan's order, heaviest first, until none is left. A pool with fewer
  // threads makes the calls one after the other; the late ones find nothing to do.
  const size_t threads = std::max(1u, std::thread::hardware_concurrency());
  executor.ParallelFor(Drain, std::min(threads, plan.tasks.size()), &run);
  if (run.out_of_memory) throw std::bad_alloc();
}

}  // namespace longspan
