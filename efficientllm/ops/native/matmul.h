// Matrix products c[m, n] = sum over k of a[m, k] b[k, n], and the kernels that multiply blocks of packed operands.
#pragma once

#include <cstdint>
#include <string_view>

// Numbers of an operand: lines of numbers beside each other. A line has all numbers of one k (`lines_are_k`), or of one
// row of a or one column of b.
struct Operand {
  const char* data;
  int64_t stride;  // numbers from a line to the next
  bool is_half;    // bfloat16; float32 otherwise
  bool lines_are_k;
};

// Rows of a or columns of b, `from` to `to`, and the numbers k0 to k1 of each.
struct Range {
  int64_t from, to, k0, k1;
};

// A block of c, at most kPanel columns wide, and its packed operands: k numbers of each row of a and of each column of b.
struct Block {
  const char *a, *b;
  int64_t k, m, n;
  float* c;
  int64_t stride;
  bool add;  // to what c holds
};

// A panel has 32 rows of a or columns of b, zeros where there are fewer, and a multiple of 32 numbers of each.
constexpr int64_t kPanel = 32;

// Kernels of one precision and instruction set.
struct MatmulKernel {
  const char* name;
  bool is_half;  // operands are rounded to bfloat16
  bool (*is_supported)();
  void (*pack_a)(const Operand&, const Range&, char* panels);
  void (*pack_b)(const Operand&, const Range&, char* panels);
  void (*multiply)(const Block&);
  int64_t rows, deep;  // of a block, and numbers of a slice of k: a panel of b fills half of the first cache

  int64_t bytes() const { return is_half ? 2 : 4; }
};

// The kernels of this build for one precision, slowest first; an empty name ends them.
const MatmulKernel* matmul_kernels(bool is_half);
