// 4 floats with the compiler's portable vector extension: SSE2 on x86-64, NEON on AArch64.
#ifndef LONGSPAN_CPU_VEC_BASELINE_H_
#define LONGSPAN_CPU_VEC_BASELINE_H_

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/elements.h"

namespace longspan::cpu {
namespace {

typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));

struct Vec {
  static constexpr int kLanes = 4;
  Float4 v;

  static Vec Zero() { return Broadcast(0.0f); }
  static Vec Broadcast(float x) { return {Float4{x, x, x, x}}; }
  static Vec Load(const float* p) {
    Vec result;
    std::memcpy(&result.v, p, sizeof result.v);
    return result;
  }
  template <typename T>
  static Vec Load(const T* p) {
    return {Float4{ToFloat(p[0]), ToFloat(p[1]), ToFloat(p[2]), ToFloat(p[3])}};
  }
  void Store(float* p) const { std::memcpy(p, &v, sizeof v); }
  template <typename T>
  void Store(T* p) const {
    for (int i = 0; i < kLanes; ++i) FromFloat(v[i], p + i);
  }

  // The second operand is the result when either is NaN, for Min and Max of every ISA.
  friend Vec Min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
  friend Vec Max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
  friend Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
  friend Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
  friend Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
  friend Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
  friend Vec Fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }  // fused where the machine can
  friend Vec Abs(Vec a) { return {(Float4)((Int4)a.v & 0x7fffffff)}; }
  friend Vec CopySign(Vec magnitude, Vec sign) {
    return {(Float4)(((Int4)magnitude.v & 0x7fffffff) | ((Int4)sign.v & INT32_MIN))};
  }
  friend bool AnyGreater(Vec a, Vec b) {
    const Int4 mask = a.v > b.v;
    return (mask[0] | mask[1] | mask[2] | mask[3]) != 0;
  }
  // Lanes of `yes` where a > b, else of `no`.
  friend Vec SelectGreater(Vec a, Vec b, Vec yes, Vec no) { return {a.v > b.v ? yes.v : no.v}; }
  // Lanes of `yes` whose bit is set, else of `no`.
  friend Vec SelectBits(uint32_t bits, Vec yes, Vec no) {
    const auto b = static_cast<int32_t>(bits);
    const Int4 lane{1, 2, 4, 8};
    return {(Int4{b, b, b, b} & lane) == lane ? yes.v : no.v};
  }
  friend float ReduceMax(Vec a) { return std::fmax(std::fmax(a.v[0], a.v[1]), std::fmax(a.v[2], a.v[3])); }
  friend float ReduceAdd(Vec a) { return (a.v[0] + a.v[1]) + (a.v[2] + a.v[3]); }

  // Splits x <= 0 into a whole number, returned, and a fraction in [-1/2, 1/2]. -200 stands for everything below.
  static Vec Split(Vec x, Vec* fraction) {
    x = Max(Broadcast(-200.0f), x);
    const Vec magic = Broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    const Vec whole = (x + magic) - magic;
    *fraction = x - whole;
    return whole;
  }
  // x * 2^whole; 0 where that underflows.
  static Vec Scale(Vec x, Vec whole) {
    // A NaN lane has a NaN x as well, so whatever its conversion gives does not matter; clamp it into int range.
    const Vec safe = SelectGreater(whole, Broadcast(-201.0f), whole, Zero());
    const Int4 exponent = __builtin_convertvector(safe.v, Int4);
    const Int4 bits = (exponent + 127) * (1 << 23);
    const Vec power{(Float4)bits};
    return SelectGreater(Broadcast(-125.5f), whole, Zero(), x * power);
  }

  // Transposes 4 vectors of 4.
  static void Transpose(Vec (&rows)[kLanes]) {
    const Float4 a = rows[0].v, b = rows[1].v, c = rows[2].v, d = rows[3].v;
    rows[0].v = Float4{a[0], b[0], c[0], d[0]};
    rows[1].v = Float4{a[1], b[1], c[1], d[1]};
    rows[2].v = Float4{a[2], b[2], c[2], d[2]};
    rows[3].v = Float4{a[3], b[3], c[3], d[3]};
  }
};

}  // namespace
}  // namespace longspan::cpu

#endif  // LONGSPAN_CPU_VEC_BASELINE_H_
