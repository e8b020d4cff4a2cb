// Attention of one query a row over a decode state, for XLA's foreign function interface.

#include "attention.h"

#include <algorithm>
#include <initializer_list>
#include <string>

#include "instructions.h"
#include "threads.h"

#define KERNELS "attention.inc"
#include "each_set.inc"

namespace ffi = xla::ffi;

// The sizes of keys or values as [batch, slots, heads, width]: of one head they may lack the third.
static std::vector<int64_t> sizes(const ffi::AnyBuffer& kept) {
  std::vector<int64_t> all(kept.dimensions().begin(), kept.dimensions().end());
  if (all.size() == 3) all.insert(all.begin() + 2, 1);
  return all;
}

// `scale` [.., kv_heads] of int8, or empty.
static Kept kept(const ffi::AnyBuffer& values, const ffi::Buffer<ffi::F32>& scale) {
  return {values.dimensions().back(), (const uint8_t*)values.untyped_data(), scale.typed_data()};
}

using Sizes = ffi::Span<const int64_t>;

template <class Sizes>
static bool is(const Sizes& sizes, std::initializer_list<int64_t> wanted) {
  return std::equal(sizes.begin(), sizes.end(), wanted.begin(), wanted.end());
}

// What does not fit in an attention; null where all fits. The kernels read as many elements as q, k and v say.
static const char* misfit(Sizes q, const std::vector<int64_t>& k, const std::vector<int64_t>& more,
                          const std::vector<int64_t>& v, Sizes mask, Sizes y, bool is_int8, const Sizes (&scales)[3]) {
  for (const auto* kept : {&k, &more, &v})
    if (kept->size() != 4) return "keys or values that are no [batch, slots, heads, width]";
  const int64_t batch = k[0], slots = k[1], kv_heads = k[2];
  if (!is(more, {batch, slots, kv_heads, more[3]}) || !is(v, {batch, slots, kv_heads, v[3]}))
    return "keys and values of several sizes";
  if (q.size() != 3 || !is(q, {batch, q[1], k[3] + more[3]})) return "queries that are not as wide as the keys";
  if (kv_heads < 1 || q[1] % kv_heads) return "heads that are no multiple of those of the keys";
  if (!is(mask, {batch, slots})) return "a mask that is not one a slot";
  if (!is(y, {batch, q[1], v[3]})) return "a result that is not as large as the values";
  for (const Sizes scale : scales)
    if (is_int8 && !is(scale, {batch, slots, kv_heads})) return "scales that are not one a slot and head";
  return nullptr;
}

// q[B, H, K + L], k[B, S, G, K] (or of one head [B, S, K], as the others), more[B, S, G, L], v[B, S, G, V], their scales [B, S, G] (or empty), mask[B, S]
// -> y[B, H, V]
static ffi::Error attention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::AnyBuffer k, ffi::AnyBuffer more,
                            ffi::AnyBuffer v, ffi::Buffer<ffi::F32> k_scale, ffi::Buffer<ffi::F32> more_scale,
                            ffi::Buffer<ffi::F32> v_scale, ffi::Buffer<ffi::PRED> mask, ffi::ResultBuffer<ffi::F32> y,
                            float scale, std::string_view instructions) {
  static constexpr decltype(&baseline::attend) attends[] = PER_INSTRUCTION_SET(attend);
  static constexpr decltype(&baseline::merge) merges[] = PER_INSTRUCTION_SET(merge);
  const int set = instruction_set(instructions);
  if (set < 0) return ffi::Error::InvalidArgument("no such instruction set on this machine");
  const auto type = element(k.element_type());
  if (!type.has_value()) return type.error();
  if (more.element_type() != k.element_type() || v.element_type() != k.element_type())
    return ffi::Error::InvalidArgument("keys and values of several types");
  const std::vector<int64_t> keys = sizes(k);
  const char* problem = misfit(q.dimensions(), keys, sizes(more), sizes(v), mask.dimensions(), y->dimensions(),
                               *type == kElementInt8,
                               {k_scale.dimensions(), more_scale.dimensions(), v_scale.dimensions()});
  if (problem) return ffi::Error::InvalidArgument(std::string("efficientllm attention: ") + problem);
  std::fill_n(y->typed_data(), y->element_count(), 0.0f);
  if (q.dimensions()[0] == 0 || q.dimensions()[1] == 0 || keys[1] == 0) return ffi::Error::Success();
  Attention a{};
  a.element = *type, a.scale = scale;
  a.batch = q.dimensions()[0], a.heads = q.dimensions()[1];
  a.slots = keys[1], a.kv_heads = keys[2];
  a.k[0] = kept(k, k_scale), a.k[1] = kept(more, more_scale), a.v = kept(v, v_scale);
  a.q = q.typed_data(), a.y = y->typed_data(), a.mask = (const uint8_t*)mask.untyped_data();
  a.prepare();
  share(pool, a.units(), (int64_t)(k.size_bytes() + more.size_bytes() + v.size_bytes()),
        [&](int64_t from, int64_t to) { attends[set](a, from, to); });
  for (int64_t b = 0; b < a.batch; b++)
    for (int64_t h = 0; h < a.heads; h++) merges[set](a, b, h);
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(efficientllm_attention, attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("scale")
                                  .Attr<std::string_view>("instructions"));
