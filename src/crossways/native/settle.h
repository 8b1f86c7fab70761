// Matrices that stay, moved to large pages.
#pragma once
#include <chrono>

#include "problem.h"

namespace crossways {

// Move a share of `bytes` at `memory` to large pages; all of it if `whole`.
void settle(const void* memory, size_t bytes, bool whole = false);

// Let settling take some part of `seconds`, which went into computing with what settles.
void allow_settling(double seconds);

// Settles an expert layer's matrices; what is computed while the object lives pays for more of it.
class Settled {
 public:
  explicit Settled(const Problem& p, int half) {
    const size_t one = p.experts * p.width * p.expert_width * (half ? 2 : 4);
    settle(p.up, p.gated ? 2 * one : one);
    settle(p.down, one);
    begin_ = std::chrono::steady_clock::now();
  }
  ~Settled() {
    allow_settling(std::chrono::duration<double>(std::chrono::steady_clock::now() - begin_).count());
  }
  Settled(const Settled&) = delete;
  Settled& operator=(const Settled&) = delete;

 private:
  std::chrono::steady_clock::time_point begin_;
};

}  // namespace crossways
