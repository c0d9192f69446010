// Attention of one new token a row to the keys and values that are stored for the row, on a CPU.
//
// Each row reads its own tokens alone, however long other rows are, and the order of its sums depends on nothing else.
// The tokens of a prompt that several rows begin with are read in one of them, so that they are fetched from memory once.
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

// The scores of the keys `first` to `end` - 1.
template <int64_t SIZE, typename T>
void scores_of(const float* q, const T* keys, int64_t first, int64_t end, int64_t any_size, float* scores) {
  const int64_t size = SIZE ? SIZE : any_size;
  for (int64_t t = first; t < end; t++) {
    float sum = 0;
    for (int64_t i = 0; i < size; i++) sum += q[i] * widened(keys[t * size + i]);
    scores[t] = sum;
  }
}

// The largest of `count` scores, which are filled up to whole lanes with -inf.
float largest_of(float* scores, int64_t count) {
  for (int64_t t = count; t % LANES; t++) scores[t] = -std::numeric_limits<float>::infinity();
  float lanes[LANES], most = scores[0];
  for (float& lane : lanes) lane = most;
  for (int64_t t = 0; t < count; t += LANES)
    for (int64_t i = 0; i < LANES; i++) lanes[i] = scores[t + i] > lanes[i] ? scores[t + i] : lanes[i];
  for (float lane : lanes) most = lane > most ? lane : most;
  return most;
}

// Keys and values of a row: the first `shared` tokens are read in the row that leads it, and the others in its own.
template <typename T>
struct Stored {
  const T *first_keys, *first_values, *keys, *values;
  int64_t shared, count;
};

template <int64_t SIZE, typename T>
void one_head(const T* q, const Stored<T>& stored, T* out, int64_t any_size, float scale, std::vector<float>& room) {
  const int64_t size = SIZE ? SIZE : any_size, shared = stored.shared, count = stored.count;
  float *query = room.data(), *sums = query + size, *scores = sums + size;
  for (int64_t i = 0; i < size; i++) query[i] = widened(q[i]) * scale, sums[i] = 0;
  scores_of<SIZE>(query, stored.first_keys, 0, shared, size, scores);
  scores_of<SIZE>(query, stored.keys, shared, count, size, scores);
  float most = largest_of(scores, count), total = 0;
  for (int64_t t = 0; t < count; t++) scores[t] = exponential(scores[t] - most);
  for (int64_t t = 0; t < count; t++) total += scores[t];
  if constexpr (SIZE != 0) {
    float own[SIZE ? SIZE : 1] = {};
    auto add = [&](const T* values, int64_t first, int64_t end) {
      for (int64_t t = first; t < end; t++)
        for (int64_t i = 0; i < SIZE; i++) own[i] += scores[t] * widened(values[t * SIZE + i]);
    };
    add(stored.first_values, 0, shared);
    add(stored.values, shared, count);
    for (int64_t i = 0; i < SIZE; i++) store(own[i] / total, out + i);
  } else {
    for (int64_t t = 0; t < count; t++) {
      const T* value = (t < shared ? stored.first_values : stored.values) + t * size;
      for (int64_t i = 0; i < size; i++) sums[i] += scores[t] * widened(value[i]);
    }
    for (int64_t i = 0; i < size; i++) store(sums[i] / total, out + i);
  }
}

// See `attend_to_cache`.
struct Rows {
  const int64_t *positions, *order, *leaders, *shared;
  int64_t count, kv_heads, sharing, slots, size;
};

template <int64_t SIZE, typename T>
void all_rows(const T* q, const T* new_keys, const T* new_values, T* keys, T* values, T* out, const Rows& rows,
              float scale, int64_t threads) {
  const int64_t size = rows.size, whole = rows.slots * size;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<float> room(2 * size + rows.slots + LANES);
#pragma omp for
    for (int64_t i = 0; i < rows.kv_heads * rows.count; i++) {
      int64_t row = rows.order[i % rows.count], kv_head = i / rows.count, position = rows.positions[row];
      int64_t head = row * rows.kv_heads + kv_head, leader = rows.leaders[row] * rows.kv_heads + kv_head;
      T *own_keys = keys + head * whole, *own_values = values + head * whole;
      if (new_keys) {
        std::memcpy(own_keys + position * size, new_keys + head * size, size * sizeof(T));
        std::memcpy(own_values + position * size, new_values + head * size, size * sizeof(T));
      }
      int64_t count = position + 1, shared = rows.shared[row] < count ? rows.shared[row] : count;
      Stored<T> stored{keys + leader * whole, values + leader * whole, own_keys, own_values, shared, count};
      for (int64_t n = head * rows.sharing; n < (head + 1) * rows.sharing; n++)
        one_head<SIZE>(q + n * size, stored, out + n * size, size, scale, room);
    }
  }
}

template <typename T>
void attend(const void* q, const void* new_keys, const void* new_values, void* keys, void* values, void* out,
            const Rows& rows, float scale, int64_t threads) {
  auto chosen = rows.size == 32    ? all_rows<32, T>
                : rows.size == 64  ? all_rows<64, T>
                : rows.size == 128 ? all_rows<128, T>
                                   : all_rows<0, T>;
  chosen(static_cast<const T*>(q), static_cast<const T*>(new_keys), static_cast<const T*>(new_values),
         static_cast<T*>(keys), static_cast<T*>(values), static_cast<T*>(out), rows, scale, threads);
}

}  // namespace

// q and out [rows, kv_heads, sharing, size]; keys and values [rows, kv_heads, slots, size]; positions [rows], of the
// newest token of each row. `new_keys` and `new_values` [rows, kv_heads, size] are stored there first; without them
// they are stored already. A row reads its first shared[row] tokens in the row leaders[row], whose tokens are the same;
// `order` has the rows of one leader next to one another, so that what they share is in the processor's cache.
extern "C" void attend_to_cache(const void* q, const void* new_keys, const void* new_values, void* keys, void* values,
                                void* out, const int64_t* positions, const int64_t* order, const int64_t* leaders,
                                const int64_t* shared, int64_t rows, int64_t kv_heads, int64_t sharing, int64_t slots,
                                int64_t size, float scale, int64_t threads, int64_t is_bf16) {
  Rows all{positions, order, leaders, shared, rows, kv_heads, sharing, slots, size};
  (is_bf16 ? attend<uint16_t> : attend<float>)(q, new_keys, new_values, keys, values, out, all, scale, threads);
}
