// Large blocks of memory that are used again: fresh pages cost more than what is computed into them.
//
// Gradients and what backward needs come and go in every step. Blocks that came back wait here; no more waits than was
// in use at once. Those that wait long are marked as free, for the kernel to take whenever memory is short. Not at once:
// a block that is marked, only to be written again in the next step, costs two walks through its pages.
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <unordered_map>

namespace {

constexpr size_t HUGE_PAGE = 1 << 21;
constexpr uint64_t PATIENCE = 64;  // how many blocks are given back until one that waits counts as waiting long

class Pool {
 public:
  void* take(size_t bytes) {
    const size_t size = (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    std::lock_guard<std::mutex> lock(mutex_);
    auto found = waiting_.lower_bound(size);
    void* block = nullptr;
    if (found != waiting_.end() && found->first <= size + size / 4) {
      block = found->second.block;
      waits_ -= found->first;
      used_by_[block] = found->first;
      waiting_.erase(found);
    } else if ((block = map(size))) {
      used_by_[block] = size;
    }
    if (block) in_use_ += used_by_[block];
    most_ = std::max(most_, in_use_);
    return block;
  }

  void give(void* block) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = used_by_.find(block);
    if (found == used_by_.end()) return;
    const size_t size = found->second;
    used_by_.erase(found);
    in_use_ -= size;
    waiting_.emplace(size, Waiting{block, given_++});
    waits_ += size;
    while (waits_ + in_use_ > most_) drop_oldest();
    for (auto& [bytes, one] : waiting_)
      if (!one.marked && given_ - one.since > PATIENCE) one.marked = madvise(one.block, bytes, MADV_FREE) == 0;
  }

 private:
  // Aligned to large pages, which the kernel is asked for.
  static void* map(size_t size) {
    auto* memory = static_cast<char*>(
        mmap(nullptr, size + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (memory == MAP_FAILED) return nullptr;
    const size_t before = -reinterpret_cast<uintptr_t>(memory) % HUGE_PAGE;
    if (before) munmap(memory, before);
    munmap(memory + before + size, HUGE_PAGE - before);
    madvise(memory + before, size, MADV_HUGEPAGE);
    return memory + before;
  }

  // What has waited longest: of a batch size, or a model, that may not come again.
  void drop_oldest() {
    const auto oldest = std::min_element(waiting_.begin(), waiting_.end(), [](const auto& a, const auto& b) {
      return a.second.since < b.second.since;
    });
    munmap(oldest->second.block, oldest->first);
    waits_ -= oldest->first;
    waiting_.erase(oldest);
  }

  struct Waiting {
    void* block;
    uint64_t since;  // how many blocks had been given back before
    bool marked = false;
  };

  std::mutex mutex_;
  std::multimap<size_t, Waiting> waiting_;
  std::unordered_map<void*, size_t> used_by_;
  size_t waits_ = 0, in_use_ = 0, most_ = 0;
  uint64_t given_ = 0;
};

// Never destroyed: tensors may outlive everything else at the end of a process.
Pool& pool() {
  static Pool* one = new Pool;
  return *one;
}

}  // namespace

extern "C" {

// At least `bytes` of memory, aligned to 2 MB, of any content; null if there is none.
void* crossways_take_block(int64_t bytes) { return pool().take(bytes); }

// Give back what `crossways_take_block` returned.
void crossways_give_block(void* block) { pool().give(block); }
}
