// Which instruction sets the code is compiled for, and which of them this machine has.
#pragma once

#include <string>
#include <string_view>

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

// Slowest first.
#if defined(__x86_64__)
constexpr const char* kInstructionSets[] = {"baseline", "avx2", "avx512"};
#define PER_INSTRUCTION_SET(function) {baseline::function, avx2::function, avx512::function}
#else
constexpr const char* kInstructionSets[] = {"baseline"};  // SSE2 or NEON
#define PER_INSTRUCTION_SET(function) {baseline::function}
#endif

inline bool is_supported(int set) {
#if defined(__x86_64__)
  static const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("f16c");
  static const bool wide = fma && __builtin_cpu_supports("avx512bw");
  return set == 0 || (set == 1 ? fma : wide);
#else
  return true;
#endif
}

// The index of the instruction set `name`, or of the last that this machine has for "best"; -1 where it has none.
inline int instruction_set(std::string_view name) {
  int found = -1, index = 0;
  for (const char* set : kInstructionSets) {
    if (is_supported(index) && (name == "best" || name == set)) found = index;
    index++;
  }
  return found;
}
