// 16 floats in an AVX-512 register. Included by one translation unit, which is compiled with the matching flags.
#ifndef LONGSPAN_CPU_VEC_AVX512_H_
#define LONGSPAN_CPU_VEC_AVX512_H_

#include <immintrin.h>

#include "cpu/elements.h"

namespace longspan::cpu {
namespace {

struct Vec {
  static constexpr int kLanes = 16;
  __m512 v;

  static Vec Zero() { return {_mm512_setzero_ps()}; }
  static Vec Broadcast(float x) { return {_mm512_set1_ps(x)}; }
  static Vec Load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec Load(const Half* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
  static Vec Load(const BFloat16* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
  }

  void Store(float* p) const { _mm512_storeu_ps(p, v); }
  void Store(Half* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  void Store(BFloat16* p) const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i result = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(result, 16)));
  }

  // The second operand is the result when either is NaN, for Min and Max of every ISA.
  friend Vec Min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
  friend Vec Max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
  friend Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
  friend Vec Fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  friend Vec Abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
  friend Vec CopySign(Vec magnitude, Vec sign) {
    // 0xd8: bit-select, the third operand (the sign bit) chooses between the second and the first.
    return {_mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(magnitude.v), _mm512_castps_si512(sign.v),
                                                          _mm512_set1_epi32(INT32_MIN), 0xd8))};
  }
  friend bool AnyGreater(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ) != 0; }
  // Lanes of `yes` where a > b, else of `no`.
  friend Vec SelectGreater(Vec a, Vec b, Vec yes, Vec no) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), no.v, yes.v)};
  }
  // Lanes of `yes` whose bit is set, else of `no`.
  friend Vec SelectBits(uint32_t bits, Vec yes, Vec no) {
    return {_mm512_mask_blend_ps(static_cast<__mmask16>(bits), no.v, yes.v)};
  }
  friend float ReduceMax(Vec a) { return _mm512_reduce_max_ps(a.v); }
  friend float ReduceAdd(Vec a) { return _mm512_reduce_add_ps(a.v); }

  // Splits x <= 0 into a whole number, returned, and a fraction in [-1/2, 1/2].
  static Vec Split(Vec x, Vec* fraction) {
    fraction->v = _mm512_reduce_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return x - *fraction;
  }
  // x * 2^whole; 0 where that underflows.
  static Vec Scale(Vec x, Vec whole) { return {_mm512_scalef_ps(x.v, whole.v)}; }

  // Transposes 16 vectors of 16.
  static void Transpose(Vec (&rows)[kLanes]) {
    __m512 a[16];
    for (int i = 0; i < 8; ++i) {
      a[2 * i] = _mm512_unpacklo_ps(rows[2 * i].v, rows[2 * i + 1].v);
      a[2 * i + 1] = _mm512_unpackhi_ps(rows[2 * i].v, rows[2 * i + 1].v);
    }
    __m512 b[16];  // b[4 i + j]: column 4 l + j of rows 4 i .. 4 i + 3 in 128-bit lane l
    for (int i = 0; i < 4; ++i) {
      b[4 * i] = _mm512_shuffle_ps(a[4 * i], a[4 * i + 2], 0x44);
      b[4 * i + 1] = _mm512_shuffle_ps(a[4 * i], a[4 * i + 2], 0xee);
      b[4 * i + 2] = _mm512_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0x44);
      b[4 * i + 3] = _mm512_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0xee);
    }
    for (int j = 0; j < 4; ++j) {
      const __m512 low01 = _mm512_shuffle_f32x4(b[j], b[4 + j], 0x44);
      const __m512 high01 = _mm512_shuffle_f32x4(b[j], b[4 + j], 0xee);
      const __m512 low23 = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0x44);
      const __m512 high23 = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0xee);
      rows[j].v = _mm512_shuffle_f32x4(low01, low23, 0x88);
      rows[4 + j].v = _mm512_shuffle_f32x4(low01, low23, 0xdd);
      rows[8 + j].v = _mm512_shuffle_f32x4(high01, high23, 0x88);
      rows[12 + j].v = _mm512_shuffle_f32x4(high01, high23, 0xdd);
    }
  }
};

}  // namespace
}  // namespace longspan::cpu

#endif  // LONGSPAN_CPU_VEC_AVX512_H_
