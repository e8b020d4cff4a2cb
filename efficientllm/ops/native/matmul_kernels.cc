// Kernels of matmul.h for x86: float32 with AVX-512, bfloat16 with AVX-512 BF16 and with AMX tiles.

#include "matmul.h"

#include "instructions.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

static bool cpuid_bit(int leaf, int subleaf, int reg, int bit) {
  unsigned registers[4] = {};
  __get_cpuid_count(leaf, subleaf, &registers[0], &registers[1], &registers[2], &registers[3]);
  return registers[reg] >> bit & 1;
}

static bool has_avx512() { return is_supported(2); }

static bool has_avx512_bf16() {
  static const bool is = has_avx512() && cpuid_bit(7, 1, 0, 5);
  return is;
}

// Linux gives the tiles' state to a process that asks for it.
static bool has_amx() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  static const bool is = has_avx512_bf16() && cpuid_bit(7, 0, 3, 22) && cpuid_bit(7, 0, 3, 24) &&
                         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return is;
}

// Asks for the lines of c before they are needed: a row of a wide c is a page of its own.
inline void fetch(const float* c, int64_t stride, int64_t rows) {
  for (int64_t r = 0; r < rows; r++) {
    _mm_prefetch((const char*)(c + r * stride), _MM_HINT_T0);
    _mm_prefetch((const char*)(c + r * stride + 16), _MM_HINT_T0);
  }
}

BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")
namespace {

#include "avx512.inc"

// Up to 16 floats of an operand.
inline __m512 floats(const Operand& operand, int64_t line, int64_t at, __mmask16 mask) {
  const int64_t index = line * operand.stride + at;
  if (!operand.is_half) return _mm512_maskz_loadu_ps(mask, (const float*)operand.data + index);
  const __m256i half = _mm256_maskz_loadu_epi16(mask, (const uint16_t*)operand.data + index);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// Up to 16 numbers of an operand, rounded to bfloat16.
inline __m256i halves(const Operand& operand, int64_t line, int64_t at, __mmask16 mask) {
  const int64_t index = line * operand.stride + at;
  if (operand.is_half) return _mm256_maskz_loadu_epi16(mask, (const uint16_t*)operand.data + index);
  return (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, (const float*)operand.data + index));
}

// A panel of float32 has kWidth rows of a, or columns of b, at a time: [32 / kWidth][k][kWidth].
template <int kWidth>
void pack_floats(const Operand& operand, const Range& range, char* panels) {
  const int64_t depth = (range.k1 - range.k0 + kPanel - 1) / kPanel * kPanel;
  float* out = (float*)panels;
  for (int64_t item = range.from; item < range.to; item += kPanel, out += kPanel * depth)
    for (int64_t half = 0; half < kPanel; half += 16) {
      const int64_t at = item + half, items = range.to - at;
      for (int64_t k = 0; k < depth; k += 16) {
        const int64_t deep = range.k1 - range.k0 - k;
        __m512i rows[16];
        for (int64_t i = 0; i < 16; i++) {
          const bool exists = i < (operand.lines_are_k ? deep : items);
          const int64_t line = operand.lines_are_k ? range.k0 + k + i : at + i;
          const int64_t start = operand.lines_are_k ? at : range.k0 + k;
          const __mmask16 mask = exists ? first(operand.lines_are_k ? items : deep) : 0;
          rows[i] = mask ? _mm512_castps_si512(floats(operand, line, start, mask)) : _mm512_setzero_si512();
        }
        if (!operand.lines_are_k) transpose(rows);
        for (int64_t i = 0; i < 16; i++) {
          if constexpr (kWidth == 8) {
            float* at = out + half * depth + (k + i) * 8;
            _mm256_storeu_si256((__m256i*)at, _mm512_castsi512_si256(rows[i]));
            _mm256_storeu_si256((__m256i*)(at + 8 * depth), _mm512_extracti64x4_epi64(rows[i], 1));
          } else {
            _mm512_storeu_si512(out + (k + i) * kPanel + half, rows[i]);
          }
        }
      }
    }
}

// A panel of bfloat16 is [k / 32][2] tiles of 16 x 16 words, a word two numbers of neighbouring k. Rows of a tile of a
// are rows of a, those of b pairs of k.
template <bool kRowsAreK>
void pack_halves(const Operand& operand, const Range& range, char* panels) {
  const int64_t depth = (range.k1 - range.k0 + kPanel - 1) / kPanel * kPanel;
  for (int64_t item = range.from; item < range.to; item += kPanel, panels += 2 * kPanel * depth)
    for (int64_t half = 0; half < 2; half++) {
      const int64_t at = item + 16 * half, items = range.to - at;
      for (int64_t k = 0; k < depth; k += 32) {
        const int64_t deep = range.k1 - range.k0 - k;
        __m512i rows[16];
        for (int64_t i = 0; i < 16; i++) {
          __m256i low = _mm256_setzero_si256(), high = low;
          if (operand.lines_are_k) {
            const __mmask16 mask = first(items);
            if (mask && 2 * i < deep) low = halves(operand, range.k0 + k + 2 * i, at, mask);
            if (mask && 2 * i + 1 < deep) high = halves(operand, range.k0 + k + 2 * i + 1, at, mask);
            rows[i] = _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
          } else {
            if (i < items) low = halves(operand, at + i, range.k0 + k, first(deep));
            if (i < items && deep > 16) high = halves(operand, at + i, range.k0 + k + 16, first(deep - 16));
            rows[i] = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
          }
        }
        if (operand.lines_are_k != kRowsAreK) transpose(rows);
        char* tile = panels + (k / 32 * 2 + half) * 1024;
        for (int64_t i = 0; i < 16; i++) _mm512_storeu_si512(tile + 64 * i, rows[i]);
      }
    }
}

// Eight rows of 32 sums, of which `rows` and `columns` exist, to c. Loops are unrolled, or sums go through memory.
inline void store(const __m512 (&sums)[8][2], float* c, int64_t stride, int64_t rows, int64_t columns, bool add) {
  const __mmask16 masks[2] = {first(columns), first(columns - 16)};
#pragma GCC unroll 8
  for (int r = 0; r < 8; r++)
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
      const __mmask16 mask = r < rows ? masks[h] : 0;
      float* at = c + r * stride + 16 * h;
      const __m512 before = _mm512_maskz_loadu_ps(add ? mask : 0, at);
      _mm512_mask_storeu_ps(at, mask, _mm512_add_ps(before, sums[r][h]));
    }
}

void multiply_floats(const Block& block) {
  constexpr int64_t kAhead = 256;
  for (int64_t i = 0; i < block.m; i += 8) {
    const float *a = (const float*)block.a + i * block.k, *b = (const float*)block.b;
    fetch(block.c + i * block.stride, block.stride, std::min<int64_t>(8, block.m - i));
    __m512 sums[8][2] = {};
    for (int64_t k = 0; k < block.k; k++, a += 8, b += kPanel) {
      _mm_prefetch((const char*)(a + kAhead), _MM_HINT_T0);
      const __m512 b0 = _mm512_loadu_ps(b), b1 = _mm512_loadu_ps(b + 16);
#pragma GCC unroll 8
      for (int r = 0; r < 8; r++) {
        const __m512 one = _mm512_set1_ps(a[r]);
        sums[r][0] = _mm512_fmadd_ps(one, b0, sums[r][0]);
        sums[r][1] = _mm512_fmadd_ps(one, b1, sums[r][1]);
      }
    }
    store(sums, block.c + i * block.stride, block.stride, block.m - i, block.n, block.add);
  }
}

void multiply_halves(const Block& block) {
  for (int64_t i = 0; i < block.m; i += 8) {
    const int32_t* a = (const int32_t*)(block.a + 2 * (i / kPanel * kPanel * block.k)) + i % kPanel * 16;
    const char* b = block.b;
    fetch(block.c + i * block.stride, block.stride, std::min<int64_t>(8, block.m - i));
    __m512 sums[8][2] = {};
    for (int64_t k = 0; k < block.k; k += 32, a += 512, b += 2048)
      for (int p = 0; p < 16; p++) {
        const __m512bh b0 = (__m512bh)_mm512_loadu_si512(b + 64 * p);
        const __m512bh b1 = (__m512bh)_mm512_loadu_si512(b + 1024 + 64 * p);
#pragma GCC unroll 8
        for (int r = 0; r < 8; r++) {
          const __m512bh one = (__m512bh)_mm512_set1_epi32(a[16 * r + p]);
          sums[r][0] = _mm512_dpbf16_ps(sums[r][0], one, b0);
          sums[r][1] = _mm512_dpbf16_ps(sums[r][1], one, b1);
        }
      }
    store(sums, block.c + i * block.stride, block.stride, block.m - i, block.n, block.add);
  }
}

}  // namespace
END

BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16,avx2,fma")
namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

void multiply_tiles(const Block& block) {
  static const TileConfig config;
  _tile_loadconfig(&config);
  alignas(64) float edge[kPanel * kPanel];
  for (int64_t i = 0; i < block.m; i += kPanel) {
    const char *a = block.a + 2 * i * block.k, *b = block.b;
    float* c = block.c + i * block.stride;
    const int64_t rows = std::min(kPanel, block.m - i), columns = std::min(kPanel, block.n);
    const bool whole = rows == kPanel && columns == kPanel;
    fetch(c, block.stride, rows);
    float* to = whole ? c : edge;
    const int64_t stride = whole ? block.stride : kPanel, bytes = 4 * stride;
    if (whole && block.add) {
      _tile_loadd(0, to, bytes);
      _tile_loadd(1, to + 16, bytes);
      _tile_loadd(2, to + 16 * stride, bytes);
      _tile_loadd(3, to + 16 * stride + 16, bytes);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t k = 0; k < block.k; k += 32, a += 2048, b += 2048) {
      _tile_loadd(4, a, 64);
      _tile_loadd(6, b, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b + 1024, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, a + 1024, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, to, bytes);
    _tile_stored(1, to + 16, bytes);
    _tile_stored(2, to + 16 * stride, bytes);
    _tile_stored(3, to + 16 * stride + 16, bytes);
    for (int64_t r = 0; !whole && r < rows; r++)
      for (int64_t h = 0; h < columns; h++) c[r * block.stride + h] = edge[r * kPanel + h] + (block.add ? c[r * block.stride + h] : 0);
  }
  _tile_release();
}

}  // namespace
END

static const MatmulKernel kFloats[] = {{"avx512", false, has_avx512, pack_floats<8>, pack_floats<32>, multiply_floats, 512, 256}, {}};
static const MatmulKernel kHalves[] = {
    {"avx512_bf16", true, has_avx512_bf16, pack_halves<false>, pack_halves<true>, multiply_halves, 512, 512},
    {"amx", true, has_amx, pack_halves<false>, pack_halves<true>, multiply_tiles, 512, 512},
    {}};
#else
static const MatmulKernel kFloats[] = {{}};
static const MatmulKernel kHalves[] = {{}};
#endif

const MatmulKernel* matmul_kernels(bool is_half) { return is_half ? kHalves : kFloats; }
