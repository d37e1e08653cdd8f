// What the tests of the operators' kernels share: tensors, random operands, the softmax of a row in double, and a run
// over every instruction set.
#ifndef LONGSPAN_TESTS_TESTING_H_
#define LONGSPAN_TESTS_TESTING_H_

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "attention/operands.h"
#include "cpu/elements.h"
#include "cpu/executor.h"
#include "cpu/isa.h"
#include "cpu/tile_kernels.h"

namespace longspan::testing {

// Checks that failed.
inline int failures = 0;

inline void Expect(bool condition, const std::string& what) {
  if (condition) return;
  std::printf("FAILED: %s\n", what.c_str());
  ++failures;
}

// Whether `body` throws InvalidOperands with `message` in it.
inline void Refused(const std::string& message, const std::function<void()>& body) {
  try {
    body();
  } catch (const InvalidOperands& error) {
    Expect(std::string(error.what()).find(message) != std::string::npos, error.what());
    return;
  }
  Expect(false, "not refused: " + message);
}

class ThreadExecutor final : public cpu::Executor {
 public:
  void ParallelFor(void (*fn)(void*, size_t), size_t count, void* context) override {
    std::vector<std::thread> threads;
    for (size_t i = 0; i < count; ++i) threads.emplace_back(fn, context, i);
    for (std::thread& thread : threads) thread.join();
  }
  void* Allocate(size_t bytes) override { return fail ? nullptr : std::malloc(bytes); }
  void Free(void* memory) override { std::free(memory); }

  bool fail = false;
};

// A tensor of T as stored, and the same values as doubles.
struct Tensor {
  std::vector<char> bytes;
  std::vector<double> values;
};

inline Tensor Store(const std::vector<float>& values, cpu::ElementType type) {
  Tensor tensor;
  for (float value : values) {
    const auto append = [&](const auto& element, float back) {
      const char* data = reinterpret_cast<const char*>(&element);
      tensor.bytes.insert(tensor.bytes.end(), data, data + sizeof element);
      tensor.values.push_back(static_cast<double>(back));
    };
    cpu::Half half;
    cpu::BFloat16 brain;
    switch (type) {
      case cpu::ElementType::kFloat32:
        append(value, value);
        break;
      case cpu::ElementType::kFloat16:
        cpu::FromFloat(value, &half);
        append(half, cpu::ToFloat(half));
        break;
      case cpu::ElementType::kBFloat16:
        cpu::FromFloat(value, &brain);
        append(brain, cpu::ToFloat(brain));
        break;
    }
  }
  return tensor;
}

inline double LoadOutput(const std::vector<char>& bytes, size_t index, cpu::ElementType type) {
  if (type == cpu::ElementType::kFloat32) {
    float value;
    std::memcpy(&value, bytes.data() + index * 4, 4);
    return static_cast<double>(value);
  }
  uint16_t bits;
  std::memcpy(&bits, bytes.data() + index * 2, 2);
  return static_cast<double>(type == cpu::ElementType::kFloat16 ? cpu::ToFloat(cpu::Half{bits})
                                                                : cpu::ToFloat(cpu::BFloat16{bits}));
}

inline bool Close(double got, double want, double relative, double absolute) {
  if (std::isinf(want)) return got == want;
  return std::abs(got - want) <= absolute + relative * std::abs(want);
}

// A random problem with its operands; the operator's own test fills in what is the operator's own. Buffers are exactly
// as long as the tensors, so that a sanitizer sees a read or write beyond one.
template <typename Problem>
class RandomProblem {
 public:
  explicit RandomProblem(unsigned seed) : engine_(seed) {}

  // Element `c` of a tensor laid out like Q, K or V.
  double At(int input, int64_t heads, int64_t length, int64_t width, int64_t b, int64_t head, int64_t row,
            int64_t c) const {
    const int64_t index = problem.shapes.split_heads ? ((b * heads + head) * length + row) * width + c
                                                     : ((b * length + row) * heads + head) * width + c;
    return tensors[input].values[static_cast<size_t>(index)];
  }

  // q . k for tensors laid out like Q and K, scaled and capped.
  double Score(int q, int k, int64_t b, int64_t h, int64_t i, int64_t key) const {
    const Shapes& s = problem.shapes;
    const CommonAttributes& a = problem.attributes;
    double score = 0;
    for (int64_t d = 0; d < s.head_size; ++d) {
      score += At(q, s.q_num_heads, s.seq_q, s.head_size, b, h, i, d) *
               At(k, s.kv_num_heads, s.seq_k, s.head_size, b, h / s.Group(), key, d);
    }
    score *= a.scale ? static_cast<double>(*a.scale) : 1 / std::sqrt(static_cast<double>(s.head_size));
    const auto cap = static_cast<double>(a.softcap);
    return cap > 0 ? cap * std::tanh(score / cap) : score;
  }

  int64_t Length(int64_t b) const { return lengths.empty() ? problem.shapes.seq_k : lengths[static_cast<size_t>(b)]; }
  int64_t Position(int64_t b, int64_t i) const { return i + (lengths.empty() ? 0 : Length(b) - problem.shapes.seq_q); }
  bool Valid(int64_t b, int64_t key) const {
    return key < Length(b) && (!valid || valid[static_cast<size_t>(b * problem.shapes.seq_k + key)]);
  }

  Problem problem;
  Tensor tensors[std::extent<decltype(Problem::inputs)>::value];
  std::unique_ptr<bool[]> valid;
  std::vector<int64_t> lengths;
  std::vector<float> lse;
  std::vector<char> output;

 protected:
  int64_t Int(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, std::max(low, high))(engine_);
  }
  bool Chance(double p) { return std::bernoulli_distribution(p)(engine_); }
  template <typename T>
  T Pick(std::initializer_list<T> choices) {
    return choices.begin()[Int(0, static_cast<int64_t>(choices.size()) - 1)];
  }

  // Sizes, type, layout, softcap and scale; then Q, K and V.
  void GiveCommonInputs() {
    Shapes& s = problem.shapes;
    CommonAttributes& a = problem.attributes;
    problem.type = Pick({cpu::ElementType::kFloat32, cpu::ElementType::kFloat16, cpu::ElementType::kBFloat16});
    s.split_heads = Chance(0.5);
    s.batch = Int(1, 2);
    s.kv_num_heads = Int(1, 3);
    s.q_num_heads = s.kv_num_heads * Pick<int64_t>({1, 1, 2, 5});
    s.seq_k = Pick<int64_t>({0, 1, Int(2, 40), Int(41, 320)});
    s.seq_q = Pick<int64_t>({s.seq_k, s.seq_k, 0, 1, Int(1, 200)});
    s.head_size = Pick<int64_t>({1, 8, 15, 16, 17, 33, 64});
    s.v_head_size = Pick<int64_t>({1, 7, 16, 31, 48, 64});
    a.is_causal = Chance(0.4);
    if (Chance(0.3)) a.softcap = Pick<float>({0.3f, 5.0f, 50.0f});
    if (Chance(0.3)) a.scale = Pick<float>({-0.2f, 0.01f, 1.0f});
    const int64_t q = s.batch * s.q_num_heads * s.seq_q, k = s.batch * s.kv_num_heads * s.seq_k;
    Give(kQ, q * s.head_size);
    Give(kK, k * s.head_size);
    Give(kV, k * s.v_head_size);
    output.resize(static_cast<size_t>(q * s.v_head_size) * cpu::ElementSize(problem.type), '\x7f');
    lse.resize(static_cast<size_t>(q), 7.0f);
    problem.output = output.data();
    problem.lse = Chance(0.7) ? lse.data() : nullptr;
  }

  // attn_mask and nonpad_kv_seqlen, sometimes.
  void GivePadding(int attn_mask, int nonpad_kv_seqlen) {
    const Shapes& s = problem.shapes;
    const auto size = static_cast<size_t>(s.batch * s.seq_k);
    if (Chance(0.4)) problem.inputs[attn_mask] = Flags(&valid, size, Pick<double>({0.0, 0.5, 0.98}));
    if (Chance(0.4)) {
      for (int64_t b = 0; b < s.batch; ++b) lengths.push_back(Int(0, s.seq_k));
      problem.inputs[nonpad_kv_seqlen] = lengths.data();
    }
  }

  // `count` normal numbers as an input of type T.
  void Give(int input, int64_t count) {
    std::vector<float> values(static_cast<size_t>(count));
    std::normal_distribution<float> normal;
    for (float& value : values) value = normal(engine_);
    tensors[input] = Store(values, problem.type);
    problem.inputs[input] = Address(tensors[input].bytes);
  }

  // An empty vector has no address, but the input is present.
  template <typename T>
  static const void* Address(const std::vector<T>& values) {
    static const char nothing = 0;
    return values.empty() ? static_cast<const void*>(&nothing) : values.data();
  }

  const bool* Flags(std::unique_ptr<bool[]>* flags, size_t count, double p) {
    flags->reset(new bool[count]);
    for (size_t i = 0; i < count; ++i) (*flags)[i] = Chance(p);
    return flags->get();
  }

 private:
  std::mt19937 engine_;
};

// One term of a row's softmax.
struct Term {
  double score;
  double weight;
  int64_t key;
};

// The softmax of `terms`, and of a sink unless that is -inf, in double: fills `y` with the mean of value(key, column)
// and returns the log-sum-exp.
template <typename Value>
double Softmax(const std::vector<Term>& terms, double sink, const Value& value, std::vector<double>* y) {
  std::fill(y->begin(), y->end(), 0.0);
  double top = sink;
  for (const Term& term : terms) top = std::max(top, term.score);
  if (std::isinf(top)) return top;
  double total = std::exp(sink - top);
  for (const Term& term : terms) total += term.weight * std::exp(term.score - top);
  for (const Term& term : terms) {
    const double p = term.weight * std::exp(term.score - top) / total;
    for (size_t c = 0; c < y->size(); ++c) (*y)[c] += p * value(term.key, static_cast<int64_t>(c));
  }
  return top + std::log(total);
}

// Whether output and lse of a problem that has been computed agree with naive(b, h, i, &y), which returns a row's
// log-sum-exp; prints the first row that does not.
template <typename Random, typename Naive>
bool RowsAgree(const Random& r, const std::string& name, const Naive& naive) {
  const Shapes& s = r.problem.shapes;
  const double unit = r.problem.type == cpu::ElementType::kFloat32   ? 1.2e-7
                      : r.problem.type == cpu::ElementType::kFloat16 ? 1.0 / 1024
                                                                     : 1.0 / 128;
  std::vector<double> y(static_cast<size_t>(s.v_head_size));
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t h = 0; h < s.q_num_heads; ++h) {
      for (int64_t i = 0; i < s.seq_q; ++i) {
        const double lse = naive(b, h, i, &y);
        const auto row = static_cast<size_t>((b * s.q_num_heads + h) * s.seq_q + i);
        bool good = r.problem.lse == nullptr || Close(static_cast<double>(r.lse[row]), lse, 1e-6, 2e-5);
        for (int64_t c = 0; c < s.v_head_size; ++c) {
          const int64_t index = s.split_heads ? ((b * s.q_num_heads + h) * s.seq_q + i) * s.v_head_size + c
                                              : ((b * s.seq_q + i) * s.q_num_heads + h) * s.v_head_size + c;
          const double got = LoadOutput(r.output, static_cast<size_t>(index), r.problem.type);
          good = good && Close(got, y[static_cast<size_t>(c)], unit, 5e-5);
        }
        if (!good) {
          std::printf("FAILED: %s, batch %lld, head %lld, row %lld\n", name.c_str(), static_cast<long long>(b),
                      static_cast<long long>(h), static_cast<long long>(i));
          return false;
        }
      }
    }
  }
  return true;
}

// Calls `check` for the kernels of every instruction set that the machine has; false when one fails or none is there.
inline bool OnEveryInstructionSet(const std::function<bool(const cpu::TileKernels&)>& check) {
  bool any = false;
  for (const char* name : {"scalar", "avx2", "avx512"}) {
    setenv("LONGSPAN_CPU_ISA", name, 1);
    const cpu::TileKernels* kernels = nullptr;
    try {
      kernels = &cpu::SelectKernels();
    } catch (const std::invalid_argument& error) {
      std::printf("skipped: %s\n", error.what());
      continue;
    }
    if (!check(*kernels)) return false;
    any = true;
  }
  return any;
}

// `main` of a test of random problems, with the arguments [problems [seed]].
inline int CheckRandomProblems(int argc, char** argv, bool (*check)(unsigned seed, const cpu::TileKernels& kernels)) {
  const unsigned problems = argc > 1 ? static_cast<unsigned>(std::atoi(argv[1])) : 300;
  const unsigned first = argc > 2 ? static_cast<unsigned>(std::atoi(argv[2])) : 0;
  const bool agree = OnEveryInstructionSet([&](const cpu::TileKernels& kernels) {
    for (unsigned seed = first; seed < first + problems; ++seed) {
      if (!check(seed, kernels)) return false;
    }
    std::printf("%s: %u random problems agree\n", kernels.name, problems);
    return true;
  });
  return agree ? 0 : 1;
}

}  // namespace longspan::testing

#endif  // LONGSPAN_TESTS_TESTING_H_
