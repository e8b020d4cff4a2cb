// Products by heads, for XLA's foreign function interface.

#include "head_products.h"

#include <string>

#include "instructions.h"
#include "threads.h"

#define KERNELS "head_products.inc"
#include "each_set.inc"

namespace ffi = xla::ffi;

// x[B, H, J], weights[R, H * width], or with `heads_in_rows` [H * width, R] -> y[B, H, I]. Each head has `width` columns
// (rows) of the weights. With `over_rank` J is R, and the outputs are the columns from `offset` on; otherwise I is R, and
// the inputs are those columns.
static ffi::Error head_products(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer weights,
                                ffi::ResultBuffer<ffi::F32> y, int32_t width, int32_t offset, int32_t heads_in_rows,
                                int32_t over_rank, std::string_view instructions) {
  static constexpr decltype(&baseline::head_products) kernels[] = PER_INSTRUCTION_SET(head_products);
  const int set = instruction_set(instructions);
  if (set < 0) return ffi::Error::InvalidArgument("no such instruction set on this machine");
  const auto type = element(weights.element_type());
  if (!type.has_value()) return type.error();
  const auto in = x.dimensions(), out = y->dimensions(), matrix = weights.dimensions();
  const auto fail = [](const char* what) {
    return ffi::Error::InvalidArgument(std::string("efficientllm head products: ") + what);
  };
  if (*type == kElementInt8) return fail("weights that are no floats");
  if (in.size() != 3 || out.size() != 3 || matrix.size() != 2) return fail("operands of other ranks");
  if (in[0] != out[0] || in[1] != out[1]) return fail("rows or heads that differ");
  const int64_t rank = matrix[heads_in_rows ? 1 : 0], columns = matrix[heads_in_rows ? 0 : 1];
  if (columns != in[1] * width) return fail("weights that are no columns of every head");
  const int64_t part = over_rank ? out[2] : in[2];
  if ((over_rank ? in[2] : out[2]) != rank || offset < 0 || offset + part > width) return fail("sizes that do not go");
  const int64_t step = heads_in_rows ? rank : 1;
  const HeadProduct p{*type, bool(over_rank) == bool(heads_in_rows), in[0], in[1], in[2], out[2], matrix[1],
                      offset * step, width * step, x.typed_data(), (const uint8_t*)weights.untyped_data(),
                      y->typed_data()};
  share(pool, p.units(), (int64_t)weights.size_bytes() * part / width,
        [&](int64_t from, int64_t to) { kernels[set](p, from, to); });
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(efficientllm_head_products, head_products,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int32_t>("width")
                                  .Attr<int32_t>("offset")
                                  .Attr<int32_t>("heads_in_rows")
                                  .Attr<int32_t>("over_rank")
                                  .Attr<std::string_view>("instructions"));
