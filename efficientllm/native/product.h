// What a product is of, and x in the order in which its weights lie.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

enum Format { kInt4, kInt8, kNf4, kBfloat16, kFloat16 };
constexpr int kPlanes[] = {8, 4, 8, 2, 2};  // weights in a 32-bit word
constexpr int kMostLanes = 16;

// y[m, row] = sum over k of x[m, k] * weight[row, k].
//   int4: q * scale + minimum; or (q - zero) * scale; or, where both are null, (q - 8) * scale
//   int8: q * scale; nf4: table[q] * scale; bfloat16, float16: themselves
// A byte of a group of 4-bit weights holds one of its first half (low bits) and one of its second half (high bits).
struct Product {
  Format format;
  int64_t m, k, rows, row_bytes, groups, group_bytes;  // groups: of a row
  const float* x;
  const uint8_t* weights;
  const void* scale;  // [rows, groups]
  bool scale_is_half;
  const uint16_t* minimum;
  const uint8_t* zero;
  const float* table;  // of 16 values
  float* y;
};

// Rows of x as the kernels read them: [chunk][plane][lane], and the sums of their groups.
struct Prepared {
  int64_t stride, padded_groups;
  std::vector<float> planes, sums;
};

// No infinities, no NaNs; XLA's threads take subnormal floats for zero, so that none may occur on the way.
inline float half_to_float(uint16_t half) {
  const uint32_t sign = (uint32_t)(half & 0x8000) << 16, magnitude = half & 0x7fff;
  const float tiny = (float)(int32_t)magnitude * 0x1p-24f;
  uint32_t bits;
  memcpy(&bits, &tiny, sizeof bits);
  bits = (magnitude < 0x400 ? bits : (magnitude << 13) + 0x38000000u) | sign;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// A plane that is cut out where it lies is this many times too large.
inline float plane_factor(Format format, int plane) {
  if (format == kInt4) return plane == 7 ? 1 : (float)(1 << (4 * plane));
  return format == kInt8 ? 0x1p24f : 1;
}

inline Prepared prepare(const Product& p, int lanes) {
  const int planes = kPlanes[p.format];
  const int64_t chunks = (p.row_bytes + 4 * lanes - 1) / (4 * lanes);
  Prepared out;
  out.stride = chunks * planes * lanes;
  out.padded_groups = (p.groups + kMostLanes) / kMostLanes * kMostLanes;
  out.planes.assign(p.m * out.stride, 0);
  out.sums.assign(p.m * out.padded_groups, 0);
  const bool nibbles = p.format == kInt4 || p.format == kNf4;
  const int64_t group = nibbles ? 2 * p.group_bytes : p.group_bytes;  // weights
  float factor[8];
  for (int i = 0; i < planes; i++) factor[i] = 1 / plane_factor(p.format, i);
  for (int64_t m = 0; m < p.m; m++) {
    const float* x = p.x + m * p.k;
    float* to = out.planes.data() + m * out.stride;
    int64_t first = 0, inside = 0;  // the group's first weight, and the word's first in the group
    for (int64_t word = 0; word < p.row_bytes / 4; word++) {
      float* lane = to + word / lanes * planes * lanes + word % lanes;
      for (int i = 0; i < planes; i++) {
        const int64_t k = nibbles ? first + inside + i / 2 + i % 2 * p.group_bytes : word * planes + i;
        lane[i * lanes] = k < p.k ? x[k] * factor[i] : 0;
      }
      if (nibbles && (inside += 4) == p.group_bytes) inside = 0, first += group;
    }
    if (p.format == kInt4)
      for (int64_t g = 0; g < p.groups; g++) {
        const int64_t stop = (g + 1) * group < p.k ? (g + 1) * group : p.k;
        float total = 0;
        for (int64_t k = g * group; k < stop; k++) total += x[k];
        out.sums[m * out.padded_groups + g] = total;
      }
  }
  return out;
}
