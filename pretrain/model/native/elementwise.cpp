// What a forward pass does between its products, each in one pass over memory: the norm, and rotation.
//
// Elements are fp32 or bf16, sums are fp32, and results are rounded where those of torch's operations are. There is
// nothing of torch in it: it compiles in a second.

#include "elements.h"

#include <algorithm>
#include <cmath>

namespace {

constexpr int64_t SHARE = 1 << 15;  // elements that are worth a thread

int64_t threads_for(int64_t elements, int64_t threads) { return std::max<int64_t>(1, std::min(threads, elements / SHARE)); }

template <typename T>
void normalize(const T* x, const T* weight, T* y, float* factors, int64_t rows, int64_t size, float eps,
               int64_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < rows; row++) {
    const T* from = x + row * size;
    T* to = y + row * size;
    float sum = 0;
    for (int64_t i = 0; i < size; i++) sum += widened(from[i]) * widened(from[i]);
    const float factor = factors[row] = 1 / std::sqrt(sum / size + eps);
    for (int64_t i = 0; i < size; i++) store(rounded<T>(widened(from[i]) * factor) * widened(weight[i]), to + i);
  }
}

template <typename T>
void rotate(const T* x, const T* cos, const T* sin, T* y, int64_t tokens, int64_t heads, int64_t half, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t token = 0; token < tokens; token++) {
    const T *c = cos + 2 * half * token, *s = sin + 2 * half * token;
    for (int64_t head = token * heads; head < (token + 1) * heads; head++) {
      const T *first = x + 2 * half * head, *second = first + half;
      T *to_first = y + 2 * half * head, *to_second = to_first + half;
      for (int64_t i = 0; i < half; i++) {
        float a = widened(first[i]), b = widened(second[i]);
        store(rounded<T>(a * widened(c[i])) - b * widened(s[i]), to_first + i);
        store(rounded<T>(b * widened(c[half + i])) + a * widened(s[half + i]), to_second + i);
      }
    }
  }
}

}  // namespace

// y = factor x weight, factor = 1 / sqrt(mean(x^2) + eps): x and y [rows, size], weight [size], factors [rows].
extern "C" void rms_norm(const void* x, const void* weight, void* y, float* factors, int64_t rows, int64_t size,
                         float eps, int64_t threads, int64_t is_bf16) {
  threads = threads_for(rows * size, threads);
  if (is_bf16)
    normalize(static_cast<const uint16_t*>(x), static_cast<const uint16_t*>(weight), static_cast<uint16_t*>(y), factors,
              rows, size, eps, threads);
  else
    normalize(static_cast<const float*>(x), static_cast<const float*>(weight), static_cast<float*>(y), factors, rows, size,
              eps, threads);
}

// Rotates each pair (x[i], x[i + half]) of every head: x and y [tokens, heads, 2 half], cos and sin [tokens, 2 half].
extern "C" void rotate_halves(const void* x, const void* cos, const void* sin, void* y, int64_t tokens, int64_t heads,
                              int64_t half, int64_t threads, int64_t is_bf16) {
  threads = threads_for(2 * tokens * heads * half, threads);
  if (is_bf16)
    rotate(static_cast<const uint16_t*>(x), static_cast<const uint16_t*>(cos), static_cast<const uint16_t*>(sin),
           static_cast<uint16_t*>(y), tokens, heads, half, threads);
  else
    rotate(static_cast<const float*>(x), static_cast<const float*>(cos), static_cast<const float*>(sin),
           static_cast<float*>(y), tokens, heads, half, threads);
}
