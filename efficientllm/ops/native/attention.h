// One query a row over the keys and values of a decode state.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "element.h"

// Vectors of every slot and KV head, [batch, slots, kv_heads, width], and where they are int8 their scales.
struct Kept {
  int64_t width;
  const uint8_t* values;
  const float* scale;
};

// y[b, h] = sum over s of softmax(scale * q[b, h] . k[b, s, g])[s] * v[b, s, g], g = h / (heads / kv_heads), over the
// slots that mask[b] allows; 0 where it allows none. Keys lie in two parts, of which the second may have no width.
struct Attention {
  Element element;
  int64_t batch, heads, kv_heads, slots;
  float scale;
  Kept k[2], v;
  const float* q;               // [batch, heads, width of both parts of k]
  const uint8_t* mask;          // [batch, slots]
  std::vector<float> q_planes;  // q * scale, each part in whole vectors of the widest instruction set
  std::vector<float> parts;     // of each (row, unit's slots, head): the largest score, the sum, values' sum
  float* y;                     // [batch, heads, width of v]

  // A unit is a row's next slots: enough for the work to be more than its sums, few enough to be shared.
  int64_t unit_slots() const { return std::max<int64_t>(64, padded((slots + 63) / 64)); }
  int64_t units_of_row() const { return (slots + unit_slots() - 1) / unit_slots(); }
  int64_t units() const { return batch * units_of_row(); }
  int64_t shared() const { return heads / kv_heads; }  // query heads of a KV head
  static int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }
  int64_t wide() const { return padded(k[0].width) + padded(k[1].width); }
  int64_t part_stride() const { return padded(v.width) + 2; }  // from one head's to the next's
  float* part(int64_t b, int64_t h, int64_t unit) {
    return parts.data() + ((b * units_of_row() + unit) * heads + h) * part_stride();
  }

  void prepare() {
    q_planes.assign(batch * heads * wide(), 0);
    parts.resize(batch * heads * units_of_row() * part_stride());
    const float* from = q;
    float* to = q_planes.data();
    for (int64_t h = 0; h < batch * heads; h++)
      for (const Kept& part : k) {
        for (int64_t i = 0; i < part.width; i++) to[i] = from[i] * scale;
        from += part.width, to += padded(part.width);
      }
  }
};
