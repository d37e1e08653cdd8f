// Element conversions, exp2 and the soft cap of every instruction set that the machine has, against double.
#include "cpu/tile_kernels.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

#include "cpu/elements.h"
#include "testing.h"

namespace longspan {
namespace {

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

}  // namespace
}  // namespace longspan

int main() {
  using namespace longspan;
  const bool good = CheckElements() && testing::OnEveryInstructionSet([](const cpu::TileKernels& kernels) {
                      return CheckExp(kernels, 0) && CheckExp(kernels, 5);
                    });
  return good ? 0 : 1;
}
