#include "block_sparse_attention/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

#include "attention/row_tile.h"
#include "attention/tasks.h"
#include "block_sparse_attention/plan.h"
#include "cpu/elements.h"

namespace longspan::block_sparse {
namespace {

using cpu::ColumnRange;

constexpr float kForbidden = -std::numeric_limits<float>::infinity();

// What a row of blocks lists: a key block under a mask, once or several times.
struct Listing {
  int32_t block;
  int32_t copy;  // how many listings of this block the row has before this one, under other masks
  int32_t row;   // of blocks, counted from the task's first
  int32_t mask;  // -1: none
  int32_t times;
};

// One query row of a tile.
struct Row {
  int32_t block_row;   // counted from the task's first
  int64_t mask_row;    // query's number in its row of blocks
  int64_t position;    // by index
  int32_t q_position;  // as given
  int64_t bias;        // index in distance_bias of the entry for key 0
};

// Neighbouring columns of a key tile that hold keys of one block.
struct Piece {
  int first, last;
  int64_t block_key;  // first key of the block
  bool contiguous;    // the keys are consecutive
  int32_t low, high;  // least and largest of the keys' given positions
};

// The columns of one piece that one row sees: all of [first, last), or some where edit is set.
struct Segment {
  int first = 0;
  int last = 0;
  bool edit = false;
  const Listing* listing = nullptr;
};

void Forbid(float* first, const float* last) {
  for (; first < last; ++first) *first = kForbidden;
}

inline bool Bit(const uint8_t* bits, int64_t index) { return bits[index / 8] >> (index % 8) & 1; }

// What a thread needs to run tasks.
class Worker {
 public:
  Worker(const Problem& problem, const Plan& plan, const cpu::TileKernels& kernels)
      : problem_(problem),
        attributes_(problem.attributes),
        shapes_(problem.shapes),
        plan_(plan),
        kernels_(kernels),
        has_bias_(problem.input_shapes[kDistanceBias].has_value()),
        max_pieces_(plan.tile.columns / std::min<int64_t>(plan.tile.columns, problem.attributes.kv_block_size) + 2),
        tile_(problem, problem.attributes, problem.inputs[kSinks], plan.tile, kernels) {
    if (problem.input_shapes[kQPositions]) {
      const Shape &q = *problem.input_shapes[kQPositions], &k = *problem.input_shapes[kKPositions];
      given_positions_ = true;
      q_axes_ = {q[0], q[1], q[2]};
      k_axes_ = {k[0], k[1], k[2]};
    }
  }

  void Carve(cpu::Arena* arena) {
    tile_.Carve(arena);
    rows_ = arena->Take<Row>(plan_.tile.rows);
    edited_ = arena->Take<bool>(plan_.tile.rows);
    columns_ = arena->Take<int64_t>(plan_.tile.columns);
    positions_ = arena->Take<int32_t>(plan_.tile.columns);
    listings_ = arena->Take<Listing>(plan_.max_listings);
    pieces_ = arena->Take<Piece>(max_pieces_);
    by_row_ = arena->Take<const Listing*>(max_pieces_ * plan_.max_blocks);
  }

  void Run(const Task& task);

 private:
  void FindRows();
  void FindListings();
  void AddList(const BlockList& list, int32_t row, int64_t end);
  void AttendBlock(const Listing* begin, const Listing* end);
  void AddPiece(int first, int64_t block_key, const Listing* begin, const Listing* end);
  void AttendColumns();
  Segment Look(int row, int piece) const;
  int ColumnOf(const Piece& piece, int64_t key) const;
  void EditSegment(const Row& row, const Piece& piece, const Segment& segment, float* scores) const;
  static void Edit(void* worker, int row, ColumnRange range, float* scores, float* weights);

  const Problem& problem_;
  const Attributes& attributes_;
  const Shapes& shapes_;
  const Plan& plan_;
  const cpu::TileKernels& kernels_;
  const bool has_bias_;
  const int64_t max_pieces_;
  bool given_positions_ = false;
  SharedAxes q_axes_, k_axes_;  // of q_positions and k_positions
  RowTile tile_;

  // Scratch.
  Row* rows_ = nullptr;
  bool* edited_ = nullptr;            // rows whose scores need an edit in the current key tile
  int64_t* columns_ = nullptr;        // key of each column of the current key tile
  int32_t* positions_ = nullptr;      // its given position
  Listing* listings_ = nullptr;       // by block, copy, row
  Piece* pieces_ = nullptr;           // of the current key tile
  const Listing** by_row_ = nullptr;  // [piece][row of blocks]: what the row lists there, or null

  // The current task.
  const Task* task_ = nullptr;
  const KeyPadding* padding_ = nullptr;
  const bool* valid_ = nullptr;  // attn_mask, where some key is padding
  const int32_t* k_positions_ = nullptr;
  int64_t key_end_ = 0;  // keys from here on are for none of the task's queries
  int64_t listing_count_ = 0;
  int column_count_ = 0;
  int piece_count_ = 0;
};

void Worker::Run(const Task& task) {
  task_ = &task;
  padding_ = &plan_.batches[static_cast<size_t>(task.batch)];
  const auto* valid = static_cast<const bool*>(problem_.inputs[kAttnMask]);
  valid_ = padding_->holes ? valid + task.batch * shapes_.seq_k : nullptr;
  if (given_positions_) {
    k_positions_ = static_cast<const int32_t*>(problem_.inputs[kKPositions]) +
                   k_axes_.Index(task.batch, task.head / shapes_.Group());
  }
  key_end_ = KeyEnd(problem_, *padding_, task.last);
  FindRows();
  tile_.Begin(static_cast<int>((task.last - task.first) * task.heads), problem_.inputs[kQ], task.batch);
  FindListings();
  column_count_ = piece_count_ = 0;
  for (const Listing *begin = listings_, *all = listings_ + listing_count_; begin < all;) {
    const Listing* end = begin;
    while (end < all && end->block == begin->block && end->copy == begin->copy) ++end;
    AttendBlock(begin, end);
    begin = end;
  }
  if (column_count_ > 0) AttendColumns();
  tile_.Finish();
}

void Worker::FindRows() {
  const auto* q_positions = static_cast<const int32_t*>(problem_.inputs[kQPositions]);
  const int64_t distances = shapes_.seq_q + shapes_.seq_k - 1;
  const bool shared_bias = has_bias_ && (*problem_.input_shapes[kDistanceBias])[0] == 1;
  int count = 0;
  for (int64_t query = task_->first; query < task_->last; ++query) {
    const int64_t block = query / attributes_.q_block_size;
    for (int64_t head = task_->head; head < task_->head + task_->heads; ++head) {
      tile_.rows()[count] = {query, head};
      Row& row = rows_[count++];
      row.block_row = static_cast<int32_t>(block - task_->block);
      row.mask_row = query - block * attributes_.q_block_size;
      row.position = padding_->offset + query;
      row.q_position = given_positions_ ? q_positions[q_axes_.Index(task_->batch, head) + query] : 0;
      row.bias = (shared_bias ? 0 : head * distances) + shapes_.seq_q - 1 - query;
    }
  }
}

// The listings of the task's rows of blocks, equal ones counted, in the order of their keys: that makes windows and
// causal triangles contiguous ranges of columns, and brings what several rows list together.
void Worker::FindListings() {
  listing_count_ = 0;
  for (int64_t block = task_->block; block < task_->block + task_->blocks; ++block) {
    Listing* first = listings_ + listing_count_;
    const auto row = static_cast<int32_t>(block - task_->block);
    const int64_t last = std::min(task_->last, (block + 1) * attributes_.q_block_size);
    AddList(plan_.lists.partial, row, KeyEnd(problem_, *padding_, last));
    AddList(plan_.lists.full, row, KeyEnd(problem_, *padding_, last));
    Listing* end = listings_ + listing_count_;
    std::sort(first, end,
              [](const Listing& x, const Listing& y) { return std::tie(x.block, x.mask) < std::tie(y.block, y.mask); });
    Listing* kept = first;
    for (const Listing* next = first; next < end; ++next) {
      if (kept > first && kept[-1].block == next->block && kept[-1].mask == next->mask) {
        ++kept[-1].times;
        continue;
      }
      const int32_t copy = kept > first && kept[-1].block == next->block ? kept[-1].copy + 1 : 0;
      *kept = *next;
      kept++->copy = copy;
    }
    listing_count_ = kept - listings_;
  }
  if (task_->blocks == 1) return;
  std::sort(listings_, listings_ + listing_count_, [](const Listing& x, const Listing& y) {
    return std::tie(x.block, x.copy, x.row) < std::tie(y.block, y.copy, y.row);
  });
}

// Adds what one list holds for a row of blocks, of blocks that have keys before `end`.
void Worker::AddList(const BlockList& list, int32_t row, int64_t end) {
  const int64_t size = attributes_.kv_block_size;
  const BlockList::Row entries = list.At(task_->batch, task_->head, task_->block + row);
  for (int64_t slot = 0; slot < entries.count; ++slot) {
    const int32_t block = entries.indices[slot];
    if (block * size >= end) continue;
    listings_[listing_count_++] = {block, 0, row, entries.masks == nullptr ? -1 : entries.masks[slot], 1};
  }
}

// Adds the keys of a block that [begin, end) list to the key tile, which is attended to whenever it is full.
void Worker::AttendBlock(const Listing* begin, const Listing* end) {
  const int64_t block_key = begin->block * attributes_.kv_block_size;
  const int64_t last = std::min(block_key + attributes_.kv_block_size, key_end_);
  for (int64_t key = block_key; key < last;) {
    if (column_count_ == plan_.tile.columns || piece_count_ == max_pieces_) AttendColumns();
    const int first = column_count_;
    if (valid_ == nullptr) {
      const int64_t stop = std::min(last, key + plan_.tile.columns - column_count_);
      for (; key < stop; ++key) columns_[column_count_++] = key;
    } else {
      for (; key < last && column_count_ < plan_.tile.columns; ++key) {
        if (valid_[key]) columns_[column_count_++] = key;
      }
    }
    if (column_count_ > first) AddPiece(first, block_key, begin, end);
  }
}

void Worker::AddPiece(int first, int64_t block_key, const Listing* begin, const Listing* end) {
  Piece& piece = pieces_[piece_count_];
  const int last = column_count_ - 1;
  const bool contiguous = columns_[last] - columns_[first] == last - first;
  piece = {first, column_count_, block_key, contiguous, 0, 0};
  if (given_positions_) {
    for (int c = first; c < column_count_; ++c) positions_[c] = k_positions_[columns_[c]];
    const auto [low, high] = std::minmax_element(positions_ + first, positions_ + column_count_);
    piece.low = *low;
    piece.high = *high;
  }
  const Listing** by_row = by_row_ + piece_count_ * task_->blocks;
  std::fill(by_row, by_row + task_->blocks, nullptr);
  for (const Listing* listing = begin; listing < end; ++listing) by_row[listing->row] = listing;
  ++piece_count_;
}

// Lets every row attend to the keys of the tile, which is empty afterwards. A row's range reaches from the first to the
// last of the columns it sees; what lies between and is not for it to see, its edit forbids.
void Worker::AttendColumns() {
  tile_.PackKeys(column_count_, problem_.inputs[kK], problem_.inputs[kV], [this](int c) { return columns_[c]; });
  bool any = false;
  for (int r = 0; r < tile_.count(); ++r) {
    ColumnRange range{0, 0};
    bool edit = false;
    for (int p = 0; p < piece_count_; ++p) {
      const Segment segment = Look(r, p);
      if (segment.first >= segment.last) continue;
      if (range.last == 0) range.first = range.last = segment.first;
      edit = edit || segment.edit || segment.first != range.last;
      range.last = segment.last;
    }
    tile_.ranges()[r] = range;
    edited_[r] = edit;
    any = any || edit;
  }
  tile_.Attend(column_count_, any ? cpu::ScoreEdit{Edit, this, false} : cpu::ScoreEdit{});
  column_count_ = piece_count_ = 0;
}

// The column of a key, or where it would be.
int Worker::ColumnOf(const Piece& piece, int64_t key) const {
  if (piece.contiguous) {
    return static_cast<int>(std::clamp<int64_t>(piece.first + key - columns_[piece.first], piece.first, piece.last));
  }
  return static_cast<int>(std::lower_bound(columns_ + piece.first, columns_ + piece.last, key) - columns_);
}

Segment Worker::Look(int r, int p) const {
  const Piece& piece = pieces_[p];
  const Row& row = rows_[r];
  Segment segment;
  segment.listing = by_row_[p * task_->blocks + row.block_row];
  if (segment.listing == nullptr) return segment;
  segment.first = piece.first;
  segment.last = piece.last;
  segment.edit = segment.listing->times > 1 || has_bias_;
  if (segment.listing->mask >= 0) {
    const MaskRow& mask = plan_.masks[static_cast<size_t>(segment.listing->mask * plan_.mask_rows + row.mask_row)];
    segment.first = ColumnOf(piece, piece.block_key + mask.first);
    segment.last = ColumnOf(piece, piece.block_key + mask.last);
    segment.edit = segment.edit || mask.holes;
  }
  if (given_positions_) {
    if (attributes_.is_causal && row.q_position < piece.low) return {};
    segment.edit = segment.edit || (attributes_.is_causal && row.q_position < piece.high) ||
                   (attributes_.exclude_self && row.q_position >= piece.low && row.q_position <= piece.high);
    return segment;
  }
  if (attributes_.is_causal) segment.last = std::min(segment.last, ColumnOf(piece, row.position + 1));
  if (attributes_.exclude_self) {
    const int own = ColumnOf(piece, row.position);
    if (own >= segment.first && own < segment.last && columns_[own] == row.position) {
      if (own == segment.first) {
        ++segment.first;
      } else if (own == segment.last - 1) {
        --segment.last;
      } else {
        segment.edit = true;
      }
    }
  }
  return segment;
}

void Worker::Edit(void* worker, int r, ColumnRange range, float* scores, float*) {
  const Worker& w = *static_cast<const Worker*>(worker);
  if (!w.edited_[r]) return;
  int done = range.first;
  for (int p = 0; p < w.piece_count_; ++p) {
    const Segment segment = w.Look(r, p);
    if (segment.first >= segment.last) continue;
    Forbid(scores + done, scores + segment.first);
    done = segment.last;
    if (segment.edit) w.EditSegment(w.rows_[r], w.pieces_[p], segment, scores);
  }
}

void Worker::EditSegment(const Row& row, const Piece& piece, const Segment& segment, float* scores) const {
  const Listing& listing = *segment.listing;
  const int count = segment.last - segment.first;
  const int64_t* keys = columns_ + segment.first;
  scores += segment.first;
  if (has_bias_) {
    const auto type = static_cast<int>(problem_.type);
    const void* bias = problem_.inputs[kDistanceBias];
    if (piece.contiguous) {
      const auto size = static_cast<int64_t>(cpu::ElementSize(problem_.type));
      kernels_.add[type](static_cast<const char*>(bias) + (row.bias + keys[0]) * size, cpu::kLog2E, count, scores);
    } else {
      for (int i = 0; i < count; ++i) scores[i] += LoadElement(bias, row.bias + keys[i], problem_.type) * cpu::kLog2E;
    }
  }
  if (listing.times > 1) {  // m terms exp2(s) are one term exp2(s + log2(m))
    const float more = std::log2(static_cast<float>(listing.times));
    for (int i = 0; i < count; ++i) scores[i] += more;
  }
  if (listing.mask >= 0) {
    const Shape& shape = *problem_.input_shapes[kBlockMasks];
    const auto* masks = static_cast<const uint8_t*>(problem_.inputs[kBlockMasks]);
    const uint8_t* bits = masks + (listing.mask * shape[1] + row.mask_row) * shape[2];
    if (piece.contiguous) {
      kernels_.forbid_unset(bits, keys[0] - piece.block_key, count, scores);
    } else {
      for (int i = 0; i < count; ++i) {
        if (!Bit(bits, keys[i] - piece.block_key)) scores[i] = kForbidden;
      }
    }
  }
  if (given_positions_) {
    const int32_t* positions = positions_ + segment.first;
    const int32_t own = row.q_position;
    if (attributes_.is_causal) {
      for (int i = 0; i < count; ++i) scores[i] = positions[i] > own ? kForbidden : scores[i];
    }
    if (attributes_.exclude_self) {
      for (int i = 0; i < count; ++i) scores[i] = positions[i] == own ? kForbidden : scores[i];
    }
  } else if (attributes_.exclude_self) {
    const int own = ColumnOf(piece, row.position);
    if (own >= segment.first && own < segment.last && columns_[own] == row.position) {
      scores[own - segment.first] = kForbidden;
    }
  }
}

}  // namespace

void Compute(const Problem& problem, const cpu::TileKernels& kernels, cpu::Executor& executor) {
  const Plan plan = MakePlan(problem);
  RunTasks(plan.tasks, [&] { return Worker(problem, plan, kernels); }, executor);
}

}  // namespace longspan::block_sparse
