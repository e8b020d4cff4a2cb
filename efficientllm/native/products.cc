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

// x[m, k] and table[16] (or empty); then of each of several products weights[rows, bytes], scale[rows, groups], minimum and
// zero [rows, groups] (or empty), with its y[m, rows] among the results. All weights lie alike, so that x is prepared once.
static ffi::Error products(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> table,
                           ffi::RemainingArgs arrays, ffi::RemainingRets results, int32_t format, int32_t x_bits,
                           std::string_view instructions) {
  static constexpr decltype(&baseline::prepare) prepares[] = PER_INSTRUCTION_SET(prepare);
  static constexpr decltype(&baseline::run) runs[] = PER_INSTRUCTION_SET(run);
  static const float none[16] = {};
  const int set = instruction_set(instructions);
  if (set < 0) return ffi::Error::InvalidArgument("no such instruction set on this machine");
  if (results.size() == 0 || arrays.size() != 4 * results.size())
    return ffi::Error::InvalidArgument("four arrays a product");
  std::vector<Product> all(results.size());
  int64_t rows = 0;
  for (size_t i = 0; i < all.size(); i++) {
    auto weights = arrays.get<ffi::AnyBuffer>(4 * i), scale = arrays.get<ffi::AnyBuffer>(4 * i + 1);
    auto minimum = arrays.get<ffi::Buffer<ffi::F16>>(4 * i + 2);
    auto zero = arrays.get<ffi::Buffer<ffi::U8>>(4 * i + 3);
    auto y = results.get<ffi::Buffer<ffi::F32>>(i);
    if (!weights || !scale || !minimum || !zero || !y) return ffi::Error::InvalidArgument("arrays of another type");
    Product& p = all[i];
    p.format = (Format)format, p.x_bits = x_bits;
    p.m = x.dimensions()[0], p.k = x.dimensions()[1];
    p.rows = weights->dimensions()[0], p.row_bytes = (int64_t)weights->size_bytes() / p.rows;
    p.groups = scale->element_count() ? scale->dimensions()[1] : 1;
    p.group_bytes = p.row_bytes / p.groups;
    p.x = x.typed_data(), p.y = (*y)->typed_data(), p.weights = (const uint8_t*)weights->untyped_data();
    p.scale = scale->untyped_data(), p.scale_is_half = scale->element_type() == ffi::F16;
    p.minimum = minimum->element_count() ? (const uint16_t*)minimum->untyped_data() : nullptr;
    p.zero = zero->element_count() ? zero->typed_data() : nullptr;
    p.table = table.element_count() ? table.typed_data() : none;
    if (p.format == kInt4 && !p.scale_is_half) return ffi::Error::InvalidArgument("int4 has scales of float16");
    if (p.row_bytes != all[0].row_bytes || p.groups != all[0].groups)
      return ffi::Error::InvalidArgument("weights that do not lie alike");
    rows += p.rows;
  }
  const Prepared prepared = prepares[set](all[0]);
  share(pool, rows, rows * all[0].row_bytes * std::max<int64_t>(1, all[0].m / 4), [&](int64_t from, int64_t to) {
    for (const Product& p : all) {
      if (from < std::min(to, p.rows)) runs[set](p, prepared, from, std::min(to, p.rows));
      from = std::max<int64_t>(0, from - p.rows), to -= p.rows;
    }
  });
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(efficientllm_products, products,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int32_t>("format")
                                  .Attr<int32_t>("x_bits")
                                  .Attr<std::string_view>("instructions"));
