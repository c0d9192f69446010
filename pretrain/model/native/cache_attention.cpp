// Attention of one new token a row to the keys and values that are stored for the row, on a CPU.
//
// Each row reads its own tokens alone, however long other rows are, and the order of its sums depends on nothing else.
// Elements are fp32 or bf16; scores, weights and sums are fp32. There is nothing of torch in it: it compiles in a second.

#include "exponential.h"

#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

constexpr int64_t LANES = 16;

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

// The scores of `count` keys, filled up to whole lanes with -inf; returns the largest.
template <int64_t SIZE, typename T>
float scores_of(const float* q, const T* keys, int64_t count, int64_t any_size, float* scores) {
  const int64_t size = SIZE ? SIZE : any_size;
  for (int64_t t = 0; t < count; t++) {
    float sum = 0;
    for (int64_t i = 0; i < size; i++) sum += q[i] * widened(keys[t * size + i]);
    scores[t] = sum;
  }
  for (int64_t t = count; t % LANES; t++) scores[t] = -std::numeric_limits<float>::infinity();
  float lanes[LANES], most = scores[0];
  for (float& lane : lanes) lane = most;
  for (int64_t t = 0; t < count; t += LANES)
    for (int64_t i = 0; i < LANES; i++) lanes[i] = scores[t + i] > lanes[i] ? scores[t + i] : lanes[i];
  for (float lane : lanes) most = lane > most ? lane : most;
  return most;
}

template <int64_t SIZE, typename T>
void one_head(const T* q, const T* keys, const T* values, T* out, int64_t count, int64_t any_size, float scale,
              std::vector<float>& room) {
  const int64_t size = SIZE ? SIZE : any_size;
  float *query = room.data(), *sums = query + size, *scores = sums + size;
  for (int64_t i = 0; i < size; i++) query[i] = widened(q[i]) * scale, sums[i] = 0;
  float most = scores_of<SIZE>(query, keys, count, size, scores), total = 0;
  for (int64_t t = 0; t < count; t++) scores[t] = exponential(scores[t] - most);
  for (int64_t t = 0; t < count; t++) total += scores[t];
  if constexpr (SIZE != 0) {
    float own[SIZE ? SIZE : 1] = {};
    for (int64_t t = 0; t < count; t++)
      for (int64_t i = 0; i < SIZE; i++) own[i] += scores[t] * widened(values[t * SIZE + i]);
    for (int64_t i = 0; i < SIZE; i++) store(own[i] / total, out + i);
  } else {
    for (int64_t t = 0; t < count; t++)
      for (int64_t i = 0; i < size; i++) sums[i] += scores[t] * widened(values[t * size + i]);
    for (int64_t i = 0; i < size; i++) store(sums[i] / total, out + i);
  }
}

template <int64_t SIZE, typename T>
void all_rows(const T* q, const T* keys, const T* values, T* out, const int64_t* positions, int64_t rows,
              int64_t kv_heads, int64_t sharing, int64_t slots, int64_t size, float scale, int64_t threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<float> room(2 * size + slots + LANES);
#pragma omp for
    for (int64_t head = 0; head < rows * kv_heads; head++) {
      const T *own_keys = keys + head * slots * size, *own_values = values + head * slots * size;
      int64_t count = positions[head / kv_heads] + 1;
      for (int64_t i = head * sharing; i < (head + 1) * sharing; i++)
        one_head<SIZE>(q + i * size, own_keys, own_values, out + i * size, count, size, scale, room);
    }
  }
}

template <typename T>
void attend(const void* q, const void* keys, const void* values, void* out, const int64_t* positions, int64_t rows,
            int64_t kv_heads, int64_t sharing, int64_t slots, int64_t size, float scale, int64_t threads) {
  auto chosen = size == 32    ? all_rows<32, T>
                : size == 64  ? all_rows<64, T>
                : size == 128 ? all_rows<128, T>
                              : all_rows<0, T>;
  chosen(static_cast<const T*>(q), static_cast<const T*>(keys), static_cast<const T*>(values), static_cast<T*>(out),
         positions, rows, kv_heads, sharing, slots, size, scale, threads);
}

}  // namespace

// q and out [rows, kv_heads, sharing, size]; keys and values [rows, kv_heads, slots, size]; positions [rows], of the
// newest token of each row, which is stored already.
extern "C" void attend_to_cache(const void* q, const void* keys, const void* values, void* out, const int64_t* positions,
                                int64_t rows, int64_t kv_heads, int64_t sharing, int64_t slots, int64_t size,
                                float scale, int64_t threads, int64_t is_bf16) {
  (is_bf16 ? attend<uint16_t> : attend<float>)(q, keys, values, out, positions, rows, kv_heads, sharing, slots, size,
                                               scale, threads);
}
