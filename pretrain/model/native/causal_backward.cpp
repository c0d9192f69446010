// The backward pass of causal attention in bf16 on a CPU.
//
// Scores are computed again for a block of keys and a block of queries at a time (FlashAttention-2, Dao 2023), with the
// keys as rows: then probabilities and their gradients are already laid out as the products for V and K take them.
// All products are torch's own brgemm: bf16 factors, fp32 sums, on AMX where the processor has it. Its right factor has
// pairs of rows interleaved ("VNNI"), which is also why a block of keys or queries has an even number of rows.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "exponential.h"

namespace {

using bf16 = at::BFloat16;
constexpr int64_t QUERIES = 64, KEYS = 128;  // in a block

int64_t even(int64_t size) { return size + size % 2; }

uint16_t bits_of(float value) {  // rounded to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

float float_of(uint16_t bits) {
  uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

uint32_t pair(uint16_t first, uint16_t second) { return first | static_cast<uint32_t>(second) << 16; }

// [rows, size], `stride` apart, as the right factor of a product over rows: pairs of rows interleaved.
void pairs_of_rows(const uint16_t* from, int64_t stride, int64_t rows, int64_t size, uint32_t* to) {
  for (int64_t row = 0; row < rows; row += 2, to += size) {
    const uint16_t *first = from + row * stride, *second = first + stride;
    if (row + 1 < rows)
      for (int64_t i = 0; i < size; i++) to[i] = pair(first[i], second[i]);
    else
      for (int64_t i = 0; i < size; i++) to[i] = first[i];
  }
}

// The transpose of [rows, size] as the right factor of a product over `size`; columns up to `width` are zeros.
void pairs_of_columns(const uint16_t* from, int64_t stride, int64_t rows, int64_t size, int64_t width, uint32_t* to) {
  for (int64_t row = 0; row < width; row++)
    for (int64_t i = 0; i < size / 2; i++)
      to[i * width + row] = row < rows ? pair(from[row * stride + 2 * i], from[row * stride + 2 * i + 1]) : 0;
}

struct View {  // of one head's tokens in a row
  uint16_t* data;  // bf16
  int64_t stride;
  uint16_t* token(int64_t i) const { return data + i * stride; }
};

View view(const at::Tensor& x_TBND, int64_t start, int64_t row, int64_t head) {
  auto* data = static_cast<uint16_t*>(x_TBND.data_ptr());
  return {data + start * x_TBND.stride(0) + row * x_TBND.stride(1) + head * x_TBND.stride(2), x_TBND.stride(0)};
}

struct Workspace {
  std::vector<float> key_sums, value_sums, query_sums, scores, slopes;
  std::vector<uint16_t> probs, slopes16, keys_across;
  std::vector<uint32_t> slope_pairs, query_columns, grad_columns, query_rows, grad_rows;
  Workspace(int64_t length, int64_t size)
      : key_sums(length * size), value_sums(length * size), query_sums(QUERIES * size), scores(KEYS * QUERIES),
        slopes(KEYS * QUERIES), probs(KEYS * QUERIES), slopes16(KEYS * QUERIES), keys_across(even(length) * size),
        slope_pairs(KEYS * QUERIES / 2), query_columns(QUERIES * size / 2), grad_columns(QUERIES * size / 2),
        query_rows(QUERIES * size / 2), grad_rows(QUERIES * size / 2) {}
};

// C = A B, or C += A B, of sizes [m, k] and [k, n]; rows of A are `stride` apart, and B is laid out in pairs.
void product(
    int64_t m, int64_t n, int64_t k, const uint16_t* a, int64_t stride, const uint32_t* b, float* c, bool adds) {
  at::native::cpublas::brgemm(
      m, n, k, stride, n, n, adds, reinterpret_cast<const bf16*>(a), reinterpret_cast<const bf16*>(b), c);
}

// Probabilities of a block, and the gradients of its scores, from scores and the gradients of probabilities.
void softmax_gradient(
    Workspace& w, int64_t keys, int64_t width, int64_t first_key, int64_t first_query, const float* logsumexp,
    const float* along, float scale) {
  for (int64_t key = 0; key < keys; key++) {
    const float *score = &w.scores[key * width], *slope = &w.slopes[key * width];
    uint16_t *prob_out = &w.probs[key * width], *slope_out = &w.slopes16[key * width];
    auto seen_from = static_cast<int32_t>(first_key + key - first_query);  // queries before it do not see this key
    for (int32_t i = 0; i < static_cast<int32_t>(width); i++) {
      float prob = exponential(score[i] * scale - logsumexp[i]);
      prob = i >= seen_from ? prob : 0.0f;
      prob_out[i] = bits_of(prob);
      slope_out[i] = bits_of(prob * (slope[i] - along[i]) * scale);
    }
  }
  pairs_of_rows(w.slopes16.data(), width, keys, width, w.slope_pairs.data());
}

// All queries of one head over the document; sums for keys and values are added to the workspace's.
void head_backward(
    Workspace& w, View grad, View q, View k, View v, View out, View grad_q, const float* logsumexp, int64_t length,
    int64_t size, float scale) {
  float low[QUERIES], along[QUERIES];
  for (int64_t first = 0; first < length; first += QUERIES) {
    int64_t queries = std::min(QUERIES, length - first), width = even(queries);
    for (int64_t i = 0; i < width; i++) {
      low[i] = i < queries ? logsumexp[first + i] : INFINITY;  // a query that fills up has no probabilities
      const uint16_t *own_grad = grad.token(first + i), *own_out = out.token(first + i);
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t d = 0; d < (i < queries ? size : 0); d++) sum += float_of(own_grad[d]) * float_of(own_out[d]);
      along[i] = sum;
    }
    pairs_of_columns(q.token(first), q.stride, queries, size, width, w.query_columns.data());
    pairs_of_columns(grad.token(first), grad.stride, queries, size, width, w.grad_columns.data());
    pairs_of_rows(q.token(first), q.stride, queries, size, w.query_rows.data());
    pairs_of_rows(grad.token(first), grad.stride, queries, size, w.grad_rows.data());
    for (int64_t key = 0; key < first + queries; key += KEYS) {
      int64_t keys = std::min(KEYS, first + queries - key);
      product(keys, width, size, k.token(key), k.stride, w.query_columns.data(), w.scores.data(), false);
      product(keys, width, size, v.token(key), v.stride, w.grad_columns.data(), w.slopes.data(), false);
      softmax_gradient(w, keys, width, key, first, low, along, scale);
      product(keys, size, width, w.probs.data(), width, w.grad_rows.data(), &w.value_sums[key * size], true);
      product(keys, size, width, w.slopes16.data(), width, w.query_rows.data(), &w.key_sums[key * size], true);
      const uint16_t* across = &w.keys_across[key];
      product(size, width, even(keys), across, even(length), w.slope_pairs.data(), w.query_sums.data(), key > 0);
    }
    for (int64_t d = 0; d < size; d++)
      for (int64_t i = 0; i < queries; i++) grad_q.token(first + i)[d] = bits_of(w.query_sums[d * width + i]);
  }
}

// Gradients of q [T, B, N, D] and of k and v [T, B, K, D] within documents, as columns (first row, end of rows, first
// token, end of tokens) of `blocks`; `logsumexp` [B, N, T] is that of scaled scores.
std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& out,
    const at::Tensor& logsumexp, const at::Tensor& blocks) {
  int64_t rows = q.size(1), kv_heads = k.size(2), sharing = q.size(2) / kv_heads, size = q.size(3);
  TORCH_CHECK(size % 2 == 0 && v.size(3) == size, "head dimensions of q, k and v must be equal and even");
  for (const auto* x : {&grad, &q, &k, &v, &out})
    TORCH_CHECK(x->scalar_type() == at::kBFloat16 && x->stride(3) == 1, "heads must be bf16 and contiguous");
  auto grad_q = at::empty(q.sizes(), q.options()), grad_k = at::empty(k.sizes(), k.options());
  auto grad_v = at::empty(v.sizes(), v.options());
  auto spans = blocks.accessor<int64_t, 2>();
  struct Task { int64_t row, head, start, end; };
  std::vector<Task> tasks;
  int64_t longest = 0;
  for (int64_t i = 0; i < spans.size(0); i++) {
    longest = std::max(longest, spans[i][3] - spans[i][2]);
    for (int64_t row = spans[i][0]; row < spans[i][1]; row++)
      for (int64_t head = 0; head < kv_heads; head++) tasks.push_back({row, head, spans[i][2], spans[i][3]});
  }
  float scale = 1 / std::sqrt(static_cast<float>(size));
  auto sums = logsumexp.accessor<float, 3>();
  at::parallel_for(0, tasks.size(), 1, [&](int64_t begin, int64_t end) {
    Workspace w(longest, size);
    for (int64_t i = begin; i < end; i++) {
      auto [row, head, start, stop] = tasks[i];
      int64_t length = stop - start;
      View own_k = view(k, start, row, head), own_v = view(v, start, row, head);
      for (int64_t i = 0; i < even(length); i++)
        for (int64_t d = 0; d < size; d++)
          w.keys_across[d * even(length) + i] = i < length ? own_k.token(i)[d] : 0;
      std::fill_n(w.key_sums.begin(), length * size, 0.0f);
      std::fill_n(w.value_sums.begin(), length * size, 0.0f);
      for (int64_t query = head * sharing; query < (head + 1) * sharing; query++)
        head_backward(
            w, view(grad, start, row, query), view(q, start, row, query), own_k, own_v, view(out, start, row, query),
            view(grad_q, start, row, query), &sums[row][query][start], length, size, scale);
      View to_k = view(grad_k, start, row, head), to_v = view(grad_v, start, row, head);
      for (int64_t i = 0; i < length; i++)
        for (int64_t d = 0; d < size; d++) {
          to_k.token(i)[d] = bits_of(w.key_sums[i * size + d]);
          to_v.token(i)[d] = bits_of(w.value_sums[i * size + d]);
        }
    }
    at::native::cpublas::brgemm_release();
  });
  return {grad_q, grad_k, grad_v};
}

}  // namespace

TORCH_LIBRARY(trivium_native, library) {
  library.def("causal_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor logsumexp, Tensor blocks)"
              " -> (Tensor, Tensor, Tensor)");
  library.def("is_supported() -> bool", [] { return at::native::cpublas::could_pack(at::kBFloat16); });
}

TORCH_LIBRARY_IMPL(trivium_native, CPU, library) { library.impl("causal_backward", backward); }
