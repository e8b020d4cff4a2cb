// Types of the numbers in a decode state and in weights.
#pragma once

#include "xla/ffi/api/ffi.h"

enum Element { kElementInt8, kElementBfloat16, kElementFloat16, kElementFloat32 };
constexpr int kElementBytes[] = {1, 2, 2, 4};

inline xla::ffi::ErrorOr<Element> element(xla::ffi::DataType type) {
  namespace ffi = xla::ffi;
  switch (type) {
    case ffi::S8: return kElementInt8;
    case ffi::BF16: return kElementBfloat16;
    case ffi::F16: return kElementFloat16;
    case ffi::F32: return kElementFloat32;
    default: return ffi::Unexpected(ffi::Error::InvalidArgument("no such element of a decode state or of weights"));
  }
}
