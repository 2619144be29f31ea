// Weights, gradients and momentum in memory, and their rounding, which _rounding.py defines.
#pragma once

#include <type_traits>

#include "vec.h"

namespace {

constexpr int BLOCK = 2 * LANES;  // consecutive elements that are worked on together, in PARTS parts

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
struct i8 {
  int8_t code;
};
struct lane {  // a float32 number in pair order
  float value;
};
struct nothing {};

template <class T>
constexpr bool IS_NOTHING = std::is_same_v<std::remove_const_t<T>, nothing>;

template <class T>
constexpr bool NARROW = sizeof(T) == 2;

// A part of a block. In natural order `a` is from its first 16 elements and `b` from its last; in pair order `a` holds the
// even and `b` the odd ones, which is how 16-bit formats come apart with shifts alone, and how neighbours share a random
// word.
struct Part {
  F32 a, b;
};

INLINE Part operator+(Part x, Part y) { return {x.a + y.a, x.b + y.b}; }
INLINE Part operator-(Part x, Part y) { return {x.a - y.a, x.b - y.b}; }
INLINE Part operator*(Part x, Part y) { return {x.a * y.a, x.b * y.b}; }
INLINE Part operator/(Part x, Part y) { return {x.a / y.a, x.b / y.b}; }
INLINE Part operator*(Part x, F32 y) { return {x.a * y, x.b * y}; }
INLINE Part operator+(Part x, F32 y) { return {x.a + y, x.b + y}; }

INLINE F32 sum(Part x) { return x.a + x.b; }

// Where column j stands in an array that is kept in pair order.
INLINE int64_t paired(int64_t j) { return j / 32 * 32 + j % 32 / 2 + j % 2 * 16; }

// Part k of a block that is in the order of its parts already.
INLINE Part load_lanes(const float* block, int k) {
  return {load<F32>(block + k * WIDTH), load<F32>(block + LANES + k * WIDTH)};
}

INLINE void store_lanes(float* block, int k, Part x) {
  store(block + k * WIDTH, x.a);
  store(block + LANES + k * WIDTH, x.b);
}

INLINE F32 widen(U32 half) {  // float16 in the low bits
  const U32 magnitude = (half & 0x7FFFu) << 13, exponent = half & 0x7C00u;
  const U32 small = (U32)((F32)(magnitude + (113u << 23)) - 0x1p-14f);
  U32 word = choose((U32)(exponent == 0), small, magnitude + (112u << 23));
  word = choose((U32)(exponent == 0x7C00u), magnitude | 0x7F800000u, word);
  return (F32)(word | (half & 0x8000u) << 16);
}

template <bool PAIRS, class T>
INLINE Part load_part(const T* block, int k) {
  if constexpr (std::is_same_v<T, lane>) {
    return load_lanes(&block->value, k);
  } else if constexpr (!PAIRS) {
    return load_lanes(block, k);
  } else if constexpr (std::is_same_v<T, float>) {
    const F32 x = load<F32>(block + 2 * k * WIDTH), y = load<F32>(block + (2 * k + 1) * WIDTH);
    return {evens(x, y), odds(x, y)};
  } else {
    const U32 words = load<U32>(block + 2 * k * WIDTH);
    if constexpr (std::is_same_v<T, bf16>) return {(F32)(words << 16), (F32)(words & keep(0xFFFF0000u))};
    return {widen(words & 0xFFFFu), widen(words >> 16)};
  }
}

// Random bits: one word for two neighbours.

constexpr uint32_t MULTIPLIERS[] = {0x7FEB352Du, 0x846CA68Bu};

// All but the last step of the hash, and all but the first.
template <class Word, class Constant>
INLINE Word inner_mix(Word word, Word key, Constant first, Constant second) {
  word *= first;
  word ^= word >> 15;
  word += key;
  return word * second;
}

INLINE uint32_t mix(uint32_t word, uint32_t key) {
  word = inner_mix(word ^ word >> 16, key, MULTIPLIERS[0], MULTIPLIERS[1]);
  return word ^ word >> 16;
}

// 16 random bits for each element of a part.
struct Bits {
  U32 a, b;
};

// The draws of one step for a run of elements, in their order.
struct Draws {
  uint32_t key[2];
  uint64_t element = 0;
  bool odd = false, crosses = false;
  U32 pairs = {}, salt = {}, last, first_multiplier, second_multiplier, width;

  Draws(const int32_t* stream, int64_t step)
      : first_multiplier(keep(MULTIPLIERS[0])), second_multiplier(keep(MULTIPLIERS[1])), width(keep(WIDTH)) {
    key[0] = mix((uint32_t)stream[0] ^ (uint32_t)step, (uint32_t)stream[1]);
    key[1] = mix((uint32_t)stream[1] ^ (uint32_t)step, key[0]);
    last = all(key[1]);
  }

  // Begin a run of `count` elements.
  MEMBER void begin(uint64_t first, int64_t count) {
    alignas(64) static constexpr uint32_t lane[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    element = first;
    const uint64_t pair = first / 2;
    odd = first % 2;
    crosses = (pair + count / 2 + BLOCK) >> 16 != pair >> 16;
    // The hash begins with word ^ word >> 16, whose upper halves are the same for the whole run unless it crosses.
    const uint32_t word = salted(pair & ~(uint64_t)0xFFFF);
    pairs = load<U32>(lane) + ((uint32_t)pair & 0xFFFFu);
    salt = all(word ^ word >> 16);
  }

  MEMBER uint32_t salted(uint64_t pair) const { return (uint32_t)pair ^ ((uint32_t)(pair >> 32) * 0x9E3779B9u + key[0]); }

  MEMBER bool plain() const { return !odd && !crosses; }

  // For the next elements, in pair order.
  template <bool PLAIN>
  MEMBER Bits next() {
    if (!PLAIN && crosses) return next_slowly();
    Bits bits = of_pairs(pairs);
    if (!PLAIN && odd) bits = {bits.b, of_pairs(pairs + 1u).a};
    pairs += width;
    return bits;
  }

  MEMBER Bits of_pairs(U32 pairs) const {
    const U32 word = inner_mix(pairs ^ salt, last, first_multiplier, second_multiplier), high = word >> 16;
    return {(word ^ high) & keep(0xFFFFu), high};
  }

  MEMBER Bits next_slowly() {
    Bits bits;
    for (int i = 0; i < WIDTH; ++i, element += 2) {
      bits.a[i] = of(element);
      bits.b[i] = of(element + 1);
    }
    return bits;
  }

  MEMBER uint32_t of(uint64_t index) const { return mix(salted(index / 2), key[1]) >> index % 2 * 16 & 0xFFFFu; }
};

// Rounding to 16 bits, which end up in the upper half of each word.

INLINE U32 bf16_of(F32 x, U32 bits) {
  const U32 word = (U32)x, magnitude = word & 0x7FFFFFFFu, moved = magnitude + bits;
  const U32 rounded = choose((U32)(moved < 0x7F7FFFFFu), moved, all(0x7F7FFFFFu));
  return choose((U32)(magnitude < 0x7F800000u), rounded, magnitude) | (word & 0x80000000u);
}

INLINE U32 bf16_nearest(F32 x) {
  const U32 word = (U32)x;
  return choose((U32)(x == x), word + 0x7FFFu + (word >> 16 & 1u), word | 0x00400000u);
}

INLINE U32 f16_special(U32 magnitude) { return 0x7C00u | ((U32)(magnitude > 0x7F800000u) & 0x0200u); }

INLINE U32 f16_of(F32 x, U32 bits) {
  const U32 word = (U32)x, plain = word & 0x7FFFFFFFu;
  const U32 small = (U32)(plain < 0x38800000u);  // below the smallest normal number, 2^-14
  const U32 moved = choose(small, (U32)((F32)plain + 0x1p-14f), plain) + (bits >> 3);
  const U32 rounded = choose((U32)(moved < 0x477FFFFFu), moved, all(0x477FFFFFu));
  const U32 half = (rounded >> 13) - choose(small, all(113u << 10), all(112u << 10));
  return choose((U32)(plain < 0x7F800000u), half, f16_special(plain)) << 16 | (word & 0x80000000u);
}

INLINE U32 f16_nearest(F32 x) {
  const U32 word = (U32)x, plain = word & 0x7FFFFFFFu;
  const U32 small = (U32)((F32)plain + 0.5f) - 0x3F000000u;  // the addition rounds to a multiple of 2^-24
  const U32 normal = (plain - (112u << 23) + 0x0FFFu + (plain >> 13 & 1u)) >> 13;  // may carry into infinity
  const U32 half = choose((U32)(plain < 0x38800000u), small, normal);
  return choose((U32)(plain < 0x47800000u), half, f16_special(plain)) << 16 | (word & 0x80000000u);
}

INLINE U32 halves(U32 a, U32 b) { return upper_halves(a >> 16, b); }

// True if any of these bfloat16 numbers is the largest one or beyond it.
INLINE bool at_the_edge(U32 pairs) {
  const U16 x = (U16)pairs, bottom = (U16)keep(0x81028102u);
  const U16 shifted = x + x + bottom;  // without the sign, and with those numbers wrapped to the bottom
  return any((U32)((S16)shifted < (S16)bottom));
}

// NaN without its low bits, to which random bits would be added until they carry beyond its sign. Only float32 momentum
// brings such a NaN: one from CUDA, say.
INLINE F32 short_nan(F32 x) { return (F32)((U32)x & ~((U32)(x != x) & 0xFFFFu)); }
INLINE Part short_nan(Part x) { return {short_nan(x.a), short_nan(x.b)}; }

template <bool TAME>  // no finite number here rounds to infinity
INLINE U32 rounded_to(bf16*, Part x, Bits bits) {
  const U32 rounded = halves((U32)x.a + bits.a, (U32)x.b + bits.b);  // right wherever nothing leaves the finite range
  if (!TAME && __builtin_expect(at_the_edge(rounded), 0)) return halves(bf16_of(x.a, bits.a), bf16_of(x.b, bits.b));
  return rounded;
}

template <bool TAME>
INLINE U32 rounded_to(f16*, Part x, Bits bits) {
  return halves(f16_of(x.a, bits.a), f16_of(x.b, bits.b));
}

INLINE U32 nearest_to(bf16*, Part x) { return halves(bf16_nearest(x.a), bf16_nearest(x.b)); }
INLINE U32 nearest_to(f16*, Part x) { return halves(f16_nearest(x.a), f16_nearest(x.b)); }

// PLAIN: the draws are.
template <bool PAIRS, bool PLAIN, bool TAME, class T>
INLINE void store_part(T* block, int k, Part x, bool stochastic, Draws& draws) {
  if constexpr (std::is_same_v<T, lane>) {
    store_lanes(&block->value, k, x);
  } else if constexpr (!PAIRS) {
    store_lanes(block, k, x);
  } else if constexpr (std::is_same_v<T, float>) {
    store(block + 2 * k * WIDTH, zip_low(x.a, x.b));
    store(block + (2 * k + 1) * WIDTH, zip_high(x.a, x.b));
  } else {
    store(block + 2 * k * WIDTH,
          stochastic ? rounded_to<TAME>(block, x, draws.next<PLAIN>()) : nearest_to(block, x));
  }
}

// Weights with their missing bits: L is uint8_t or nothing, and K too.

struct Split {
  U32 top, remainder;
};

template <bool ALL_BITS>
INLINE Split split(F32 x) {
  const U32 infinity = keep(0x7F800000u), sign = (U32)x & 0x80000000u;
  S32 word = (S32)x & 0x7FFFFFFF;
  if constexpr (!ALL_BITS) {
    const S32 rounded = smaller((word + 0x80) & ~0xFF, (S32)(infinity - 0x100u));
    word = (S32)choose((U32)(word < (S32)infinity), (U32)rounded, (U32)word);
  }
  const U32 whole = choose((U32)(word > (S32)infinity), all(0x7FC00000u), (U32)word) | sign;
  const U32 top = (whole + 0x8000u) & keep(0xFFFF0000u);
  return {top, whole - top};
}

template <bool PAIRS, class P, class L, class K>
INLINE Part load_weight(const P* block, const L* low, const K* lowest, int k) {
  if constexpr (IS_NOTHING<L>) {
    return load_part<PAIRS>(block, k);
  } else {
    const U32 words = load<U32>(block + 2 * k * WIDTH), bytes = load_halves(low + 2 * k * WIDTH);
    U32 a = (words << 16) + (U32)((S32)(bytes << 24) >> 16);
    U32 b = (words & keep(0xFFFF0000u)) + (U32)((S32)((bytes & 0xFF00u) << 16) >> 16);
    if constexpr (!IS_NOTHING<K>) {
      const U32 last = load_halves(lowest + 2 * k * WIDTH);
      a += last & 0xFFu;
      b += last >> 8;
    }
    return {(F32)a, (F32)b};
  }
}

template <class P, class L, class K>
INLINE void store_split(P* block, L* low, K* lowest, int k, Part x) {
  const Split a = split<!IS_NOTHING<K>>(x.a), b = split<!IS_NOTHING<K>>(x.b);
  store(block + 2 * k * WIDTH, halves(a.top, b.top));
  store_halves(low + 2 * k * WIDTH, (a.remainder >> 8 & 0xFFu) | (b.remainder & 0xFF00u));
  if constexpr (!IS_NOTHING<K>)
    store_halves(lowest + 2 * k * WIDTH, (a.remainder & 0xFFu) | (b.remainder & 0xFFu) << 8);
}

// Momentum in one byte. `fresh` holds one block of it, with zeros beyond `count`.

constexpr int64_t MOMENTUM_BLOCK = 128;
constexpr float CODES = 127;

INLINE U32 magnitude(F32 x) { return (U32)x & keep(0x7FFFFFFFu); }

INLINE void dequantize(const i8* codes, int64_t count, float scale, lane* fresh) {
  alignas(64) i8 all_codes[MOMENTUM_BLOCK] = {};
  memcpy(all_codes, codes, count);
  for (int64_t j = 0; j < count; j += BLOCK) EACH_PART(k) {
      const U32 bytes = load_halves(all_codes + j + 2 * k * WIDTH);
      const F32 a = to_float((S32)(bytes << 24) >> 24), b = to_float((S32)(bytes << 16) >> 24);
      store_lanes(&fresh[j].value, k, {a * (F32)magnitude(a) * scale, b * (F32)magnitude(b) * scale});
    }
}

INLINE U32 code_of(F32 M, float inverse, F32 draw) {
  const F32 square = smaller((F32)magnitude(M) * inverse, all(CODES * CODES));
  const S32 code = to_int(root(square)), sign = (S32)M >> 31;
  const F32 below = to_float(code);
  const S32 up = square - below * below > draw * (below + below + 1);  // -1 where true
  return (U32)(((code - up) ^ sign) - sign) & keep(0xFFu);
}

template <bool PLAIN>
INLINE void quantize(const lane* fresh, int64_t count, bool stochastic, Draws& draws, i8* codes, float& scale) {
  S32 most = {};
  for (int64_t j = 0; j < count; j += BLOCK) EACH_PART(k) {
      const Part M = load_lanes(&fresh[j].value, k);
      most = larger(most, larger((S32)magnitude(M.a), (S32)magnitude(M.b)));
    }
  int32_t word = 0;
  for (int i = 0; i < WIDTH; ++i) word = most[i] > word ? most[i] : word;
  float largest;
  memcpy(&largest, &word, sizeof largest);
  const bool finite = word < 0x7F800000, empty = finite && largest < 0x1p-100f;
  scale = empty ? 0 : finite ? largest * (1 / (CODES * CODES)) : __builtin_inff();
  const float inverse = empty || !finite ? 0 : 1 / scale;
  alignas(64) i8 all_codes[MOMENTUM_BLOCK] = {};
  for (int64_t j = 0; j < count; j += BLOCK) EACH_PART(k) {
      const Part M = load_lanes(&fresh[j].value, k);
      Part draw = {all(0.5f), all(0.5f)};
      if (stochastic) {
        const Bits bits = draws.next<PLAIN>();
        draw = {(to_float((S32)bits.a) + 0.5f) * 0x1p-16f, (to_float((S32)bits.b) + 0.5f) * 0x1p-16f};
      }
      if (finite)
        store_halves(all_codes + j + 2 * k * WIDTH,
                     code_of(M.a, inverse, draw.a) | code_of(M.b, inverse, draw.b) << 8);
    }
  memcpy(codes, all_codes, count);
}

}  // namespace
