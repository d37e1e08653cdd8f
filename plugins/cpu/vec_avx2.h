// 8 floats in an AVX2 register, with FMA and F16C. Included by one translation unit, compiled with the matching flags.
#ifndef LONGSPAN_CPU_VEC_AVX2_H_
#define LONGSPAN_CPU_VEC_AVX2_H_

#include <immintrin.h>

#include "cpu/elements.h"

namespace longspan::cpu {
namespace {

struct Vec {
  static constexpr int kLanes = 8;
  __m256 v;

  static Vec Zero() { return {_mm256_setzero_ps()}; }
  static Vec Broadcast(float x) { return {_mm256_set1_ps(x)}; }
  static Vec Load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec Load(const Half* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
  static Vec Load(const BFloat16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
  }

  void Store(float* p) const { _mm256_storeu_ps(p, v); }
  void Store(Half* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  void Store(BFloat16* p) const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i result = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
    const __m128i low = _mm256_castsi256_si128(result);
    const __m128i high = _mm256_extracti128_si256(result, 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(low, high));
  }

  // The second operand is the result when either is NaN, for Min and Max of every ISA.
  friend Vec Min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
  friend Vec Max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
  friend Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
  friend Vec Fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  friend Vec Abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
  friend Vec CopySign(Vec magnitude, Vec sign) {
    const __m256 bit = _mm256_set1_ps(-0.0f);
    return {_mm256_or_ps(_mm256_andnot_ps(bit, magnitude.v), _mm256_and_ps(bit, sign.v))};
  }
  friend bool AnyGreater(Vec a, Vec b) { return _mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)) != 0; }
  // Lanes of `yes` where a > b, else of `no`.
  friend Vec SelectGreater(Vec a, Vec b, Vec yes, Vec no) {
    return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ))};
  }
  // Lanes of `yes` whose bit is set, else of `no`.
  friend Vec SelectBits(uint32_t bits, Vec yes, Vec no) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane);
    return {_mm256_blendv_ps(no.v, yes.v, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane)))};
  }
  friend float ReduceMax(Vec a) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
  }
  friend float ReduceAdd(Vec a) {
    __m128 m = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    m = _mm_add_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_add_ss(m, _mm_movehdup_ps(m)));
  }

  // Splits x <= 0 into a whole number, returned, and a fraction in [-1/2, 1/2]. -200 stands for everything below.
  static Vec Split(Vec x, Vec* fraction) {
    x = Max(Broadcast(-200.0f), x);
    const Vec whole{_mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
    *fraction = x - whole;
    return whole;
  }
  // x * 2^whole; 0 where that underflows.
  static Vec Scale(Vec x, Vec whole) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(whole.v), 23);
    const __m256 power = _mm256_castsi256_ps(_mm256_add_epi32(exponent, _mm256_castps_si256(_mm256_set1_ps(1.0f))));
    return SelectGreater(Broadcast(-125.5f), whole, Zero(), x * Vec{power});
  }

  // Transposes 8 vectors of 8.
  static void Transpose(Vec (&rows)[kLanes]) {
    __m256 a[8];
    for (int i = 0; i < 4; ++i) {
      a[2 * i] = _mm256_unpacklo_ps(rows[2 * i].v, rows[2 * i + 1].v);
      a[2 * i + 1] = _mm256_unpackhi_ps(rows[2 * i].v, rows[2 * i + 1].v);
    }
    __m256 b[8];  // b[4 i + j]: columns j and 4 + j of rows 4 i .. 4 i + 3
    for (int i = 0; i < 2; ++i) {
      b[4 * i] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0x44);
      b[4 * i + 1] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0xee);
      b[4 * i + 2] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0x44);
      b[4 * i + 3] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0xee);
    }
    for (int j = 0; j < 4; ++j) {
      rows[j].v = _mm256_permute2f128_ps(b[j], b[4 + j], 0x20);
      rows[4 + j].v = _mm256_permute2f128_ps(b[j], b[4 + j], 0x31);
    }
  }
};

}  // namespace
}  // namespace longspan::cpu

#endif  // LONGSPAN_CPU_VEC_AVX2_H_
