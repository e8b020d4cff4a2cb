// Attention of whole rows and its gradients, in blocks of queries whose scores stay in the second cache.
#pragma once

#include <cstdint>

// An array [batch, length, heads, width] of float32 or bfloat16.
struct Heads {
  char* data;
  bool is_half;
  int64_t length, heads, width;
};

// y = softmax(scale q k^T) v. Query head h reads KV head h / (heads of q / heads of k), and the keys of its segment that
// are in order and within the window. Every query reads itself, or all keys.
struct Flash {
  Heads q, k, v, y;
  float* sums;  // [batch, heads, T]: the logarithm to base 2 of each query's sum of exponentials
  Heads dy, dq, dk, dv;  // of the backward pass; dk and dv have the heads of k, or those of q
  const int32_t *query_segments, *key_segments;  // [batch, T], [batch, S]; null where all are one
  int64_t batch, window;  // keys read to each side, the query's own included; 0 reads all
  bool is_causal;
  float scale;
};

// Units of work: a query head of a row is `parts` of the forward pass, which share its queries; a head of dk, with the
// query heads that read it, is one of the backward pass.
struct FlashKernels {
  const char* instructions;  // null ends the list
  void (*forward)(const Flash&, int64_t head, int64_t part, int64_t parts);
  void (*backward)(const Flash&, int64_t unit);
};

const FlashKernels* flash_kernels();  // of this build, slowest first
