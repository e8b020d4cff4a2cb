// What a product is of, and x in the order in which its weights lie.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

enum Format { kInt4, kInt8, kNf4, kBfloat16, kFloat16 };
constexpr int kPlanes[] = {8, 4, 8, 2, 2};  // weights in a 32-bit word
constexpr int kMostLanes = 16;

// A row's groups and what fills their last vector.
constexpr int64_t padded(int64_t groups) { return (groups + kMostLanes) / kMostLanes * kMostLanes; }

// y[m, row] = sum over k of x[m, k] * weight[row, k].
//   int4: q * scale + minimum; or (q - zero) * scale; or, where both are null, (q - 8) * scale
//   int8: q * scale; nf4: table[q] * scale; bfloat16, float16: themselves
// A byte of a group of 4-bit weights holds one of its first half (low bits) and one of its second half (high bits).
struct Product {
  Format format;
  int x_bits;  // int4: to how many bits x is rounded, 16 or 8; int8: 16
  int64_t m, k, rows, row_bytes, groups, group_bytes;  // groups: of a row
  const float* x;
  const uint8_t* weights;
  const void* scale;  // [rows, groups]; of int4 halves
  bool scale_is_half;
  const uint16_t* minimum;
  const uint8_t* zero;
  const float* table;  // of 16 values
  float* y;
};

// Rows of x as the kernels read them, [chunk][plane][lane]: floats, or for int4 and int8 integers with a scale a group and
// the sums of the groups; those of int8 are chunks.
struct Prepared {
  int64_t stride, groups;  // of a row
  std::vector<float> planes, sums, scale;
  std::vector<int16_t> codes;  // or of int8_t, two in each
};
