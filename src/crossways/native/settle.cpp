// Matrices that stay, moved to large pages.
//
// Reading an expert's matrices from pages of 4 KB loses time at every page's end: the processor does not run ahead over
// it, and looking the next one up is slow, above all in virtual machines. Linux can move what lies on small pages to
// large ones, of 2 MB, at the same addresses (MADV_COLLAPSE, from 6.1 on). It copies, so it costs as much as reading
// and writing all of it once; hence a second of it is for free, and beyond that it takes a part of the time that goes
// into computing. Where the kernel cannot, or was told never to, nothing happens.
#include "settle.h"

#include <cstdio>
#include <map>
#include <mutex>

namespace crossways {
namespace {

using Clock = std::chrono::steady_clock;
using Seconds = std::chrono::duration<double>;
constexpr double FREE = 1.0, PART = 0.125;  // seconds; of the time that is spent in computing
constexpr double MOVED = 2e-5;              // seconds: a page that takes longer was not large before
constexpr double PAUSE = 0.25;              // seconds between looks at pages, as even a look waits for the kernel
constexpr int PATIENCE = 4;                 // failures after which some memory is left alone
#ifdef MADV_COLLAPSE
constexpr int COLLAPSE = MADV_COLLAPSE;
#else
constexpr int COLLAPSE = 25;  // C libraries older than the kernel lack its name
#endif

// Whether whoever runs this machine forbids large pages.
bool forbidden() {
  char line[64] = "";
  if (FILE* file = fopen("/sys/kernel/mm/transparent_hugepage/enabled", "r")) {
    if (!fgets(line, sizeof line, file)) line[0] = 0;
    fclose(file);
  }
  return !line[0] || std::strstr(line, "[never]");
}

class Settling {
 public:
  void visit(const void* memory, size_t bytes, bool whole) {
    const uintptr_t begin = round_up(reinterpret_cast<uintptr_t>(memory), HUGE_PAGE);
    const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / HUGE_PAGE * HUGE_PAGE;
    if (end <= begin) return;
    std::lock_guard<std::mutex> lock(mutex_);
    if (forbidden_) return;
    Region& region = regions_[begin];
    if (region.end != end) {
      region = {end, begin, begin, 0, Clock::now()};
      large_pages(reinterpret_cast<void*>(begin), end - begin);  // a kernel without COLLAPSE moves it in its own time
    }
    if (whole) region.next = begin;
    check(begin, region);
    while (region.next < end && region.failures < PATIENCE && (whole || spent_ < allowed_)) {
      const double seconds = collapse(region.next, region);
      if (!whole) spent_ += seconds;
      region.next += HUGE_PAGE;
    }
  }
  void allow(double seconds) {
    std::lock_guard<std::mutex> lock(mutex_);
    allowed_ += PART * seconds;
  }

 private:
  struct Region {
    uintptr_t end, next, checked;  // pages before `next` were moved
    int failures = 0;
    Clock::time_point looked = {};
  };

  // Seconds that it took. Where the kernel refuses, the page stays as it is.
  static double collapse(uintptr_t page, Region& region) {
    const auto begin = Clock::now();
    region.failures += madvise(reinterpret_cast<void*>(page), HUGE_PAGE, COLLAPSE) != 0;
    return Seconds(Clock::now() - begin).count();
  }
  // The memory may have been given back and be another's now: look at another page now and then.
  void check(uintptr_t begin, Region& region) {
    const auto now = Clock::now();
    if (region.next == begin || region.failures >= PATIENCE || now - region.looked < Seconds(PAUSE)) return;
    region.looked = now;
    region.checked = region.checked + HUGE_PAGE < region.next ? region.checked + HUGE_PAGE : begin;
    const double seconds = collapse(region.checked, region);
    if (seconds < MOVED) return;
    spent_ += seconds;
    region.next = begin;
  }

  std::mutex mutex_;
  std::map<uintptr_t, Region> regions_;
  const bool forbidden_ = forbidden();
  double spent_ = 0, allowed_ = FREE;
};

Settling& settling() {
  static Settling* one = new Settling;  // never destroyed: threads may outlive it
  return *one;
}

}  // namespace

void settle(const void* memory, size_t bytes, bool whole) { settling().visit(memory, bytes, whole); }
void allow_settling(double seconds) { settling().allow(seconds); }

}  // namespace crossways

extern "C" {

// Move all of `bytes` at `memory` to large pages now, however long that takes.
void crossways_settle(const void* memory, int64_t bytes) { crossways::settle(memory, bytes, true); }
}
