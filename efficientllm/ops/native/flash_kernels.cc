// Kernels of flash.h for x86 with AVX-512. Products are float32, and so are exponentials: powers of 2.

#include "flash.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "instructions.h"

#if defined(__x86_64__) && defined(__linux__)
BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
namespace {

#include "avx512.inc"

constexpr int64_t kQueries = 64, kKeys = 128, kPanel = 32;  // of a block; columns of a panel
constexpr float kLog2e = 1.44269504f, kLn2 = 0.69314718f, kMasked = -3e38f;

inline int64_t padded(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

// Memory that a thread keeps for its next unit: fresh pages cost a fault each.
class Scratch {
 public:
  explicit Scratch(int64_t floats) {
    static thread_local struct Buffer {
      float* data = nullptr;
      int64_t size = 0;
      ~Buffer() { std::free(data); }
    } buffer;
    if (buffer.size < floats) {
      std::free(buffer.data);
      buffer.size = padded(floats, 1024);
      buffer.data = (float*)std::aligned_alloc(4096, 4 * buffer.size);
    }
    next_ = buffer.data;
  }
  float* take(int64_t floats) {
    next_ += padded(floats, 16);
    return next_ - padded(floats, 16);
  }

 private:
  float* next_;
};

#include "heads.inc"

// The operands of a product, [m, deep] and [deep, n]: a[i * row + k * step]; b is panels of 32 columns, [k * wide + j].
struct Left { const float* data; int64_t row, step; };
struct Right { const float* data; int64_t wide, panel; };

// A block of c [rows, 16 vectors]. Loops are unrolled, or sums go through memory.
template <int kRows, int kVectors>
inline void tile(const Left& a, const float* b, int64_t wide, int64_t deep, float* c, int64_t stride, bool add) {
  __m512 sums[kRows][kVectors] = {};
  const float* left = a.data;
  for (int64_t k = 0; k < deep; k++, left += a.step, b += wide) {
    __m512 right[kVectors];
#pragma GCC unroll 2
    for (int h = 0; h < kVectors; h++) right[h] = _mm512_loadu_ps(b + 16 * h);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; r++)
#pragma GCC unroll 2
      for (int h = 0; h < kVectors; h++) sums[r][h] = _mm512_fmadd_ps(_mm512_set1_ps(left[r * a.row]), right[h], sums[r][h]);
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; r++)
#pragma GCC unroll 2
    for (int h = 0; h < kVectors; h++) {
      float* at = c + r * stride + 16 * h;
      _mm512_storeu_ps(at, add ? _mm512_add_ps(_mm512_loadu_ps(at), sums[r][h]) : sums[r][h]);
    }
}

// c[m, n] = a b, or added to it; m and n are multiples of 16.
void multiply(int64_t m, int64_t n, int64_t deep, Left a, Right b, float* c, int64_t stride, bool add) {
  const float* data = a.data;
  for (int64_t j = 0; j < n; j += kPanel, b.data += b.panel) {
    if (j + kPanel <= n)
      for (int64_t i = 0; i < m; i += 8) {
        a.data = data + i * a.row;
        tile<8, 2>(a, b.data, b.wide, deep, c + i * stride + j, stride, add);
      }
    else
      for (int64_t i = 0; i < m; i += 16) {
        a.data = data + i * a.row;
        tile<16, 1>(a, b.data, b.wide, deep, c + i * stride + j, stride, add);
      }
  }
}

// 2^x to 2e-7, for x <= 0; 2^-126 where it is less.
inline __m512 power(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-126), x);  // a NaN stays
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), rest = _mm512_sub_ps(x, whole);
  __m512 y = _mm512_set1_ps(1.535336188319500e-4f);
  for (float c : {1.339887440266574e-3f, 9.618437357674640e-3f, 5.550332471162809e-2f, 2.402264791363012e-1f, 6.931472028550421e-1f, 1.0f})
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(c));
  return _mm512_scalef_ps(y, whole);
}

struct Reach { int64_t from, to; };  // keys

inline Reach reach(const Flash& f, int64_t t) {
  const int64_t keys = f.k.length, to = f.is_causal ? t + 1 : f.window ? t + f.window : keys;
  return {f.window ? std::max<int64_t>(0, t - f.window + 1) : 0, std::min(keys, to)};
}

// The keys of queries t0 to t1, whole panels without those at either end that are of other segments.
Reach reach(const Flash& f, int64_t b, int64_t t0, int64_t t1) {
  const int64_t T = f.q.length, S = f.k.length;
  int64_t from = reach(f, t0).from / kPanel * kPanel, to = padded(reach(f, t1 - 1).to, kPanel);
  if (!f.query_segments) return {from, to};
  const auto [least, most] = std::minmax_element(f.query_segments + b * T + t0, f.query_segments + b * T + t1);
  const auto is_other = [&, least = *least, most = *most](int64_t s) {
    const int32_t *keys = f.key_segments + b * S, *end = keys + std::min(S, s + kPanel);
    return std::all_of(keys + s, end, [&](int32_t segment) { return segment < least || segment > most; });
  };
  while (from < to - kPanel && is_other(from)) from += kPanel;
  while (from < to - kPanel && is_other(to - kPanel)) to -= kPanel;
  return {from, to};
}

// Which of 16 keys from s on a query reads.
class Reader {
 public:
  Reader(const Flash& f, int64_t b, int64_t t)
      : reach_(reach(f, t)), keys_(f.key_segments ? f.key_segments + b * f.k.length : nullptr),
        own_(_mm512_set1_epi32(keys_ ? f.query_segments[b * f.q.length + t] : 0)) {}
  __mmask16 operator()(int64_t s) const {
    const __mmask16 mask = first(reach_.to - s) & ~first(reach_.from - s);
    return keys_ ? _mm512_mask_cmpeq_epi32_mask(mask, _mm512_maskz_loadu_epi32(mask, keys_ + s), own_) : mask;
  }

 private:
  Reach reach_;
  const int32_t* keys_;
  __m512i own_;
};

// Scores of a query from key `from` on to powers of 2 relative to the largest -> {the largest, the sum of powers}.
std::pair<float, float> exponentials(const Reader& reads, int64_t from, int64_t count, float* scores) {
  __m512 largest = _mm512_set1_ps(kMasked), sum = _mm512_setzero_ps();
  for (int64_t s = 0; s < count; s += 16) {
    const __m512 masked = _mm512_mask_loadu_ps(_mm512_set1_ps(kMasked), reads(from + s), scores + s);
    _mm512_storeu_ps(scores + s, masked);
    largest = _mm512_max_ps(largest, masked);
  }
  const float most = _mm512_reduce_max_ps(largest);
  for (int64_t s = 0; s < count; s += 16) {
    const __m512 score = _mm512_loadu_ps(scores + s);
    const __mmask16 is_read = _mm512_cmp_ps_mask(score, _mm512_set1_ps(kMasked), _CMP_NEQ_UQ);
    const __m512 y = _mm512_maskz_mov_ps(is_read, power(_mm512_sub_ps(score, _mm512_set1_ps(most))));
    _mm512_storeu_ps(scores + s, y);
    sum = _mm512_add_ps(sum, y);
  }
  return {most, _mm512_reduce_add_ps(sum)};
}

void forward(const Flash& f, int64_t head, int64_t part, int64_t parts) {
  const int64_t b = head / f.q.heads, h = head % f.q.heads, g = h / (f.q.heads / f.k.heads), T = f.q.length;
  const int64_t K = f.k.width, wide_k = padded(K, 16), wide_v = padded(f.v.width, 16), keys = padded(f.k.length, kPanel);
  const int64_t stride = keys + 16;  // no power of 2, whose lines would be in each other's places
  Scratch scratch(keys * (K + wide_v) + kQueries * (wide_k + stride + wide_v) + 64);
  float *k = scratch.take(keys * K), *v = scratch.take(keys * wide_v), *q = scratch.take(kQueries * wide_k);
  float *scores = scratch.take(kQueries * stride), *y = scratch.take(kQueries * wide_v);
  fetch_columns(f.k, b, g, k);
  fetch_rows(f.v, b, g, 0, keys, wide_v, 1, v);
  const int64_t blocks = (T + kQueries - 1) / kQueries;
  for (int64_t t0 = blocks * part / parts * kQueries; t0 < std::min(T, blocks * (part + 1) / parts * kQueries); t0 += kQueries) {
    const int64_t count = std::min(kQueries, T - t0);
    const Reach r = reach(f, b, t0, t0 + count);
    fetch_rows(f.q, b, h, t0, kQueries, wide_k, f.scale * kLog2e, q);
    multiply(padded(count, 16), r.to - r.from, K, {q, wide_k, 1}, {k + r.from * K, kPanel, kPanel * K}, scores, stride, false);
    float factors[kQueries];
    for (int64_t i = 0; i < count; i++) {
      const auto [largest, sum] = exponentials(Reader(f, b, t0 + i), r.from, r.to - r.from, scores + i * stride);
      factors[i] = 1 / sum, f.sums[head * T + t0 + i] = largest + __builtin_log2f(sum);
    }
    multiply(padded(count, 16), wide_v, r.to - r.from, {scores, stride, 1}, {v + r.from * wide_v, wide_v, kPanel}, y, wide_v, false);
    for (int64_t i = 0; i < count; i++) put_rows(f.y, b, h, t0 + i, 1, wide_v, y + i * wide_v, factors[i]);
  }
}

// Scores of a block [queries, kKeys] to weights, and gradients of weights to gradients of scores.
void differentiate(const Flash& f, int64_t b, int64_t t0, int64_t count, int64_t s0, int64_t keys, const float* sums,
                   const float* means, float* weights, float* gradients) {
  for (int64_t i = 0; i < padded(count, 16); i++, weights += kKeys, gradients += kKeys) {
    const Reader reads(f, b, std::min(t0 + i, t0 + count - 1));
    const __m512 sum = _mm512_set1_ps(sums[i]), mean = _mm512_set1_ps(means[i]);
    for (int64_t s = 0; s < keys; s += 16) {
      const __mmask16 mask = i < count ? reads(s0 + s) : 0;
      const __m512 weight = _mm512_maskz_mov_ps(mask, power(_mm512_sub_ps(_mm512_load_ps(weights + s), sum)));
      _mm512_store_ps(weights + s, weight);
      _mm512_store_ps(gradients + s, _mm512_maskz_mul_ps(mask, weight, _mm512_sub_ps(_mm512_load_ps(gradients + s), mean)));
    }
  }
}

// The sum of y dy of each query of a block: the mean of the gradients of its weights.
void sum_products(const Flash& f, int64_t b, int64_t h, int64_t t0, int64_t count, const float* dy, int64_t wide, float* means) {
  for (int64_t i = 0; i < kQueries; i++) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t j = 0; j < wide && i < count; j += 16)
      sum = _mm512_fmadd_ps(load(f.y, index(f.y, b, t0 + i, h) + j, first(f.y.width - j)), _mm512_load_ps(dy + i * wide + j), sum);
    means[i] = _mm512_reduce_add_ps(sum);
  }
}

// Of a head: transposed in panels, keys as rows, and sums of gradients.
struct KeysAndValues { float *k_columns, *v_columns, *k, *dk, *dv; };

// Gradients of queries of a head, and what they add to those of its keys and values.
void backward_of_queries(const Flash& f, int64_t b, int64_t h, const KeysAndValues& x, float* q, float* dq, float* dy, float* weights) {
  const int64_t T = f.q.length, K = f.k.width, V = f.v.width, wide_k = padded(K, 16), wide_v = padded(V, 16);
  float* gradients = weights + kQueries * kKeys;
  for (int64_t t0 = 0; t0 < T; t0 += kQueries) {
    const int64_t count = std::min(kQueries, T - t0), rows = padded(count, 16);
    const Reach r = reach(f, b, t0, t0 + count);
    float means[kQueries], sums[kQueries] = {};
    fetch_rows(f.q, b, h, t0, kQueries, wide_k, f.scale * kLog2e, q);
    fetch_rows(f.dy, b, h, t0, kQueries, wide_v, 1, dy);
    sum_products(f, b, h, t0, count, dy, wide_v, means);
    std::copy_n(f.sums + (b * f.q.heads + h) * T + t0, count, sums);
    for (int64_t s0 = r.from; s0 < r.to; s0 += kKeys) {
      const int64_t n = std::min(kKeys, r.to - s0);
      multiply(rows, n, K, {q, wide_k, 1}, {x.k_columns + s0 * K, kPanel, kPanel * K}, weights, kKeys, false);
      multiply(rows, n, V, {dy, wide_v, 1}, {x.v_columns + s0 * V, kPanel, kPanel * V}, gradients, kKeys, false);
      differentiate(f, b, t0, count, s0, n, sums, means, weights, gradients);
      multiply(n, wide_v, rows, {weights, 1, kKeys}, {dy, wide_v, kPanel}, x.dv + s0 * wide_v, wide_v, true);
      multiply(n, wide_k, rows, {gradients, 1, kKeys}, {q, wide_k, kPanel}, x.dk + s0 * wide_k, wide_k, true);
      multiply(rows, wide_k, n, {gradients, kKeys, 1}, {x.k + s0 * wide_k, wide_k, kPanel}, dq, wide_k, s0 > r.from);
    }
    put_rows(f.dq, b, h, t0, count, wide_k, dq, f.scale);
  }
}

void backward(const Flash& f, int64_t unit) {
  const int64_t b = unit / f.dk.heads, head = unit % f.dk.heads, of_keys = f.q.heads / f.dk.heads, g = head * f.k.heads / f.dk.heads;
  const int64_t K = f.k.width, V = f.v.width, wide_k = padded(K, 16), wide_v = padded(V, 16), keys = padded(f.k.length, kPanel);
  Scratch scratch(keys * (K + V + 2 * wide_k + wide_v) + kQueries * (2 * kKeys + 2 * wide_k + wide_v) + 256);
  const KeysAndValues x{scratch.take(keys * K), scratch.take(keys * V), scratch.take(keys * wide_k), scratch.take(keys * wide_k),
                        scratch.take(keys * wide_v)};
  float *q = scratch.take(kQueries * wide_k), *dq = scratch.take(kQueries * wide_k), *dy = scratch.take(kQueries * wide_v);
  float* weights = scratch.take(2 * kQueries * kKeys);
  fetch_columns(f.k, b, g, x.k_columns);
  fetch_columns(f.v, b, g, x.v_columns);
  fetch_rows(f.k, b, g, 0, keys, wide_k, 1, x.k);
  std::memset(x.dk, 0, 4 * keys * wide_k);
  std::memset(x.dv, 0, 4 * keys * wide_v);
  for (int64_t h = head * of_keys; h < (head + 1) * of_keys; h++) backward_of_queries(f, b, h, x, q, dq, dy, weights);
  put_rows(f.dk, b, head, 0, keys, wide_k, x.dk, kLn2);  // q has the factor log2(e)
  put_rows(f.dv, b, head, 0, keys, wide_v, x.dv, 1);
}

}  // namespace
END

FlashKernels flash_kernels() { return {forward, backward}; }
#else
FlashKernels flash_kernels() { return {}; }
#endif
