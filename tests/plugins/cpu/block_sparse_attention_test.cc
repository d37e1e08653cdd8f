// The kernel without ONNX Runtime: random problems against a naive implementation, on every instruction set that the
// machine has. Meant to run under the address and undefined-behaviour sanitizers as well.
//
// Usage: block_sparse_attention_test [problems [seed]]
#include "block_sparse_attention/attention.h"

#include <cstdint>
#include <cstdio>
#include <limits>
#include <new>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "testing.h"

namespace longspan::block_sparse {
namespace {

// A random problem with its operands. Entries of lists that no count reaches hold nonsense.
class Random : public testing::RandomProblem<Problem> {
 public:
  explicit Random(unsigned seed) : RandomProblem(seed) {
    Shapes& s = problem.shapes;
    Attributes& a = problem.attributes;
    GiveCommonInputs();
    a.q_block_size = Pick<int64_t>({1, Int(2, 9), 16, 64, Int(1, 150), 1000});
    a.kv_block_size = Pick<int64_t>({1, Int(2, 9), 16, 64, Int(1, 150), 300});
    a.exclude_self = Chance(0.3);
    GivePadding(kAttnMask, kNonpadKvSeqlen);
    const int64_t masks = Pick<int64_t>({0, 1, 3});
    GiveList(kKvNumBlocks, kKvIndices);
    GiveList(kFullKvNumBlocks, kFullKvIndices);
    if (Chance(0.6)) GiveMasks(masks);
    if (Chance(0.4)) Give(kSinks, s.q_num_heads);
    if (Chance(0.3)) {
      GivePositions(kQPositions, s.q_num_heads, s.seq_q);
      GivePositions(kKPositions, s.kv_num_heads, s.seq_k);
    }
    if (Chance(0.4)) {
      const Shape shape = {Pick<int64_t>({1, s.q_num_heads}), std::max<int64_t>(0, s.seq_q + s.seq_k - 1)};
      problem.input_shapes[kDistanceBias] = shape;
      Give(kDistanceBias, shape[0] * shape[1]);
    }
  }

  // Value of an integer input at [b, h, rest], of which b and h may be shared.
  int32_t Integer(int input, int64_t b, int64_t h, int64_t rest) const {
    const Shape& shape = *problem.input_shapes[input];
    int64_t size = 1;
    for (size_t i = 2; i < shape.size(); ++i) size *= shape[i];
    const int64_t first = ((shape[0] > 1 ? b : 0) * shape[1] + (shape[1] > 1 ? h : 0)) * size;
    return integers[input][static_cast<size_t>(first + rest)];
  }

  bool Has(int input) const { return problem.input_shapes[input].has_value(); }

  std::vector<int32_t> integers[kInputCount];
  std::vector<uint8_t> bits;

 private:
  void GiveIntegers(int input, const Shape& shape) {
    problem.input_shapes[input] = shape;
    int64_t count = 1;
    for (int64_t size : shape) count *= size;
    integers[input].resize(static_cast<size_t>(count));
    problem.inputs[input] = Address(integers[input]);
  }

  void GiveList(Input counts, Input indices) {
    const Shapes& s = problem.shapes;
    const int64_t rows = problem.attributes.QBlocks(s.seq_q), blocks = problem.attributes.KvBlocks(s.seq_k);
    const int64_t width = blocks == 0 ? Int(0, 2) : Pick<int64_t>({0, 1, Int(1, 9), 2 * blocks});
    const int64_t b = Pick<int64_t>({1, s.batch}), h = Pick<int64_t>({1, s.q_num_heads});
    GiveIntegers(counts, {b, h, rows});
    GiveIntegers(indices, {b, h, rows, width});
    const bool alike = Chance(0.3), few = Chance(0.3);  // rows that list the same, and blocks listed many times
    for (size_t row = 0; row < integers[counts].size(); ++row) {
      const int64_t count = blocks == 0 ? 0 : (Chance(0.2) ? width : Int(0, width));
      integers[counts][row] = static_cast<int32_t>(alike && row > 0 ? integers[counts][row - 1] : count);
      for (int64_t slot = 0; slot < width; ++slot) {
        const size_t index = row * static_cast<size_t>(width) + static_cast<size_t>(slot);
        int64_t value = Int(0, few ? std::min<int64_t>(1, blocks - 1) : blocks - 1);
        if (alike && row > 0) value = integers[indices][index - static_cast<size_t>(width)];
        if (slot >= integers[counts][row]) value = Pick<int64_t>({-1, blocks, kSizeLimit});
        integers[indices][index] = static_cast<int32_t>(value);
      }
    }
  }

  void GiveMasks(int64_t masks) {
    const Attributes& a = problem.attributes;
    const Shape shape = {masks, a.q_block_size, (a.kv_block_size + 7) / 8};
    problem.input_shapes[kBlockMasks] = shape;
    for (int64_t mask = 0; mask < masks; ++mask) {
      const bool contiguous = Chance(0.5);
      for (int64_t r = 0; r < shape[1]; ++r) {
        const int64_t first = Int(0, a.kv_block_size), last = Int(0, a.kv_block_size);
        bits.resize(bits.size() + static_cast<size_t>(shape[2]));
        uint8_t* row = bits.data() + bits.size() - shape[2];
        for (int64_t c = 0; c < 8 * shape[2]; ++c) {  // bits beyond the block too
          if (contiguous ? c >= first && c < last : Chance(0.7)) row[c / 8] |= static_cast<uint8_t>(1 << (c % 8));
        }
      }
    }
    problem.inputs[kBlockMasks] = Address(bits);
    GiveIntegers(kBlockMaskIds, *problem.input_shapes[kKvIndices]);
    const Shape& ids = *problem.input_shapes[kBlockMaskIds];
    for (size_t i = 0; i < integers[kBlockMaskIds].size(); ++i) {
      const int64_t slot = static_cast<int64_t>(i) % ids[3];
      const auto row = static_cast<size_t>(static_cast<int64_t>(i) / ids[3]);
      const bool read = slot < integers[kKvNumBlocks][row];
      integers[kBlockMaskIds][i] = static_cast<int32_t>(read ? Int(-1, masks - 1) : Pick<int64_t>({-9, masks}));
    }
  }

  void GivePositions(Input input, int64_t heads, int64_t length) {
    const Shapes& s = problem.shapes;
    GiveIntegers(input, {Pick<int64_t>({1, s.batch}), Pick<int64_t>({1, heads}), length});
    for (int32_t& position : integers[input]) position = static_cast<int32_t>(Int(-3, std::max(s.seq_q, s.seq_k) / 2));
  }
};

// How many listings of one list hold the key and allow it to the query.
int Listings(const Random& r, Input counts, Input indices, bool partial, int64_t b, int64_t h, int64_t i, int64_t k) {
  const Attributes& a = r.problem.attributes;
  const int64_t row = i / a.q_block_size, width = (*r.problem.input_shapes[indices])[3];
  int found = 0;
  for (int64_t slot = 0; slot < r.Integer(counts, b, h, row); ++slot) {
    if (r.Integer(indices, b, h, row * width + slot) != k / a.kv_block_size) continue;
    const int32_t mask = partial && r.Has(kBlockMaskIds) ? r.Integer(kBlockMaskIds, b, h, row * width + slot) : -1;
    if (mask >= 0) {
      const Shape& shape = *r.problem.input_shapes[kBlockMasks];
      const int64_t c = k % a.kv_block_size;
      const int64_t byte = (mask * shape[1] + i % a.q_block_size) * shape[2] + c / 8;
      if ((r.bits[static_cast<size_t>(byte)] >> (c % 8) & 1) == 0) continue;
    }
    ++found;
  }
  return found;
}

// One row by the definition, key by key, in double. Returns the log-sum-exp.
double NaiveRow(const Random& r, int64_t b, int64_t h, int64_t i, std::vector<double>* y) {
  const Shapes& s = r.problem.shapes;
  const Attributes& a = r.problem.attributes;
  std::vector<testing::Term> terms;
  for (int64_t k = 0; k < s.seq_k; ++k) {
    if (!r.Valid(b, k)) continue;
    const bool given = r.Has(kQPositions);
    const int64_t q_position = given ? r.Integer(kQPositions, b, h, i) : r.Position(b, i);
    const int64_t k_position = given ? r.Integer(kKPositions, b, h / s.Group(), k) : k;
    if ((a.is_causal && k_position > q_position) || (a.exclude_self && k_position == q_position)) continue;
    const int listed = Listings(r, kKvNumBlocks, kKvIndices, true, b, h, i, k) +
                       Listings(r, kFullKvNumBlocks, kFullKvIndices, false, b, h, i, k);
    if (listed == 0) continue;
    double score = r.Score(kQ, kK, b, h, i, k);
    if (r.Has(kDistanceBias)) {
      const Shape& shape = *r.problem.input_shapes[kDistanceBias];
      const int64_t index = (shape[0] > 1 ? h : 0) * shape[1] + k - i + s.seq_q - 1;
      score += r.tensors[kDistanceBias].values[static_cast<size_t>(index)];
    }
    terms.push_back({score, static_cast<double>(listed), k});
  }
  const double sink = r.problem.inputs[kSinks] == nullptr ? -std::numeric_limits<double>::infinity()
                                                          : r.tensors[kSinks].values[static_cast<size_t>(h)];
  const auto value = [&](int64_t key, int64_t c) {
    return r.At(kV, s.kv_num_heads, s.seq_k, s.v_head_size, b, h / s.Group(), key, c);
  };
  return testing::Softmax(terms, sink, value, y);
}

bool Check(unsigned seed, const cpu::TileKernels& kernels) {
  Random r(seed);
  testing::ThreadExecutor executor;
  Compute(r.problem, kernels, executor);
  return testing::RowsAgree(
      r, std::string(kernels.name) + ", seed " + std::to_string(seed),
      [&](int64_t b, int64_t h, int64_t i, std::vector<double>* y) { return NaiveRow(r, b, h, i, y); });
}

bool CheckFailures() {
  unsigned seed = 0;
  while (Random(seed).problem.shapes.seq_q == 0) ++seed;
  Random r(seed);
  testing::ThreadExecutor executor;
  executor.fail = true;
  try {
    Compute(r.problem, cpu::SelectKernels(), executor);
  } catch (const std::bad_alloc&) {
    return true;
  }
  std::printf("FAILED: no error without memory\n");
  return false;
}

}  // namespace
}  // namespace longspan::block_sparse

int main(int argc, char** argv) {
  using namespace longspan;
  return block_sparse::CheckFailures() ? testing::CheckRandomProblems(argc, argv, block_sparse::Check) : 1;
}
