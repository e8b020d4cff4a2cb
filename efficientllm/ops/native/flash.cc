// Attention of whole rows and its gradients, for XLA's foreign function interface: heads of rows on XLA's threads.

#include "flash.h"

#include <initializer_list>
#include <string>
#include <string_view>

#include "instructions.h"
#include "threads.h"

namespace ffi = xla::ffi;

using Sizes = ffi::Span<const int64_t>;
using Ints = ffi::Buffer<ffi::S32>;
using Floats = ffi::Buffer<ffi::F32>;

static bool is(Sizes sizes, std::initializer_list<int64_t> wanted) {
  return std::equal(sizes.begin(), sizes.end(), wanted.begin(), wanted.end());
}

static bool are_heads(std::initializer_list<const ffi::AnyBuffer*> arrays) {
  for (const ffi::AnyBuffer* x : arrays) {
    const bool is_float = x->element_type() == ffi::F32 || x->element_type() == ffi::BF16;
    if (!is_float || x->dimensions().size() != 4) return false;
  }
  return true;
}

// The kernels for an instruction set that this machine has; null without.
static const FlashKernels* kernels_of(std::string_view name) {
  for (const FlashKernels* kernels = flash_kernels(); kernels->instructions; kernels++)
    if (name == kernels->instructions && instruction_set(name) >= 0) return kernels;
  return nullptr;
}

// The instruction sets of this machine that have kernels, best last, as "avx2 avx512".
extern "C" const char* efficientllm_flash_instruction_sets() {
  static std::string names;
  std::string text;
  for (const FlashKernels* kernels = flash_kernels(); kernels->instructions; kernels++)
    if (kernels_of(kernels->instructions)) text += (text.empty() ? "" : " ") + std::string(kernels->instructions);
  return (names = text).c_str();
}

static Heads heads(const ffi::AnyBuffer& x) {
  return {(char*)x.untyped_data(), x.element_type() == ffi::BF16, x.dimensions()[1], x.dimensions()[2], x.dimensions()[3]};
}

// The part of a Flash that both passes have.
static ffi::ErrorOr<Flash> attention(const ffi::AnyBuffer& q, const ffi::AnyBuffer& k, const ffi::AnyBuffer& v,
                                     const ffi::AnyBuffer& y, const Floats& sums, const Ints& query_segments,
                                     const Ints& key_segments, float scale, bool is_causal, int64_t window) {
  const auto no = [](const char* why) { return ffi::Unexpected(ffi::Error::InvalidArgument(std::string("efficientllm flash: ") + why)); };
  if (!are_heads({&q, &k, &v, &y})) return no("arrays that are no [batch, length, heads, width] of float32 or bfloat16");
  const Sizes of_q = q.dimensions(), of_k = k.dimensions(), of_v = v.dimensions();
  const int64_t B = of_q[0], T = of_q[1], H = of_q[2], S = of_k[1], G = of_k[2], V = of_v[3];
  if (!is(of_k, {B, S, G, of_q[3]}) || !is(of_v, {B, S, G, V}) || G < 1 || H % G) return no("keys and values that do not fit");
  if (!is(y.dimensions(), {B, T, H, V}) || !is(sums.dimensions(), {B, H, T})) return no("results that do not fit");
  if ((T != S && (is_causal || window)) || window < 0 || (S == 0 && T > 0)) return no("queries that read no key");
  const bool whole = query_segments.element_count() == 0 && key_segments.element_count() == 0;
  if (!whole && (!is(query_segments.dimensions(), {B, T}) || !is(key_segments.dimensions(), {B, S})))
    return no("segments that are not one a token");
  Flash f{heads(q), heads(k), heads(v), heads(y), sums.typed_data()};
  if (!whole) f.query_segments = query_segments.typed_data(), f.key_segments = key_segments.typed_data();
  f.batch = B, f.window = window, f.is_causal = is_causal, f.scale = scale;
  return f;
}

// As bytes that `share` compares with the cost of waking a thread, taking 16 multiply-adds for one byte read.
static int64_t work(const Flash& f) {
  return f.batch * f.q.heads * f.q.length * f.k.length * (f.k.width + f.v.width) / 16;
}

// q[B, T, H, K], k[B, S, G, K], v[B, S, G, V], segments [B, T] and [B, S] (or empty) -> y[B, T, H, V], sums [B, H, T]
static ffi::Error forward(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, Ints query_segments,
                          Ints key_segments, ffi::Result<ffi::AnyBuffer> y, ffi::Result<Floats> sums, float scale,
                          bool is_causal, int64_t window, std::string_view instructions) {
  const FlashKernels* kernels = kernels_of(instructions);
  if (!kernels) return ffi::Error::InvalidArgument("efficientllm flash: no such instruction set on this machine");
  const auto f = attention(q, k, v, *y, *sums, query_segments, key_segments, scale, is_causal, window);
  if (!f.has_value()) return f.error();
  const int64_t heads = f->batch * f->q.heads, threads = std::max<int64_t>(1, pool.num_threads());
  const int64_t parts = std::max<int64_t>(1, std::min((f->q.length + 255) / 256, 2 * threads / std::max<int64_t>(1, heads)));
  share(pool, heads * parts, work(*f), [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; i++) kernels->forward(*f, i / parts, i % parts, parts);
  });
  return ffi::Error::Success();
}

// The same, with y, sums and dy[B, T, H, V] -> dq[B, T, H, K], dk[B, S, N, K], dv[B, S, N, V]; N is G or H.
static ffi::Error backward(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, Ints query_segments,
                           Ints key_segments, ffi::AnyBuffer y, Floats sums, ffi::AnyBuffer dy, ffi::Result<ffi::AnyBuffer> dq,
                           ffi::Result<ffi::AnyBuffer> dk, ffi::Result<ffi::AnyBuffer> dv, float scale, bool is_causal,
                           int64_t window, std::string_view instructions) {
  const FlashKernels* kernels = kernels_of(instructions);
  if (!kernels) return ffi::Error::InvalidArgument("efficientllm flash: no such instruction set on this machine");
  auto f = attention(q, k, v, y, sums, query_segments, key_segments, scale, is_causal, window);
  if (!f.has_value()) return f.error();
  const int64_t B = f->batch, T = f->q.length, H = f->q.heads, S = f->k.length, K = f->k.width, V = f->v.width;
  const int64_t N = dk->dimensions().size() == 4 ? dk->dimensions()[2] : 0;
  if (!are_heads({&dy, &*dq, &*dk, &*dv}) || !is(dy.dimensions(), {B, T, H, V}) || !is(dq->dimensions(), {B, T, H, K}) ||
      (N != H && N != f->k.heads) || !is(dk->dimensions(), {B, S, N, K}) || !is(dv->dimensions(), {B, S, N, V}))
    return ffi::Error::InvalidArgument("efficientllm flash: gradients that do not fit");
  f->dy = heads(dy), f->dq = heads(*dq), f->dk = heads(*dk), f->dv = heads(*dv);
  share(pool, B * N, 2 * work(*f), [&](int64_t from, int64_t to) {
    for (int64_t unit = from; unit < to; unit++) kernels->backward(*f, unit);
  });
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(efficientllm_flash, forward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<Floats>()
                                  .Attr<float>("scale")
                                  .Attr<bool>("is_causal")
                                  .Attr<int64_t>("window")
                                  .Attr<std::string_view>("instructions"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(efficientllm_flash_gradients, backward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Floats>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("scale")
                                  .Attr<bool>("is_causal")
                                  .Attr<int64_t>("window")
                                  .Attr<std::string_view>("instructions"));
