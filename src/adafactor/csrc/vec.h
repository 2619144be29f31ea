// One register of the machine, as GCC's and Clang's vector types have it: +, *, & and << are theirs.
//
// Every operation is elementwise and correctly rounded, and all sums run over sixteen lanes, be they one register or
// four. With contraction into fused multiply-adds switched off, every instruction set gives the same bits.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define MEMBER inline __attribute__((always_inline))

namespace {

#if defined(__AVX512BW__)
constexpr int REGISTER = 64;  // bytes
#elif defined(__AVX2__)
constexpr int REGISTER = 32;
#else
constexpr int REGISTER = 16;
#endif
constexpr int WIDTH = REGISTER / 4;
constexpr int LANES = 16;
constexpr int PARTS = LANES / WIDTH;

typedef float F32 __attribute__((vector_size(REGISTER)));
typedef uint32_t U32 __attribute__((vector_size(REGISTER)));
typedef int32_t S32 __attribute__((vector_size(REGISTER)));
typedef uint16_t U16 __attribute__((vector_size(REGISTER)));
typedef int16_t S16 __attribute__((vector_size(REGISTER)));

#define EACH_PART(k) _Pragma("GCC unroll 4") for (int k = 0; k < PARTS; ++k)

template <class V>
INLINE V load(const void* at) {
  V x;
  memcpy(&x, at, sizeof x);
  return x;
}

template <class V>
INLINE void store(void* at, V x) {
  memcpy(at, &x, sizeof x);
}

// 16 bits per lane, to and from half a register's memory.
INLINE U32 load_halves(const void* at) {
#if defined(__AVX512BW__)
  return (U32)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)at));
#elif defined(__AVX2__)
  return (U32)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)at));
#else
  uint16_t half[WIDTH];
  memcpy(half, at, sizeof half);
  U32 x = {};
  for (int i = 0; i < WIDTH; ++i) x[i] = half[i];
  return x;
#endif
}

INLINE void store_halves(void* at, U32 x) {
#if defined(__AVX512BW__)
  _mm256_storeu_si256((__m256i*)at, _mm512_cvtepi32_epi16((__m512i)x));
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)x, (__m256i)x);
  _mm_storeu_si128((__m128i*)at, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#else
  uint16_t half[WIDTH];
  for (int i = 0; i < WIDTH; ++i) half[i] = (uint16_t)x[i];
  memcpy(at, half, sizeof half);
#endif
}

INLINE F32 to_float(S32 x) { return __builtin_convertvector(x, F32); }
INLINE S32 to_int(F32 x) { return __builtin_convertvector(x, S32); }  // towards zero

INLINE F32 all(float x) { return x - F32{}; }
INLINE U32 all(uint32_t x) { return x - U32{}; }

// A constant that the compiler keeps in a register or in memory, where it would otherwise build it anew in every loop.
INLINE U32 keep(uint32_t x) {
  U32 kept = all(x);
#if defined(__SSE2__)
  asm("" : "+x"(kept));
#endif
  return kept;
}

// A condition to test as it is, not by repeating how it came about.
INLINE bool flag(bool x) {
  asm("" : "+r"(x));
  return x;
}

INLINE U32 choose(U32 mask, U32 yes, U32 no) { return no ^ (mask & (yes ^ no)); }

INLINE F32 smaller(F32 x, F32 limit) {
#if defined(__AVX512BW__)
  return (F32)_mm512_min_ps((__m512)x, (__m512)limit);
#elif defined(__AVX2__)
  return (F32)_mm256_min_ps((__m256)x, (__m256)limit);
#else
  return (F32)choose((U32)(x < limit), (U32)x, (U32)limit);
#endif
}

INLINE S32 smaller(S32 x, S32 limit) {
#if defined(__AVX512BW__)
  return (S32)_mm512_min_epi32((__m512i)x, (__m512i)limit);
#elif defined(__AVX2__)
  return (S32)_mm256_min_epi32((__m256i)x, (__m256i)limit);
#else
  return (S32)choose((U32)(x < limit), (U32)x, (U32)limit);
#endif
}

INLINE S32 larger(S32 x, S32 y) {
#if defined(__AVX512BW__)
  return (S32)_mm512_max_epi32((__m512i)x, (__m512i)y);
#elif defined(__AVX2__)
  return (S32)_mm256_max_epi32((__m256i)x, (__m256i)y);
#else
  return (S32)choose((U32)(x > y), (U32)x, (U32)y);
#endif
}

// The lower half of each word from the one, the upper from the other.
INLINE U32 upper_halves(U32 low, U32 high) {
#if defined(__AVX512BW__)
  return (U32)_mm512_mask_blend_epi16(0xAAAAAAAAu, (__m512i)low, (__m512i)high);
#elif defined(__AVX2__)
  return (U32)_mm256_blend_epi16((__m256i)low, (__m256i)high, 0xAA);
#else
  return (low & 0xFFFFu) | (high & 0xFFFF0000u);
#endif
}

INLINE bool any(U32 mask) {
#if defined(__AVX512BW__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  uint64_t words[2];
  memcpy(words, &mask, sizeof words);
  return words[0] | words[1];
#endif
}

INLINE F32 root(F32 x) {
  for (int i = 0; i < WIDTH; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
}

// Elements 0, 2, 4 ... and 1, 3, 5 ... of two registers in a row, and back.
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define SHUFFLE(x, y, ...) __builtin_shuffle(x, y, (U32){__VA_ARGS__})
#endif
#if defined(__AVX512BW__)
INLINE F32 evens(F32 x, F32 y) { return SHUFFLE(x, y, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30); }
INLINE F32 odds(F32 x, F32 y) { return SHUFFLE(x, y, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31); }
INLINE F32 zip_low(F32 x, F32 y) { return SHUFFLE(x, y, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23); }
INLINE F32 zip_high(F32 x, F32 y) {
  return SHUFFLE(x, y, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
#elif defined(__AVX2__)
INLINE F32 evens(F32 x, F32 y) { return SHUFFLE(x, y, 0, 2, 4, 6, 8, 10, 12, 14); }
INLINE F32 odds(F32 x, F32 y) { return SHUFFLE(x, y, 1, 3, 5, 7, 9, 11, 13, 15); }
INLINE F32 zip_low(F32 x, F32 y) { return SHUFFLE(x, y, 0, 8, 1, 9, 2, 10, 3, 11); }
INLINE F32 zip_high(F32 x, F32 y) { return SHUFFLE(x, y, 4, 12, 5, 13, 6, 14, 7, 15); }
#else
INLINE F32 evens(F32 x, F32 y) { return SHUFFLE(x, y, 0, 2, 4, 6); }
INLINE F32 odds(F32 x, F32 y) { return SHUFFLE(x, y, 1, 3, 5, 7); }
INLINE F32 zip_low(F32 x, F32 y) { return SHUFFLE(x, y, 0, 4, 1, 5); }
INLINE F32 zip_high(F32 x, F32 y) { return SHUFFLE(x, y, 2, 6, 3, 7); }
#endif

// Sixteen running sums.
struct Sums {
  F32 part[PARTS];

  Sums() {
    EACH_PART(k) part[k] = F32{};
  }

  // Their sum, in a fixed tree.
  MEMBER float total() const {
    alignas(64) float x[LANES];
    memcpy(x, part, sizeof x);
    for (int half = LANES / 2; half; half /= 2)
      for (int i = 0; i < half; ++i) x[i] += x[i + half];
    return x[0];
  }
};

}  // namespace
