// Kernels of flash.h for x86, with AVX2 and with AVX-512.

#include "flash.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "instructions.h"

#if defined(__x86_64__) && defined(__linux__)
BEGIN("avx2,fma,f16c")
namespace {
namespace avx2 {
#include "lanes_avx2.inc"
#include "flash_kernels.inc"
}  // namespace avx2
}  // namespace
END
BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
namespace {
namespace avx512 {
#include "lanes_avx512.inc"
#include "flash_kernels.inc"
}  // namespace avx512
}  // namespace
END

const FlashKernels* flash_kernels() {
  static const FlashKernels kernels[] = {
      {"avx2", avx2::forward, avx2::backward}, {"avx512", avx512::forward, avx512::backward}, {}};
  return kernels;
}
#else
const FlashKernels* flash_kernels() {
  static const FlashKernels none[] = {{}};
  return none;
}
#endif
