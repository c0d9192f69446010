// Attention of one new token a row to the keys and values that are stored for the row, on a CPU.
//
// Each row reads its own tokens alone, however long other rows are, and the order of its sums depends on nothing else.
// The tokens of a prompt that several rows begin with are read in one of them, so that they are fetched from memory once.
// Elements are fp32 or bf16; scores, weights and sums are fp32. There is nothing of torch in it: it compiles in a second.

#include "elements.h"
#include "exponential.h"
#include "lanes.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

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

// Makes weights of scores, whose sum it returns: softmax without its division.
float weights_of(float* scores, int64_t count) {
  float most = largest_of(scores, count), total = 0;
  for (int64_t t = 0; t < count; t++) scores[t] = exponential(scores[t] - most);
  for (int64_t t = 0; t < count; t++) total += scores[t];
  return total;
}

// Keys and values of a row: the first `shared` tokens are read in the row that leads it, and the others in its own.
template <typename T>
struct Stored {
  const T *first_keys, *first_values, *keys, *values;
  int64_t shared, count, size;

  const T* key(int64_t t) const { return (t < shared ? first_keys : keys) + t * size; }
  const T* value(int64_t t) const { return (t < shared ? first_values : values) + t * size; }
};

// Attention of `HEADS` query heads that share a key-value head, of `CHUNKS` times 16 elements (0: of any such number).
template <int64_t HEADS, int64_t CHUNKS, typename T>
void some_heads(const T* q, const Stored<T>& stored, T* out, float scale, float* room) {
  const int64_t size = stored.size, chunks = CHUNKS ? CHUNKS : size / LANES, count = stored.count;
  const int64_t length = (count + LANES - 1) / LANES * LANES;
  float *queries = room, *scores = room + HEADS * size, total[HEADS];
  for (int64_t i = 0; i < HEADS * size; i++) queries[i] = widened(q[i]) * scale;
  for (int64_t first = 0; first < count; first += LANES) {
    Lanes fours[HEADS][4];
    for (int64_t four = 0; four < 4; four++) {
      const T* keys[4];
      for (int64_t i = 0; i < 4; i++) keys[i] = stored.key(std::min(first + 4 * four + i, count - 1));
      Lanes sums[HEADS][4] = {};
      for (int64_t chunk = 0; chunk < chunks; chunk++)
        for (int64_t i = 0; i < 4; i++) {
          Lanes key = loaded(keys[i] + chunk * LANES);
          for (int64_t n = 0; n < HEADS; n++) sums[n][i] += loaded(queries + n * size + chunk * LANES) * key;
        }
      for (int64_t n = 0; n < HEADS; n++)
        fours[n][four] = sums_of_fours(sums[n][0], sums[n][1], sums[n][2], sums[n][3]);
    }
    for (int64_t n = 0; n < HEADS; n++) {
      Lanes found = sums_of_sixteen(fours[n][0], fours[n][1], fours[n][2], fours[n][3]);
      std::memcpy(scores + n * length + first, &found, sizeof found);
    }
  }
  for (int64_t n = 0; n < HEADS; n++) total[n] = weights_of(scores + n * length, count);
  for (int64_t chunk = 0; chunk < chunks; chunk += 2) {
    const int64_t both = std::min<int64_t>(2, chunks - chunk);
    Lanes even[HEADS][2] = {}, odd[HEADS][2] = {};
    auto add = [&](int64_t t, Lanes (&sums)[HEADS][2]) {
      const T* value = stored.value(t) + chunk * LANES;
      for (int64_t i = 0; i < both; i++) {
        Lanes part = loaded(value + i * LANES);
        for (int64_t n = 0; n < HEADS; n++) sums[n][i] += scores[n * length + t] * part;
      }
    };
    for (int64_t t = 0; t + 1 < count; t += 2) add(t, even), add(t + 1, odd);
    if (count % 2) add(count - 1, even);
    for (int64_t n = 0; n < HEADS; n++)
      for (int64_t i = 0; i < both; i++) {
        Lanes found = (even[n][i] + odd[n][i]) / total[n];
        for (int64_t lane = 0; lane < LANES; lane++) store(found[lane], out + n * size + (chunk + i) * LANES + lane);
      }
  }
}

// Attention of one query head whose number of elements is no multiple of 16.
template <typename T>
void one_head(const T* q, const Stored<T>& stored, T* out, float scale, float* room) {
  const int64_t size = stored.size, count = stored.count;
  float *query = room, *sums = query + size, *scores = sums + size;
  for (int64_t i = 0; i < size; i++) query[i] = widened(q[i]) * scale, sums[i] = 0;
  for (int64_t t = 0; t < count; t++) {
    float sum = 0;
    for (int64_t i = 0; i < size; i++) sum += query[i] * widened(stored.key(t)[i]);
    scores[t] = sum;
  }
  float total = weights_of(scores, count);
  for (int64_t t = 0; t < count; t++)
    for (int64_t i = 0; i < size; i++) sums[i] += scores[t] * widened(stored.value(t)[i]);
  for (int64_t i = 0; i < size; i++) store(sums[i] / total, out + i);
}

// Attention of all query heads, `sharing`, of one key-value head.
template <int64_t CHUNKS, typename T>
void all_heads(const T* q, const Stored<T>& stored, T* out, int64_t sharing, float scale, float* room) {
  const int64_t size = stored.size;
  int64_t n = 0;
  if (size % LANES == 0) {
    for (; n + 1 < sharing; n += 2) some_heads<2, CHUNKS>(q + n * size, stored, out + n * size, scale, room);
    if (n < sharing) some_heads<1, CHUNKS>(q + n * size, stored, out + n * size, scale, room);
    return;
  }
  for (; n < sharing; n++) one_head(q + n * size, stored, out + n * size, scale, room);
}

// See `attend_to_cache`.
struct Rows {
  const int64_t *positions, *order, *leaders, *shared;
  int64_t count, kv_heads, sharing, slots, size;
};

template <int64_t CHUNKS, typename T>
void all_rows(const T* q, const T* new_keys, const T* new_values, T* keys, T* values, T* out, const Rows& rows,
              float scale, int64_t threads) {
  const int64_t size = rows.size, whole = rows.slots * size;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<float> room(2 * (size + rows.slots + LANES));
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
      Stored<T> stored{keys + leader * whole, values + leader * whole, own_keys, own_values, shared, count, size};
      const int64_t first = head * rows.sharing * size;
      all_heads<CHUNKS>(q + first, stored, out + first, rows.sharing, scale, room.data());
    }
  }
}

template <typename T>
void attend(const void* q, const void* new_keys, const void* new_values, void* keys, void* values, void* out,
            const Rows& rows, float scale, int64_t threads) {
  auto chosen = rows.size == 32    ? all_rows<2, T>
                : rows.size == 64  ? all_rows<4, T>
                : rows.size == 128 ? all_rows<8, T>
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
