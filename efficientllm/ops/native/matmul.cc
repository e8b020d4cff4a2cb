// Matrix products of many rows, for XLA's foreign function interface: blocks of packed operands on XLA's threads.

#include "matmul.h"

#include <cstdlib>
#include <cstring>
#include <string>

#include "threads.h"

namespace ffi = xla::ffi;

static const MatmulKernel* kernel_of(bool is_half, std::string_view name) {
  const MatmulKernel* best = nullptr;
  for (const MatmulKernel* kernel = matmul_kernels(is_half); kernel->name; kernel++)
    if (kernel->is_supported() && (name == "best" || name == kernel->name)) best = kernel;
  return best;
}

// The instruction sets of this machine that have kernels, best last, as "avx512_bf16 amx".
extern "C" const char* efficientllm_matmul_instruction_sets(bool is_half) {
  static std::string names[2];
  std::string text;
  for (const MatmulKernel* kernel = matmul_kernels(is_half); kernel->name; kernel++)
    if (kernel->is_supported()) text += (text.empty() ? "" : " ") + std::string(kernel->name);
  return (names[is_half] = text).c_str();
}

// Memory that a thread keeps for its next product: fresh pages cost a fault each.
static char* scratch(int which, int64_t bytes) {
  struct Buffer {
    char* data = nullptr;
    int64_t size = 0;
    ~Buffer() { std::free(data); }
  };
  static thread_local Buffer buffers[3];
  Buffer& buffer = buffers[which];
  if (buffer.size < bytes) {
    std::free(buffer.data);
    buffer.size = (bytes + 4095) / 4096 * 4096;
    buffer.data = (char*)std::aligned_alloc(4096, buffer.size);
  }
  return buffer.data;
}

static int64_t panels(int64_t items) { return (items + kPanel - 1) / kPanel; }

// c[m, n]. Rows of a are packed first, at most kLines with kLines numbers each. A piece of work is a block of rows, whose
// numbers stay in the second cache, times some panels of b, each packed where it is needed: it stays in the first.
static void multiply(ffi::ThreadPool pool, const MatmulKernel& kernel, const Operand& a, const Operand& b, int64_t m,
                     int64_t n, int64_t k, float* c) {
  constexpr int64_t kLines = 2048, kFewRows = 64;
  const int64_t threads = std::max<int64_t>(1, pool.num_threads()), bytes = kernel.bytes();
  for (int64_t k0 = 0; k0 < k; k0 += kLines)
    for (int64_t m0 = 0; m0 < m; m0 += kLines) {
      const int64_t rows = std::min(kLines, m - m0), end = std::min(k, k0 + kLines), height = panels(rows) * kPanel;
      const int64_t slices = (end - k0 + kernel.deep - 1) / kernel.deep;
      char* a_panels = scratch(0, height * panels(end - k0) * kPanel * bytes);
      const auto slice = [&](int64_t s) { return Range{0, 0, k0 + s * kernel.deep, std::min(end, k0 + (s + 1) * kernel.deep)}; };
      share(pool, slices * panels(rows), rows * (end - k0) * bytes, [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; i++) {
          Range range = slice(i / panels(rows));
          const int64_t row = i % panels(rows) * kPanel, depth = panels(range.k1 - range.k0) * kPanel;
          range.from = m0 + row, range.to = std::min(m0 + rows, m0 + row + kPanel);
          kernel.pack_a(a, range, a_panels + ((range.k0 - k0) * height + row * depth) * bytes);
        }
      });
      int64_t block = kernel.rows;  // enough pieces for all threads
      while (block > kFewRows && (rows + block - 1) / block * panels(n) < 4 * threads) block /= 2;
      const int64_t high = (rows + block - 1) / block;
      const int64_t wide = std::clamp<int64_t>((4 * threads + high - 1) / high, 1, panels(n));
      share(pool, high * wide, 2 * rows * n * (end - k0), [&](int64_t from, int64_t to) {
        char* b_panel = scratch(1, kPanel * kernel.deep * bytes);
        for (int64_t i = from; i < to; i++) {
          const int64_t row = i / wide * block, first = panels(n) * (i % wide) / wide, last = panels(n) * (i % wide + 1) / wide;
          for (int64_t s = 0; s < slices; s++)
            for (int64_t column = first * kPanel; column < std::min(n, last * kPanel); column += kPanel) {
              Range range = slice(s);
              const int64_t depth = panels(range.k1 - range.k0) * kPanel;
              range.from = column, range.to = std::min(n, column + kPanel);
              kernel.pack_b(b, range, b_panel);
              kernel.multiply({a_panels + ((range.k0 - k0) * height + row * depth) * bytes, b_panel, depth,
                               std::min(block, rows - row), range.to - column, c + (m0 + row) * n + column, n, range.k0 > 0});
            }
        }
      });
    }
}

// Rounds to bfloat16, to nearest even.
static void round(ffi::ThreadPool pool, const float* from, uint16_t* to, int64_t count) {
  share(pool, (count + 4095) / 4096, 6 * count, [&](int64_t first, int64_t last) {
    for (int64_t i = first * 4096; i < std::min(count, last * 4096); i++) {
      uint32_t bits;
      std::memcpy(&bits, from + i, 4);
      const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
      to[i] = is_nan ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    }
  });
}

// y = a b, where a is [m, k] (transposed: [k, m]) and b is [k, n] (transposed: [n, k]).
static ffi::Error matmul(ffi::ThreadPool pool, ffi::AnyBuffer a, ffi::AnyBuffer b, ffi::Result<ffi::AnyBuffer> y,
                         bool transpose_a, bool transpose_b, bool is_half, std::string_view instructions) {
  const MatmulKernel* kernel = kernel_of(is_half, instructions);
  if (!kernel) return ffi::Error::InvalidArgument("no such instruction set on this machine");
  for (const ffi::DataType type : {a.element_type(), b.element_type(), y->element_type()})
    if (type != ffi::F32 && type != ffi::BF16) return ffi::Error::InvalidArgument("arrays of another type");
  if (a.dimensions().size() != 2 || b.dimensions().size() != 2 || y->dimensions().size() != 2)
    return ffi::Error::InvalidArgument("arrays that are no matrices");
  const int64_t m = a.dimensions()[transpose_a], k = a.dimensions()[!transpose_a], n = b.dimensions()[!transpose_b];
  if (b.dimensions()[transpose_b] != k || y->dimensions()[0] != m || y->dimensions()[1] != n)
    return ffi::Error::InvalidArgument("matrices whose sizes do not fit");
  if (m == 0 || n == 0) return ffi::Error::Success();
  const bool rounds = y->element_type() == ffi::BF16;
  float* c = rounds ? (float*)scratch(2, 4 * m * n) : (float*)y->untyped_data();
  if (k == 0) std::memset(c, 0, 4 * m * n);
  const auto operand = [](const ffi::AnyBuffer& array, bool lines_are_k) {
    return Operand{(const char*)array.untyped_data(), array.dimensions()[1], array.element_type() == ffi::BF16, lines_are_k};
  };
  multiply(pool, *kernel, operand(a, transpose_a), operand(b, !transpose_b), m, n, k, c);
  if (rounds) round(pool, c, (uint16_t*)y->untyped_data(), m * n);
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(efficientllm_matmul, matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<bool>("transpose_a")
                                  .Attr<bool>("transpose_b")
                                  .Attr<bool>("is_half")
                                  .Attr<std::string_view>("instructions"));
