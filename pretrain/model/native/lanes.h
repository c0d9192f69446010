// Vectors of 16 fp32 numbers, which compilers make of whatever vectors the processor has.

#pragma once

#include <cstdint>
#include <cstring>

constexpr int64_t LANES = 16;
typedef float Lanes __attribute__((vector_size(64)));
typedef uint32_t LaneBits __attribute__((vector_size(64)));
typedef uint16_t HalfLanes __attribute__((vector_size(32)));

#if !defined(__has_builtin)
#define SHUFFLED(a, b, ...) __builtin_shuffle(a, b, (LaneBits){__VA_ARGS__})
#elif __has_builtin(__builtin_shufflevector)
#define SHUFFLED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLED(a, b, ...) __builtin_shuffle(a, b, (LaneBits){__VA_ARGS__})
#endif

inline Lanes loaded(const float* from) {
  Lanes lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

inline Lanes loaded(const uint16_t* from) {
  HalfLanes half;
  std::memcpy(&half, from, sizeof half);
  LaneBits bits = __builtin_convertvector(half, LaneBits) << 16;
  Lanes lanes;
  std::memcpy(&lanes, &bits, sizeof lanes);
  return lanes;
}

// In each group of four lanes: sums of two lanes of a, of b, of a and of b.
inline Lanes sums_of_twos(Lanes a, Lanes b) {
  return SHUFFLED(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
         SHUFFLED(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
}

// In each group of four lanes: the sums over the same four lanes of a, of b, of c and of d.
inline Lanes sums_of_fours(Lanes a, Lanes b, Lanes c, Lanes d) {
  Lanes ab = sums_of_twos(a, b), cd = sums_of_twos(c, d);
  return SHUFFLED(ab, cd, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
         SHUFFLED(ab, cd, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
}

// The sums of neighbouring groups of four lanes: two groups of a, then two of b.
inline Lanes sums_of_groups(Lanes a, Lanes b) {
  return SHUFFLED(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
         SHUFFLED(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}

// The sums of all lanes of sixteen vectors, whose groups of four `sums_of_fours` has summed: four vectors to each.
inline Lanes sums_of_sixteen(Lanes a, Lanes b, Lanes c, Lanes d) {
  return sums_of_groups(sums_of_groups(a, b), sums_of_groups(c, d));
}
