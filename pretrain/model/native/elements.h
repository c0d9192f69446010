// Elements of tensors, fp32 or the bits of bf16, as fp32 and back.

#pragma once

#include <cstdint>
#include <cstring>

inline float widened(float value) { return value; }

inline float widened(uint16_t bits) {
  uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

inline void store(float value, float* to) { *to = value; }

inline void store(float value, uint16_t* to) {  // rounded to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  *to = value != value ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// The value that an element of type T would have.
template <typename T>
float rounded(float value) {
  T element;
  store(value, &element);
  return widened(element);
}
