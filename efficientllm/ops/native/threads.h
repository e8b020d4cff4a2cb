// A loop over rows shared with XLA's threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

// Calls `body(from, to)` for pieces of 0..rows. The caller takes pieces itself until none is left and waits only for
// pieces that others have begun, so that it never waits for a thread that is busy elsewhere; one that comes late finds
// nothing to do. `bytes` is what all rows read: where that is little, waking a thread costs more than it saves.
template <class Body>
void share(xla::ffi::ThreadPool pool, int64_t rows, int64_t bytes, const Body& body) {
  constexpr int64_t kPieceBytes = 32 << 10;
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  const int64_t pieces = std::clamp<int64_t>(bytes / kPieceBytes, 1, std::min(8 * threads, rows));
  if (threads == 1 || pieces == 1) return body(0, rows);
  struct State {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto state = std::make_shared<State>();
  auto work = [state, pieces, rows, &body] {
    for (int64_t i; (i = state->next.fetch_add(1)) < pieces; state->done.fetch_add(1, std::memory_order_release))
      body(rows * i / pieces, rows * (i + 1) / pieces);
  };
  for (int64_t t = 1; t < std::min(threads, pieces); t++) pool.Schedule([work] { work(); });
  work();
  while (state->done.load(std::memory_order_acquire) < pieces) std::this_thread::yield();
}
