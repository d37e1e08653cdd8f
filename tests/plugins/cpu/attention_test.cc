// The kernels without ONNX Runtime: random problems against a naive implementation, on every instruction set that the
// machine has. Meant to run under the address and undefined-behaviour sanitizers as well: buffers are exactly as long
// as the tensors, so that a read or write beyond one is seen.
//
// Usage: attention_test [problems [seed]]
#include "sliding_window_attention/attention.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/elements.h"
#include "cpu/isa.h"

namespace longspan {
namespace {

using cpu::ElementType;

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

Tensor Store(const std::vector<float>& values, ElementType type) {
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
      case ElementType::kFloat32:
        append(value, value);
        break;
      case ElementType::kFloat16:
        cpu::FromFloat(value, &half);
        append(half, cpu::ToFloat(half));
        break;
      case ElementType::kBFloat16:
        cpu::FromFloat(value, &brain);
        append(brain, cpu::ToFloat(brain));
        break;
    }
  }
  return tensor;
}

double LoadOutput(const std::vector<char>& bytes, size_t index, ElementType type) {
  if (type == ElementType::kFloat32) {
    float value;
    std::memcpy(&value, bytes.data() + index * 4, 4);
    return static_cast<double>(value);
  }
  uint16_t bits;
  std::memcpy(&bits, bytes.data() + index * 2, 2);
  return static_cast<double>(type == ElementType::kFloat16 ? cpu::ToFloat(cpu::Half{bits})
                                                           : cpu::ToFloat(cpu::BFloat16{bits}));
}

// A random problem with its operands.
class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {
    Shapes& s = problem.shapes;
    Attributes& a = problem.attributes;
    problem.type = Pick<ElementType>({ElementType::kFloat32, ElementType::kFloat16, ElementType::kBFloat16});
    s.split_heads = Chance(0.5);
    s.batch = Int(1, 2);
    s.kv_num_heads = Int(1, 3);
    s.q_num_heads = s.kv_num_heads * Pick<int64_t>({1, 1, 2, 5});
    s.seq_k = Pick<int64_t>({0, 1, Int(2, 40), Int(41, 320)});
    s.seq_q = Pick<int64_t>({s.seq_k, s.seq_k, 0, 1, Int(1, 200)});
    s.head_size = Pick<int64_t>({1, 8, 15, 16, 17, 33, 64});
    s.v_head_size = Pick<int64_t>({1, 7, 16, 31, 48, 64});
    a.left_window_size = Pick<int64_t>({-1, 0, Int(1, 30), Int(1, 400), int64_t{1} << 60});
    a.right_window_size = Pick<int64_t>({-1, 0, Int(1, 30), Int(1, 400)});
    a.is_causal = Chance(0.4);
    if (Chance(0.4)) a.dilation = {Pick<int64_t>({2, 3, 7, int64_t{1} << 40})};
    if (Chance(0.3)) {
      a.dilation.clear();
      for (int64_t h = 0; h < s.q_num_heads; ++h) a.dilation.push_back(Int(1, 4));
    }
    if (Chance(0.3)) a.softcap = Pick<float>({0.3f, 5.0f, 50.0f});
    if (Chance(0.3)) a.scale = Pick<float>({-0.2f, 0.01f, 1.0f});
    a.span_ramp = Pick<float>({1.0f, 32.0f});

    const int64_t q = s.batch * s.q_num_heads * s.seq_q, k = s.batch * s.kv_num_heads * s.seq_k;
    Give(kQ, q * s.head_size);
    Give(kK, k * s.head_size);
    Give(kV, k * s.v_head_size);
    const auto size = static_cast<size_t>(s.batch * s.seq_k);
    if (Chance(0.4)) problem.inputs[kAttnMask] = Flags(&valid, size, Pick<double>({0.0, 0.5, 0.98}));
    if (Chance(0.4)) {
      for (int64_t b = 0; b < s.batch; ++b) lengths.push_back(Int(0, s.seq_k));
      problem.inputs[kNonpadKvSeqlen] = lengths.data();
    }
    if (Chance(0.4)) {
      problem.inputs[kGlobalMask] = Flags(&global, size, Pick<double>({0.0, 0.03, 0.6, 1.0}));
      if (Chance(0.5)) {
        Give(kGlobalQ, q * s.head_size);
        Give(kGlobalK, k * s.head_size);
        Give(kGlobalV, k * s.v_head_size);
      }
    }
    const bool narrow = a.left_window_size >= 0 && a.left_window_size < 1000 && a.right_window_size >= 0;
    if (narrow && Chance(0.5)) {
      const int64_t width = a.left_window_size + a.right_window_size + 1;
      problem.band_bias_shape = {Pick<int64_t>({1, s.batch}), Pick<int64_t>({1, s.q_num_heads}),
                                 Pick<int64_t>({1, s.seq_q}), width};
      int64_t count = 1;
      for (int64_t dim : problem.band_bias_shape) count *= dim;
      Give(kBandBias, count);
    }
    if (Chance(0.4)) Give(kSinks, s.q_num_heads);
    if (Chance(0.3)) {
      for (int64_t h = 0; h < s.q_num_heads; ++h) spans.push_back(static_cast<float>(Int(-40, 200)) + 0.25f);
      problem.inputs[kSpans] = spans.data();
    }
    output.resize(static_cast<size_t>(q * s.v_head_size) * cpu::ElementSize(problem.type), '\x7f');
    lse.resize(static_cast<size_t>(q), 7.0f);
    problem.output = output.data();
    problem.lse = Chance(0.7) ? lse.data() : nullptr;
  }

  Problem problem;
  Tensor tensors[kInputCount];
  std::unique_ptr<bool[]> valid, global;
  std::vector<int64_t> lengths;
  std::vector<float> spans, lse;
  std::vector<char> output;

 private:
  int64_t Int(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, std::max(low, high))(engine_);
  }
  bool Chance(double p) { return std::bernoulli_distribution(p)(engine_); }
  template <typename T>
  T Pick(std::initializer_list<T> choices) {
    return choices.begin()[Int(0, static_cast<int64_t>(choices.size()) - 1)];
  }
  void Give(Input input, int64_t count) {
    std::vector<float> values(static_cast<size_t>(count));
    std::normal_distribution<float> normal;
    for (float& value : values) value = normal(engine_);
    tensors[input] = Store(values, problem.type);
    problem.inputs[input] = tensors[input].bytes.data();
    static const char nothing = 0;  // an empty vector has no address, but the input is present
    if (count == 0) problem.inputs[input] = &nothing;
  }
  const bool* Flags(std::unique_ptr<bool[]>* flags, size_t count, double p) {
    flags->reset(new bool[count]);
    for (size_t i = 0; i < count; ++i) (*flags)[i] = Chance(p);
    return flags->get();
  }

  std::mt19937 engine_;
};

// One row by the definition, key by key, in double. Returns the log-sum-exp.
double NaiveRow(const Random& r, int64_t b, int64_t h, int64_t i, std::vector<double>* y) {
  const Shapes& s = r.problem.shapes;
  const Attributes& a = r.problem.attributes;
  const auto at = [&](Input input, int64_t heads, int64_t length, int64_t width, int64_t head, int64_t row, int64_t c) {
    const int64_t index = s.split_heads ? ((b * heads + head) * length + row) * width + c
                                        : ((b * length + row) * heads + head) * width + c;
    return r.tensors[input].values[static_cast<size_t>(index)];
  };
  const int64_t length = r.lengths.empty() ? s.seq_k : r.lengths[static_cast<size_t>(b)];
  const int64_t position = i + (r.lengths.empty() ? 0 : length - s.seq_q);
  const int64_t step = a.dilation.size() > 1 ? a.dilation[static_cast<size_t>(h)] : a.dilation[0];
  const auto flag = [&](const std::unique_ptr<bool[]>& flags, int64_t k, bool otherwise) {
    return flags ? flags[static_cast<size_t>(b * s.seq_k + k)] : otherwise;
  };
  const bool row_global = position >= 0 && position < s.seq_k && flag(r.global, position, false);
  const bool separate = row_global && r.problem.inputs[kGlobalQ] != nullptr;
  const int64_t group = h / (s.q_num_heads / s.kv_num_heads);
  const double scale = a.scale ? static_cast<double>(*a.scale) : 1 / std::sqrt(static_cast<double>(s.head_size));
  std::vector<double> logits, weights;
  std::vector<int64_t> keys;
  for (int64_t k = 0; k < length; ++k) {
    if (!flag(r.valid, k, true) || (a.is_causal && k > position)) continue;
    const int64_t difference = k - position, steps = difference / step;
    const bool in_band = difference % step == 0 && (a.left_window_size < 0 || steps >= -a.left_window_size) &&
                         (a.right_window_size < 0 || steps <= a.right_window_size);
    const bool key_global = flag(r.global, k, false);
    if (!row_global && !in_band && !key_global) continue;
    double score = 0;
    for (int64_t d = 0; d < s.head_size; ++d) {
      score += at(separate ? kGlobalQ : kQ, s.q_num_heads, s.seq_q, s.head_size, h, i, d) *
               at(separate ? kGlobalK : kK, s.kv_num_heads, s.seq_k, s.head_size, group, k, d);
    }
    score *= scale;
    if (a.softcap > 0) score = static_cast<double>(a.softcap) * std::tanh(score / static_cast<double>(a.softcap));
    double weight = 1;
    if (!row_global && in_band && !r.problem.band_bias_shape.empty()) {
      const Shape& shape = r.problem.band_bias_shape;
      const int64_t index =
          (((shape[0] > 1 ? b : 0) * shape[1] + (shape[1] > 1 ? h : 0)) * shape[2] + (shape[2] > 1 ? i : 0)) *
              shape[3] +
          steps + a.left_window_size;
      score += r.tensors[kBandBias].values[static_cast<size_t>(index)];
    }
    if (!row_global && !key_global && !r.spans.empty()) {
      const double ramp = static_cast<double>(a.span_ramp), span = static_cast<double>(r.spans[static_cast<size_t>(h)]);
      weight = std::clamp((ramp + span - static_cast<double>(std::abs(difference))) / ramp, 0.0, 1.0);
    }
    if (weight == 0) continue;
    logits.push_back(score);
    weights.push_back(weight);
    keys.push_back(k);
  }
  const bool has_sink = r.problem.inputs[kSinks] != nullptr;
  const double sink = has_sink ? r.tensors[kSinks].values[static_cast<size_t>(h)] : 0;
  y->assign(static_cast<size_t>(s.v_head_size), 0.0);
  if (logits.empty() && !has_sink) return -std::numeric_limits<double>::infinity();
  double top = has_sink ? sink : logits[0];
  for (double logit : logits) top = std::max(top, logit);
  double total = has_sink ? std::exp(sink - top) : 0;
  for (size_t n = 0; n < logits.size(); ++n) total += weights[n] * std::exp(logits[n] - top);
  for (size_t n = 0; n < logits.size(); ++n) {
    const double p = weights[n] * std::exp(logits[n] - top) / total;
    for (int64_t c = 0; c < s.v_head_size; ++c) {
      (*y)[static_cast<size_t>(c)] +=
          p * at(separate ? kGlobalV : kV, s.kv_num_heads, s.seq_k, s.v_head_size, group, keys[n], c);
    }
  }
  return top + std::log(total);
}

bool Close(double got, double want, double relative, double absolute) {
  if (std::isinf(want)) return got == want;
  return std::abs(got - want) <= absolute + relative * std::abs(want);
}

// Whether the kernel agrees with the naive rows; prints the first difference.
bool Check(unsigned seed, const cpu::TileKernels& kernels) {
  Random r(seed);
  const Shapes& s = r.problem.shapes;
  ThreadExecutor executor;
  SlidingWindowAttention(r.problem, kernels, executor);
  const double unit = r.problem.type == ElementType::kFloat32   ? 1.2e-7
                      : r.problem.type == ElementType::kFloat16 ? 1.0 / 1024
                                                                : 1.0 / 128;
  std::vector<double> y;
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t h = 0; h < s.q_num_heads; ++h) {
      for (int64_t i = 0; i < s.seq_q; ++i) {
        const double lse = NaiveRow(r, b, h, i, &y);
        const auto row = static_cast<size_t>((b * s.q_num_heads + h) * s.seq_q + i);
        bool good = r.problem.lse == nullptr || Close(static_cast<double>(r.lse[row]), lse, 1e-6, 2e-5);
        for (int64_t c = 0; c < s.v_head_size; ++c) {
          const int64_t index = s.split_heads ? ((b * s.q_num_heads + h) * s.seq_q + i) * s.v_head_size + c
                                              : ((b * s.seq_q + i) * s.q_num_heads + h) * s.v_head_size + c;
          const double got = LoadOutput(r.output, static_cast<size_t>(index), r.problem.type);
          good = good && Close(got, y[static_cast<size_t>(c)], unit, 5e-5);
        }
        if (!good) {
          std::printf("FAILED: %s, seed %u, batch %lld, head %lld, row %lld\n", kernels.name, seed,
                      static_cast<long long>(b), static_cast<long long>(h), static_cast<long long>(i));
          return false;
        }
      }
    }
  }
  return true;
}

// Conversions of every 16-bit pattern, and rounding of values between two of them.
bool CheckElements() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const cpu::Half half{static_cast<uint16_t>(bits)};
    const float value = cpu::ToFloat(half);
    const bool nan = (bits & 0x7fff) > 0x7c00;
    cpu::Half back;
    cpu::FromFloat(value, &back);
    if (nan ? !std::isnan(value) : back.bits != half.bits) {
      std::printf("FAILED: float16 %04x\n", bits);
      return false;
    }
    const uint32_t next = bits + 1;
    if (nan || (next & 0x7fff) > 0x7bff) continue;
    const float middle = value / 2 + cpu::ToFloat(cpu::Half{static_cast<uint16_t>(next)}) / 2;
    cpu::FromFloat(middle, &back);
    if (back.bits != (bits & 1 ? next : bits)) {
      std::printf("FAILED: float16 tie above %04x\n", bits);
      return false;
    }
  }
  return true;
}

// exp2, and the soft cap where `softcap` is positive, as they come out of `attend`: one query row, 256 keys with scores
// 0, x[1], …, and the unit matrix for V, so that `out` is the row's exp2(score). Scores rise to 0 at most.
bool CheckExp(const cpu::TileKernels& kernels, float softcap) {
  constexpr int kColumns = cpu::kMaxTileColumns;
  std::mt19937 engine(0);
  std::uniform_real_distribution<float> wide(softcap > 0 ? -3.0f : -125.0f, 0.0f), near(-2.0f, 0.0f);
  double worst = 0;
  for (int round = 0; round < 400; ++round) {
    std::vector<float> x(kColumns), keys(kColumns), unit(kColumns * kColumns), out(kColumns);
    std::vector<const void*> pointers(kColumns);
    for (int c = 0; c < kColumns; ++c) {
      x[static_cast<size_t>(c)] = c == 0 ? 0.0f : (round % 2 ? wide : near)(engine);
      unit[static_cast<size_t>(c * kColumns + c)] = 1;
      pointers[static_cast<size_t>(c)] = &x[static_cast<size_t>(c)];
    }
    kernels.pack_transposed[0](pointers.data(), kColumns, 1, 1.0f, keys.data());
    const float one = 1;
    std::vector<float> query(cpu::kMaxLanes);
    const void* row = &one;
    kernels.pack_transposed[0](&row, 1, 1, 1.0f, query.data());
    float top = cpu::kNoTop, total = 0;
    cpu::QueryTile tile;
    tile.rows = 1, tile.depth = 1, tile.width = kColumns;
    tile.queries = query.data(), tile.out = out.data(), tile.top = &top, tile.total = &total;
    tile.softcap = softcap;
    const cpu::ColumnRange all{0, kColumns};
    kernels.attend(tile, {kColumns, keys.data(), unit.data()}, &all, {});
    for (size_t c = 0; c < kColumns; ++c) {
      const auto score = static_cast<double>(x[c]);
      if (softcap > 0) {
        // An error in tanh times softcap is one in the exponent: compare that, in units of the cap.
        const double capped = std::log(static_cast<double>(out[c])) / static_cast<double>(softcap);
        worst = std::max(worst, std::abs(capped - std::tanh(score)) / 0x1p-24);
      } else {
        const double want = std::exp2(score);
        const double ulp = std::exp2(std::floor(score) - 23);
        worst = std::max(worst, std::abs(static_cast<double>(out[c]) - want) / ulp);
      }
    }
    if (out[0] != 1) worst = 1e9;
  }
  // Units in the last place; with a soft cap, of the tanh at 1, rounding in exp2 and of softcap * tanh included.
  const double allowed = softcap > 0 ? 6 : 2.5;
  std::printf("%s: error of %s %.2f ulp\n", kernels.name, softcap > 0 ? "the soft cap" : "exp2", worst);
  return worst <= allowed;
}

bool CheckFailures() {
  unsigned seed = 0;
  while (Random(seed).problem.shapes.seq_q == 0) ++seed;
  Random r(seed);
  ThreadExecutor executor;
  executor.fail = true;
  try {
    SlidingWindowAttention(r.problem, cpu::SelectKernels(), executor);
  } catch (const std::bad_alloc&) {
    return true;
  }
  std::printf("FAILED: no error without memory\n");
  return false;
}

int Main(int argc, char** argv) {
  const unsigned problems = argc > 1 ? static_cast<unsigned>(std::atoi(argv[1])) : 300;
  const unsigned first = argc > 2 ? static_cast<unsigned>(std::atoi(argv[2])) : 0;
  if (!CheckElements() || !CheckFailures()) return 1;
  int machines = 0;
  for (const char* name : {"scalar", "avx2", "avx512"}) {
    setenv("LONGSPAN_CPU_ISA", name, 1);
    const cpu::TileKernels* kernels = nullptr;
    try {
      kernels = &cpu::SelectKernels();
    } catch (const std::invalid_argument& error) {
      std::printf("skipped: %s\n", error.what());
      continue;
    }
    ++machines;
    if (!CheckExp(*kernels, 0) || !CheckExp(*kernels, 5)) return 1;
    for (unsigned seed = first; seed < first + problems; ++seed) {
      if (!Check(seed, *kernels)) return 1;
    }
  }
  std::printf("%u random problems agree on %d instruction sets\n", problems, machines);
  return machines == 0;
}

}  // namespace
}  // namespace longspan

int main(int argc, char** argv) { return longspan::Main(argc, argv); }
