// Storage types of 16 bits, and their conversion without special instructions.
#ifndef LONGSPAN_CPU_ELEMENTS_H_
#define LONGSPAN_CPU_ELEMENTS_H_

#include <cstdint>
#include <cstring>

namespace longspan::cpu {

// IEEE 754 binary16, as bits.
struct Half {
  uint16_t bits;
};

// The upper half of an IEEE 754 binary32, as bits.
struct BFloat16 {
  uint16_t bits;
};

inline float FromBits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t ToBits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float ToFloat(float x) { return x; }

inline float ToFloat(BFloat16 x) { return FromBits(uint32_t{x.bits} << 16); }

inline float ToFloat(Half x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16;
  const uint32_t rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return FromBits(sign | 0x7f800000u | (rest & 0x3ffu) << 13);  // infinity, NaN
  if (rest < 0x400u) {                                                               // subnormal: rest * 2^-24 is exact
    const float magnitude = static_cast<float>(rest) * 5.9604644775390625e-8f;
    return sign ? -magnitude : magnitude;
  }
  return FromBits(sign | ((rest << 13) + 0x38000000u));
}

inline void FromFloat(float x, float* out) { *out = x; }

// Rounds to nearest, ties to even.
inline void FromFloat(float x, BFloat16* out) {
  const uint32_t bits = ToBits(x);
  out->bits = x != x ? uint16_t{0x7fc0} : static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// Rounds to nearest, ties to even; too large becomes infinity.
inline void FromFloat(float x, Half* out) {
  const uint32_t bits = ToBits(x);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t rest = bits & 0x7fffffffu;
  uint32_t half;
  if (rest > 0x7f800000u) {
    half = 0x7e00u;
  } else if (rest >= 0x477ff000u) {  // 65520 and above
    half = 0x7c00u;
  } else if (rest < 0x38800000u) {  // below 2^-14: adding 0.5 leaves the subnormal's bits at the bottom of the mantissa
    half = ToBits(FromBits(rest) + 0.5f) - 0x3f000000u;
  } else {
    half = (rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

}  // namespace longspan::cpu

#endif  // LONGSPAN_CPU_ELEMENTS_H_
