// One query a row over the keys and values of a decode state.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

enum Element { kElementInt8, kElementBfloat16, kElementFloat16, kElementFloat32 };
constexpr int kElementBytes[] = {1, 2, 2, 4};

// y[b, h] = sum over s of softmax(scale * q[b, h] . k[b, s, g])[s] * v[b, s, g], g = h / (heads / kv_heads), over the
// slots that mask[b] allows; 0 where it allows none.
struct Attention {
  Element element;
  int64_t batch, heads, kv_heads, slots, width, value_width;
  float scale;
  const float* q;                    // [batch, heads, width]
  const uint8_t *k, *v, *mask;       // [batch, slots, kv_heads, width], [.., value_width], [batch, slots]
  const float *k_scale, *v_scale;    // [batch, slots, kv_heads], of int8
  std::vector<float> q_planes;       // q * scale, in whole vectors of the widest instruction set
  std::vector<float> parts;          // of each (row, head, unit's slots): the largest score, the sum, values' sum
  float* y;                          // [batch, heads, value_width]

  // A unit is a row's next slots: enough for the work to be more than its sums, few enough to be shared.
  int64_t unit_slots() const { return std::max<int64_t>(64, padded((slots + 63) / 64)); }
  int64_t units_of_row() const { return (slots + unit_slots() - 1) / unit_slots(); }
  int64_t units() const { return batch * units_of_row(); }
  int64_t shared() const { return heads / kv_heads; }  // query heads of a KV head
  static int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }
  float* part(int64_t b, int64_t h, int64_t unit) {
    return parts.data() + ((b * heads + h) * units_of_row() + unit) * (padded(value_width) + 2);
  }

  void prepare() {
    const int64_t wide = padded(width);
    q_planes.assign(batch * heads * wide, 0);
    parts.resize(batch * heads * units_of_row() * (padded(value_width) + 2));
    for (int64_t h = 0; h < batch * heads; h++)
      for (int64_t i = 0; i < width; i++) q_planes[h * wide + i] = q[h * width + i] * scale;
  }
};
