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

using Sizes = ffi::Span<const int64_t>;

static bool is(Sizes sizes, int64_t rows, int64_t columns) {
  return sizes.size() == 2 && sizes[0] == rows && sizes[1] == columns;
}

static bool is_empty(Sizes sizes) { return std::find(sizes.begin(), sizes.end(), 0) != sizes.end(); }

// Bytes of an element of weights of a format; 0 for elements that are none of it.
static int64_t element_bytes(Format format, ffi::DataType type) {
  switch (format) {
    case kInt4:
    case kNf4: return type == ffi::U8 ? 1 : 0;
    case kInt8: return type == ffi::S8 ? 1 : 0;
    case kBfloat16: return type == ffi::BF16 ? 2 : 0;
    case kFloat16: return type == ffi::F16 ? 2 : 0;
  }
  return 0;
}

// What does not fit in a product whose format, m and k are known; null where all fits, and its sizes are then set. The
// kernels read as many bytes as these sizes say.
static const char* misfit(Product& p, const ffi::AnyBuffer& weights, const ffi::AnyBuffer& scale, Sizes minimum,
                          Sizes zero, size_t table, Sizes y) {
  const int64_t bytes = element_bytes(p.format, weights.element_type());
  if (bytes == 0 || weights.dimensions().size() != 2) return "weights that are no rows of this format";
  p.rows = weights.dimensions()[0], p.row_bytes = weights.dimensions()[1] * bytes;
  if (!is(y, p.m, p.rows)) return "a result that is not as large as the product";
  if (p.row_bytes % 4 || p.k > p.row_bytes * kPlanes[p.format] / 4) return "rows of weights shorter than those of x";
  const bool scaled = p.format != kBfloat16 && p.format != kFloat16;
  if (!scaled) {
    p.groups = 1, p.group_bytes = p.row_bytes;
    return is_empty(scale.dimensions()) && is_empty(minimum) && is_empty(zero) ? nullptr : "scales of floats";
  }
  if (scale.element_type() != (p.format == kInt4 ? ffi::F16 : ffi::F32)) return "scales of another type";
  p.groups = scale.dimensions().size() == 2 ? scale.dimensions()[1] : 0;
  if (p.groups < 1 || !is(scale.dimensions(), p.rows, p.groups)) return "scales that are not one a row and group";
  for (const Sizes beside : {minimum, zero})
    if (!is_empty(beside) && (p.format != kInt4 || !is(beside, p.rows, p.groups)))
      return "minima or zero points that are not one a row and group";
  p.group_bytes = p.row_bytes / p.groups;
  const bool one = p.groups == 1, whole = p.groups * p.group_bytes == p.row_bytes && p.group_bytes % 4 == 0;
  if (!whole || !(one || (p.group_bytes >= 16 && !(p.group_bytes & (p.group_bytes - 1)))))
    return "groups that no kernel has";
  if (p.format == kNf4 && table != 16) return "a table that is not of 16 values";
  if (p.format == kInt4 && p.x_bits != 8 && p.x_bits != 16) return "x rounded to other than 8 or 16 bits";
  return nullptr;
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
  if (x.dimensions().size() != 2) return ffi::Error::InvalidArgument("x that is no rows");
  if (format < kInt4 || format > kFloat16) return ffi::Error::InvalidArgument("no such format");
  std::vector<Product> all(results.size());
  int64_t rows = 0;
  for (size_t i = 0; i < all.size(); i++) {
    auto weights = arrays.get<ffi::AnyBuffer>(4 * i), scale = arrays.get<ffi::AnyBuffer>(4 * i + 1);
    auto minimum = arrays.get<ffi::Buffer<ffi::F16>>(4 * i + 2);  // checks the types of elements too
    auto zero = arrays.get<ffi::Buffer<ffi::U8>>(4 * i + 3);
    auto y = results.get<ffi::Buffer<ffi::F32>>(i);
    if (!weights || !scale || !minimum || !zero || !y) return ffi::Error::InvalidArgument("arrays of another type");
    Product& p = all[i];
    p.format = (Format)format, p.x_bits = x_bits;
    p.m = x.dimensions()[0], p.k = x.dimensions()[1];
    const char* problem = misfit(p, *weights, *scale, minimum->dimensions(), zero->dimensions(),
                                 table.element_count(), (*y)->dimensions());
    if (problem) return ffi::Error::InvalidArgument(std::string("efficientllm products: ") + problem);
    p.x = x.typed_data(), p.y = (*y)->typed_data(), p.weights = (const uint8_t*)weights->untyped_data();
    p.scale = scale->untyped_data(), p.scale_is_half = scale->element_type() == ffi::F16;
    p.minimum = minimum->element_count() ? (const uint16_t*)minimum->untyped_data() : nullptr;
    p.zero = zero->element_count() ? zero->typed_data() : nullptr;
    p.table = table.element_count() ? table.typed_data() : none;
    if (p.row_bytes != all[0].row_bytes || p.groups != all[0].groups)
      return ffi::Error::InvalidArgument("weights that do not lie alike");
    rows += p.rows;
  }
  if (rows == 0 || all[0].m == 0) return ffi::Error::Success();
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
