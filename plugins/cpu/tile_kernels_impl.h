// The tile kernels, written once over `Vec`. A translation unit per ISA defines Vec, includes this file and
// instantiates MakeKernels(); everything is in an unnamed namespace, so that no code for one ISA is linked into
// another's path.
#ifndef LONGSPAN_CPU_TILE_KERNELS_IMPL_H_
#define LONGSPAN_CPU_TILE_KERNELS_IMPL_H_

#include <cmath>
#include <cstring>
#include <utility>

#include "cpu/elements.h"
#include "cpu/tile_kernels.h"

namespace longspan::cpu {
namespace {

constexpr int kLanes = Vec::kLanes;

// Rows of one register block. Divides kLanes, so that a block is a slice of one packed panel.
constexpr int kBlockRows = kLanes == 16 ? 8 : 4;
// Vectors across a register block of the first and second product; accumulators must fit the register file.
constexpr int kScoreVectors = 3;
constexpr int kValueVectors = 2;
static_assert(kLanes % kBlockRows == 0 && kMaxLanes % kLanes == 0 && kMaxTileColumns % kLanes == 0);

// ---- elementary functions ----------------------------------------------------------------------------------------

// 2^x for x <= 0 with an error below 2.5 units in the last place (the test measures 2.2), exact at 0; results below
// 2^-125.5 may be 0. The polynomial is the minimax one (Lawson iteration) of degree 5 with constant term 1 on
// [-1/2, 1/2], relative error 9.2e-8.
inline Vec Exp2(Vec x) {
  Vec t;
  const Vec whole = Vec::Split(x, &t);
  Vec p = Fma(t, Vec::Broadcast(0.001326472731307149f), Vec::Broadcast(0.009671512991189957f));
  p = Fma(p, t, Vec::Broadcast(0.05550733581185341f));
  p = Fma(p, t, Vec::Broadcast(0.24022242426872253f));
  p = Fma(p, t, Vec::Broadcast(0.6931470036506653f));
  p = Fma(p, t, Vec::Broadcast(1.0f));
  return Vec::Scale(p, whole);
}

// factor * tanh(x). Up to 1/2 a polynomial with a relative error of 1.5e-8 before rounding, which is all that most
// models need (scores below half their soft cap); beyond, (1 - e) / (1 + e) with e = exp(-2 |x|), where nothing
// cancels.
inline Vec ScaledTanh(Vec x, Vec factor) {
  const Vec z = x * x;
  // The factor is a constant of the loop around, and so are its products with the coefficients.
  Vec p = Fma(z, factor * Vec::Broadcast(0.01724149100482464f), factor * Vec::Broadcast(-0.05304549261927605f));
  p = Fma(p, z, factor * Vec::Broadcast(0.13325878977775574f));
  p = Fma(p, z, factor * Vec::Broadcast(-0.333331435918808f));
  p = Fma(p, z, factor);
  Vec y = x * p;
  const Vec limit = Vec::Broadcast(0.25f);
  if (AnyGreater(z, limit)) {
    const Vec one = Vec::Broadcast(1.0f);
    const Vec e = Exp2(Abs(x) * Vec::Broadcast(-2.0f * kLog2E));
    y = SelectGreater(z, limit, CopySign((one - e) / (one + e), x) * factor, y);
  }
  return y;
}

// ---- packing -----------------------------------------------------------------------------------------------------

constexpr int kPrefetchRows = 8;

template <typename T>
Vec LoadPartial(const T* p, int count) {
  T buffer[kLanes] = {};
  std::memcpy(buffer, p, static_cast<size_t>(count) * sizeof(T));
  return Vec::Load(buffer);
}

template <typename T>
void PackTransposed(const void* const* vectors, int count, int depth, float scale, float* panels) {
  const Vec factor = Vec::Broadcast(scale);
  for (int first = 0; first < count; first += kLanes) {
    const int present = count - first < kLanes ? count - first : kLanes;
    for (int d = 0; d < depth; d += kLanes) {
      const int width = depth - d < kLanes ? depth - d : kLanes;
      Vec block[kLanes];
      // Vectors lie too far apart for the hardware to foresee the next panel's.
      for (int i = first + kLanes; i < first + 2 * kLanes && i < count; ++i) {
        __builtin_prefetch(static_cast<const T*>(vectors[i]) + d);
      }
      if (present == kLanes && width == kLanes) {
        for (int i = 0; i < kLanes; ++i) block[i] = Vec::Load(static_cast<const T*>(vectors[first + i]) + d);
      } else {
        for (int i = 0; i < kLanes; ++i) {
          block[i] = i < present ? LoadPartial(static_cast<const T*>(vectors[first + i]) + d, width) : Vec::Zero();
        }
      }
      Vec::Transpose(block);
      float* out = panels + static_cast<ptrdiff_t>(first) * depth + static_cast<ptrdiff_t>(d) * kLanes;
      for (int i = 0; i < width; ++i) (block[i] * factor).Store(out + i * kLanes);
    }
  }
}

template <typename T>
void PackRows(const void* const* rows, int count, int width, int padded, float* out) {
  for (int i = 0; i < count; ++i, out += padded) {
    const T* row = static_cast<const T*>(rows[i]);
    if (i + kPrefetchRows < count) {
      const char* ahead = static_cast<const char*>(rows[i + kPrefetchRows]);
      for (size_t byte = 0; byte < static_cast<size_t>(width) * sizeof(T); byte += 64) __builtin_prefetch(ahead + byte);
    }
    int c = 0;
    for (; c + kLanes <= width; c += kLanes) Vec::Load(row + c).Store(out + c);
    if (c < width) {
      LoadPartial(row + c, width - c).Store(out + c);
      c += kLanes;
    }
    for (; c < padded; c += kLanes) Vec::Zero().Store(out + c);
  }
}

template <typename T>
void StoreRow(const float* row, float factor, int width, void* out) {
  T* target = static_cast<T*>(out);
  const Vec f = Vec::Broadcast(factor);
  int c = 0;
  for (; c + kLanes <= width; c += kLanes) (Vec::Load(row + c) * f).Store(target + c);
  if (c < width) {
    T buffer[kLanes];
    (Vec::Load(row + c) * f).Store(buffer);  // rows are padded to kMaxLanes, so this reads what is there
    std::memcpy(target + c, buffer, static_cast<size_t>(width - c) * sizeof(T));
  }
}

// ---- register blocks ---------------------------------------------------------------------------------------------

// scores[r][c] = sum over d of q[d][r] * k[c][d] for R rows and C vectors of columns.
template <int R, int C>
void ScoreBlock(const float* q, const float* k, int depth, float* scores) {
  const ptrdiff_t panel = static_cast<ptrdiff_t>(depth) * kLanes;
  Vec sum[R][C];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) sum[r][c] = Vec::Zero();
  }
  for (int d = 0; d < depth; ++d) {
    Vec column[C];
    for (int c = 0; c < C; ++c) column[c] = Vec::Load(k + c * panel);
    for (int r = 0; r < R; ++r) {
      const Vec a = Vec::Broadcast(q[r]);
      for (int c = 0; c < C; ++c) sum[r][c] = Fma(a, column[c], sum[r][c]);
    }
    q += kLanes;
    k += kLanes;
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) sum[r][c].Store(scores + r * kStripPitch + c * kLanes);
  }
}

// out[r][c] = out[r][c] * decay[r] + sum over n of p[r][n] * v[n][c] for R rows and C vectors of columns.
template <int R, int C>
void ValueBlock(const float* p, const float* v, int count, int pitch, const float* decay, float* out) {
  Vec sum[R][C];
  for (int r = 0; r < R; ++r) {
    const Vec factor = Vec::Broadcast(decay[r]);
    for (int c = 0; c < C; ++c) sum[r][c] = Vec::Load(out + r * static_cast<ptrdiff_t>(pitch) + c * kLanes) * factor;
  }
  for (int n = 0; n < count; ++n) {
    Vec column[C];
    for (int c = 0; c < C; ++c) column[c] = Vec::Load(v + c * kLanes);
    for (int r = 0; r < R; ++r) {
      const Vec a = Vec::Broadcast(p[r * kStripPitch]);
      for (int c = 0; c < C; ++c) sum[r][c] = Fma(a, column[c], sum[r][c]);
    }
    p += 1;
    v += pitch;
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) sum[r][c].Store(out + r * static_cast<ptrdiff_t>(pitch) + c * kLanes);
  }
}

// Scores of R rows and the columns [first, last), both multiples of kLanes.
template <int R>
void ScoreStrip(const float* q, const float* keys, int depth, int first, int last, float* strip) {
  int c = first;
  for (; c + kScoreVectors * kLanes <= last; c += kScoreVectors * kLanes) {
    ScoreBlock<R, kScoreVectors>(q, keys + static_cast<ptrdiff_t>(c) * depth, depth, strip + c);
  }
  if (c + 2 * kLanes <= last) {
    ScoreBlock<R, 2>(q, keys + static_cast<ptrdiff_t>(c) * depth, depth, strip + c);
    c += 2 * kLanes;
  }
  if (c < last) ScoreBlock<R, 1>(q, keys + static_cast<ptrdiff_t>(c) * depth, depth, strip + c);
}

// Adds the strip's columns [first, last) times their values to R rows of out.
template <int R>
void ValueStrip(const float* strip, const float* values, int first, int last, int width, const float* decay,
                float* out) {
  const float* p = strip + first;
  const float* v = values + static_cast<ptrdiff_t>(first) * width;
  int c = 0;
  for (; c + kValueVectors * kLanes <= width; c += kValueVectors * kLanes) {
    ValueBlock<R, kValueVectors>(p, v + c, last - first, width, decay, out + c);
  }
  for (; c < width; c += kLanes) ValueBlock<R, 1>(p, v + c, last - first, width, decay, out + c);
}

struct BlockFunctions {
  void (*score)(const float* q, const float* keys, int depth, int first, int last, float* strip);
  void (*value)(const float* strip, const float* values, int first, int last, int width, const float* decay,
                float* out);
};

template <int... I>
const BlockFunctions& Blocks(int rows, std::integer_sequence<int, I...>) {
  static const BlockFunctions table[] = {{ScoreStrip<I + 1>, ValueStrip<I + 1>}...};
  return table[rows - 1];
}

// ---- edits of scores ---------------------------------------------------------------------------------------------

template <typename T>
void Add(const void* terms, float factor, int count, float* scores) {
  const T* from = static_cast<const T*>(terms);
  const Vec f = Vec::Broadcast(factor);
  int c = 0;
  for (; c + kLanes <= count; c += kLanes) Fma(Vec::Load(from + c), f, Vec::Load(scores + c)).Store(scores + c);
  if (c == count) return;
  float rest[kLanes];
  Fma(LoadPartial(from + c, count - c), f, LoadPartial(scores + c, count - c)).Store(rest);
  std::memcpy(scores + c, rest, static_cast<size_t>(count - c) * sizeof(float));
}

// kLanes bits from bit `first` on.
inline uint32_t LoadBits(const uint8_t* bits, int64_t first) {
  constexpr int kBytes = (kLanes + 7) / 8;
  const auto shift = static_cast<int>(first & 7);
  bits += first >> 3;
  uint32_t window = 0;
  for (int byte = 0; byte < kBytes; ++byte) window |= static_cast<uint32_t>(bits[byte]) << (8 * byte);
  if (shift + kLanes > 8 * kBytes) window |= static_cast<uint32_t>(bits[kBytes]) << (8 * kBytes);
  return window >> shift;
}

void ForbidUnset(const uint8_t* bits, int64_t first, int count, float* scores) {
  const Vec forbidden = Vec::Broadcast(-INFINITY);
  int c = 0;
  for (; c + kLanes <= count; c += kLanes) {
    SelectBits(LoadBits(bits, first + c), Vec::Load(scores + c), forbidden).Store(scores + c);
  }
  for (; c < count; ++c) {
    if ((bits[(first + c) / 8] >> ((first + c) % 8) & 1) == 0) scores[c] = -INFINITY;
  }
}

// ---- the online-softmax step ---------------------------------------------------------------------------------------

// Turns one row's scores in [first, last), multiples of kLanes, into p = exp2(score - top), times the weights where
// given; updates the row's top and total and returns the factor by which its earlier sums shrink.
inline float SoftmaxRow(float* scores, const float* weights, int first, int last, float* top, float* total) {
  Vec largest = Vec::Broadcast(kNoTop);
  for (int c = first; c < last; c += kLanes) largest = Max(largest, Vec::Load(scores + c));
  float new_top = ReduceMax(largest);
  // Overflowed scores are +inf; kept finite, the top still makes their p 1 below.
  if (new_top > -kNoTop) new_top = -kNoTop;
  if (!(new_top > *top)) new_top = *top;
  const Vec base = Vec::Broadcast(new_top);
  Vec sum = Vec::Zero();
  for (int c = first; c < last; c += kLanes) {
    Vec p = Exp2(Min(Vec::Zero(), Vec::Load(scores + c) - base));
    if (weights != nullptr) p = p * Vec::Load(weights + c);
    p.Store(scores + c);
    sum = sum + p;
  }
  const float decay = std::exp2(*top - new_top);
  *total = *total * decay + ReduceAdd(sum);
  *top = new_top;
  return decay;
}

inline void Fill(float* from, const float* to, float value) {
  for (; from < to; ++from) *from = value;
}

void Attend(const QueryTile& queries, const KeyTile& keys, const ColumnRange* ranges, const ScoreEdit& edit) {
  alignas(64) float strip[kBlockRows * kStripPitch];
  alignas(64) float weights[kMaxTileColumns];
  float decay[kBlockRows];
  const Vec cap = Vec::Broadcast(queries.softcap * kLog2E);
  for (int row = 0; row < queries.rows; row += kBlockRows) {
    const int rows = queries.rows - row < kBlockRows ? queries.rows - row : kBlockRows;
    // What the block computes is the union of its rows' ranges: columns outside any row's range cost nothing.
    int first = keys.columns, last = 0;
    for (int r = row; r < row + rows; ++r) {
      if (ranges[r].first >= ranges[r].last) continue;
      if (ranges[r].first < first) first = ranges[r].first;
      if (ranges[r].last > last) last = ranges[r].last;
    }
    if (first >= last) continue;
    const int aligned_first = first / kLanes * kLanes;
    const int aligned_last = (last + kLanes - 1) / kLanes * kLanes;
    const BlockFunctions& blocks = Blocks(rows, std::make_integer_sequence<int, kBlockRows>());
    const float* q = queries.queries + static_cast<ptrdiff_t>(row / kLanes) * kLanes * queries.depth + row % kLanes;
    blocks.score(q, keys.keys, queries.depth, aligned_first, aligned_last, strip);

    for (int r = 0; r < rows; ++r) {
      float* scores = strip + r * kStripPitch;
      ColumnRange range = ranges[row + r];
      if (range.first >= range.last) range = {aligned_last, aligned_last};
      if (queries.softcap > 0) {
        for (int c = aligned_first; c < aligned_last; c += kLanes) {
          ScaledTanh(Vec::Load(scores + c), cap).Store(scores + c);
        }
      }
      if (edit.weighted) Fill(weights + aligned_first, weights + aligned_last, 1.0f);
      if (edit.apply != nullptr && range.first < range.last) {
        edit.apply(edit.context, row + r, range, scores, weights);
      }
      Fill(scores + aligned_first, scores + range.first, -INFINITY);
      Fill(scores + range.last, scores + aligned_last, -INFINITY);
      decay[r] = SoftmaxRow(scores, edit.weighted ? weights : nullptr, aligned_first, aligned_last,
                            &queries.top[row + r], &queries.total[row + r]);
    }
    blocks.value(strip, keys.values, first, last, queries.width, decay,
                 queries.out + static_cast<ptrdiff_t>(row) * queries.width);
  }
}

constexpr TileKernels MakeKernels(const char* name) {
  return {name,
          kLanes,
          {PackTransposed<float>, PackTransposed<Half>, PackTransposed<BFloat16>},
          {PackRows<float>, PackRows<Half>, PackRows<BFloat16>},
          Attend,
          {Add<float>, Add<Half>, Add<BFloat16>},
          ForbidUnset,
          {StoreRow<float>, StoreRow<Half>, StoreRow<BFloat16>}};
}

}  // namespace
}  // namespace longspan::cpu

#endif  // LONGSPAN_CPU_TILE_KERNELS_IMPL_H_
