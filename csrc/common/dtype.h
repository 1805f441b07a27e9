// SPDX-License-Identifier: Apache-2.0
// The floating-point types of the kernels, and a function called with one of them chosen at run
// time.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>

#include "common/tensor.h"

namespace ctxops {
namespace {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

CTXOPS_HD uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

CTXOPS_HD float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

CTXOPS_HD float load(float x) { return x; }
CTXOPS_HD double load(double x) { return x; }
CTXOPS_HD float load(BFloat16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }

// Selects instead of branches, in these two as well: the compiler vectorises them.
CTXOPS_HD float load(Half x) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
#else
  const uint32_t magnitude = x.bits & 0x7fffu;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t normal = (magnitude << 13) + 0x38000000u;
  // The mantissa of 0.5 counts in steps of 2^-24, as subnormal halves do.
  const uint32_t subnormal = float_bits(bits_float(magnitude | 0x3f000000u) - 0.5f);
  const uint32_t special = (magnitude << 13) | 0x7f800000u;
  const uint32_t finite = magnitude < 0x0400u ? subnormal : normal;
  return bits_float(sign | (magnitude >= 0x7c00u ? special : finite));
#endif
}

CTXOPS_HD void store(float* to, float x) { *to = x; }
CTXOPS_HD void store(double* to, double x) { *to = x; }

CTXOPS_HD void store(BFloat16* to, float x) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to->bits) : "f"(x));
#else
  const uint32_t bits = float_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40u;
  to->bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
#endif
}

CTXOPS_HD void store(Half* to, float x) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to->bits) : "f"(x));
#else
  const uint32_t bits = float_bits(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Normal: rebase the exponent, round to nearest even by a carry into the kept bits.
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal: adding 0.5 leaves the rounded half in the low bits of the mantissa.
  const uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x47800000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  to->bits = static_cast<uint16_t>(half | (bits >> 16 & 0x8000u));
#endif
}

CTXOPS_HD float exponential(float x) { return expf(x); }
CTXOPS_HD double exponential(double x) { return exp(x); }

// Sums of half-precision values are kept in float.
template <typename T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <typename T>
using Accumulator = typename AccumulatorOf<T>::type;

inline DType accumulator_dtype(DType dtype) {
  return dtype == DType::float64 ? DType::float64 : DType::float32;
}

inline bool is_floating(DType dtype) {
  return dtype == DType::float32 || dtype == DType::float64 || dtype == DType::float16 ||
         dtype == DType::bfloat16;
}

inline bool is_integer(DType dtype) {
  return dtype == DType::uint8 || dtype == DType::int8 || dtype == DType::int16 ||
         dtype == DType::int32 || dtype == DType::int64;
}

template <typename T>
struct Tag {
  using type = T;
};

// f(Tag<T>{}) with the C++ type of a floating dtype. The caller has checked is_floating().
template <typename F>
auto dispatch_floating(DType dtype, const F& f) {
  switch (dtype) {
    case DType::float32: return f(Tag<float>{});
    case DType::float64: return f(Tag<double>{});
    case DType::float16: return f(Tag<Half>{});
    case DType::bfloat16: return f(Tag<BFloat16>{});
    default: return decltype(f(Tag<float>{}))();
  }
}

// The same for an integer dtype. The caller has checked is_integer().
template <typename F>
void dispatch_integer(DType dtype, const F& f) {
  switch (dtype) {
    case DType::uint8: return f(Tag<uint8_t>{});
    case DType::int8: return f(Tag<int8_t>{});
    case DType::int16: return f(Tag<int16_t>{});
    case DType::int32: return f(Tag<int32_t>{});
    case DType::int64: return f(Tag<int64_t>{});
    default: return;
  }
}

}  // namespace
}  // namespace ctxops
