// The exponential function of kernels, in a form that compilers make vectors of.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

// e^x to a few units of fp32's last place, 0 far below; without branches, so that the compiler makes vectors of it.
inline float exponential(float x) {
  float power = std::min(std::max(x * 1.44269504f, -126.0f), 126.0f);
  float whole = std::nearbyint(power), r = (power - whole) * 0.69314718f;
  float sum = 1 + r * (1 + r * (0.5f + r * (1 / 6.0f + r * (1 / 24.0f + r * (1 / 120.0f + r / 720.0f)))));
  int32_t bits = (static_cast<int32_t>(whole) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, 4);
  return power > -126.0f ? sum * scale : 0.0f;
}
