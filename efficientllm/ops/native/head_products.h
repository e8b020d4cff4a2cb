// Products of a vector of each head with that head's part of one matrix of weights.
#pragma once

#include <algorithm>
#include <cstdint>

#include "element.h"

// y[b, h, i] = sum over j of x[b, h, j] * M[h][i, j]. M[h] begins at element `start(h)` of the weights; a step along the
// axis that does not lie in sequence is `stride` elements.
struct HeadProduct {
  Element element;
  bool inputs_in_sequence;  // j lies in sequence, otherwise i
  int64_t batch, heads, inputs, outputs, stride, first, head_step;
  const float* x;
  const uint8_t* weights;
  float* y;

  static constexpr int64_t kUnit = 64;  // outputs
  int64_t units_of_head() const { return (outputs + kUnit - 1) / kUnit; }
  int64_t units() const { return heads * units_of_head(); }
  const uint8_t* at(int64_t h, int64_t i, int64_t j) const {
    const int64_t element_index = first + h * head_step + (inputs_in_sequence ? i * stride + j : j * stride + i);
    return weights + element_index * kElementBytes[element];
  }
};
