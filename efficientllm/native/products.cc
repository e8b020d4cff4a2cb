// Products of a few rows with compressed weights, for XLA's foreign function interface.

#include "product.h"
#include "threads.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(__clang__)
#define TEXT(x) _Pragma(#x)
#define BEGIN(isa) TEXT(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define END _Pragma("clang attribute pop")
#else
#define TEXT(x) _Pragma(#x)
#define BEGIN(isa) _Pragma("GCC push_options") TEXT(GCC target(isa))
#define END _Pragma("GCC pop_options")
#endif

namespace baseline {  // SSE2 or NEON
#define LANES 4
#include "rows.inc"
#undef LANES
}  // namespace baseline

#if defined(__x86_64__)
BEGIN("avx2,fma,f16c")
namespace avx2 {
#define LANES 8
#include "rows.inc"
#undef LANES
}  // namespace avx2
END
BEGIN("avx512f,avx512bw,avx2,fma,f16c")
namespace avx512 {
#define LANES 16
#include "rows.inc"
#undef LANES
}  // namespace avx512
END
#endif

namespace ffi = xla::ffi;

struct Kernel {
  const char* name;
  Prepared (*prepare)(const Product&);
  void (*run)(const Product&, const Prepared&, int64_t, int64_t);
  bool supported;
};

// Slowest first.
static const std::vector<Kernel>& kernels() {
#if defined(__x86_64__)
  static const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("f16c");
  static const std::vector<Kernel> all = {
      {"baseline", baseline::prepare, baseline::run, true},
      {"avx2", avx2::prepare, avx2::run, fma},
      {"avx512", avx512::prepare, avx512::run, fma && __builtin_cpu_supports("avx512bw")},
  };
#else
  static const std::vector<Kernel> all = {{"baseline", baseline::prepare, baseline::run, true}};
#endif
  return all;
}

static const Kernel* find(std::string_view name) {
  const Kernel* found = nullptr;
  for (const Kernel& kernel : kernels())
    if (kernel.supported && (name == "best" || name == kernel.name)) found = &kernel;
  return found;
}

// The instruction sets this machine has, best last, as "baseline avx2".
extern "C" const char* efficientllm_instruction_sets() {
  static const std::string names = [] {
    std::string text;
    for (const Kernel& kernel : kernels())
      if (kernel.supported) text += (text.empty() ? "" : " ") + std::string(kernel.name);
    return text;
  }();
  return names.c_str();
}

// x[m, k], weights[rows, bytes], scale[rows, groups], minimum and zero [rows, groups] (or empty), table[16] (or empty).
static ffi::Error product(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer weights, ffi::AnyBuffer scale,
                          ffi::Buffer<ffi::F16> minimum, ffi::Buffer<ffi::U8> zero, ffi::Buffer<ffi::F32> table,
                          ffi::ResultBuffer<ffi::F32> y, int32_t format, int32_t x_bits,
                          std::string_view instructions) {
  const Kernel* kernel = find(instructions);
  if (!kernel) return ffi::Error::InvalidArgument("no such instruction set on this machine");
  Product p{};
  p.format = (Format)format, p.x_bits = x_bits;
  p.m = x.dimensions()[0], p.k = x.dimensions()[1];
  p.rows = weights.dimensions()[0], p.row_bytes = (int64_t)weights.size_bytes() / p.rows;
  p.groups = scale.element_count() ? scale.dimensions()[1] : 1;
  p.group_bytes = p.row_bytes / p.groups;
  p.x = x.typed_data(), p.y = y->typed_data(), p.weights = (const uint8_t*)weights.untyped_data();
  p.scale = scale.untyped_data(), p.scale_is_half = scale.element_type() == ffi::F16;
  p.minimum = minimum.element_count() ? (const uint16_t*)minimum.untyped_data() : nullptr;
  p.zero = zero.element_count() ? zero.typed_data() : nullptr;
  static const float none[16] = {};
  p.table = table.element_count() ? table.typed_data() : none;
  const Prepared prepared = kernel->prepare(p);
  share(pool, p.rows, p.rows * p.row_bytes * std::max<int64_t>(1, p.m / 4),
        [&](int64_t from, int64_t to) { kernel->run(p, prepared, from, to); });
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(efficientllm_product, product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F16>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int32_t>("format")
                                  .Attr<int32_t>("x_bits")
                                  .Attr<std::string_view>("instructions"));
