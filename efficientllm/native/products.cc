// Products of a few rows with compressed weights, for XLA's foreign function interface.

#include "instructions.h"
#include "product.h"
#include "threads.h"

#define KERNELS "rows.inc"
#include "each_set.inc"

namespace ffi = xla::ffi;

// The instruction sets this machine has, best last, as "baseline avx2".
extern "C" const char* efficientllm_instruction_sets() {
  static const std::string names = [] {
    std::string text;
    for (const char* name : kInstructionSets)
      if (instruction_set(name) >= 0) text += (text.empty() ? "" : " ") + std::string(name);
    return text;
  }();
  return names.c_str();
}

// x[m, k], weights[rows, bytes], scale[rows, groups], minimum and zero [rows, groups] (or empty), table[16] (or empty).
static ffi::Error product(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer weights, ffi::AnyBuffer scale,
                          ffi::Buffer<ffi::F16> minimum, ffi::Buffer<ffi::U8> zero, ffi::Buffer<ffi::F32> table,
                          ffi::ResultBuffer<ffi::F32> y, int32_t format, int32_t x_bits,
                          std::string_view instructions) {
  static constexpr decltype(&baseline::prepare) prepares[] = PER_INSTRUCTION_SET(prepare);
  static constexpr decltype(&baseline::run) runs[] = PER_INSTRUCTION_SET(run);
  const int set = instruction_set(instructions);
  if (set < 0) return ffi::Error::InvalidArgument("no such instruction set on this machine");
  Product p{};
  p.format = (Format)format, p.x_bits = x_bits;
  p.m = x.dimensions()[0], p.k = x.dimensions()[1];
  p.rows = weights.dimensions()[0], p.row_bytes = (int64_t)weights.size_bytes() / p.rows;
  p.groups = scale.element_count() ? scale.dimensions()[1] : 1;
  p.group_bytes = p.row_bytes / p.groups;
  p.x = x.typed_data(), p.y = y->typed_data(), p.weights = (const uint8_t*)weights.untyped_data();
  p.scale = scale.untyped_data(), p.scale_is_half = scale.element_type() == ffi::F16;
  if (p.format == kInt4 && !p.scale_is_half) return ffi::Error::InvalidArgument("int4 has scales of float16");
  p.minimum = minimum.element_count() ? (const uint16_t*)minimum.untyped_data() : nullptr;
  p.zero = zero.element_count() ? zero.typed_data() : nullptr;
  static const float none[16] = {};
  p.table = table.element_count() ? table.typed_data() : none;
  const Prepared prepared = prepares[set](p);
  share(pool, p.rows, p.rows * p.row_bytes * std::max<int64_t>(1, p.m / 4),
        [&](int64_t from, int64_t to) { runs[set](p, prepared, from, to); });
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
