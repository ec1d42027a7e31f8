// Work distribution for the kernels. No torch here: csrc/torch_threads.h provides the threads.
#pragma once

#include <atomic>
#include <cstdint>

namespace slm_fast {

// The host's threads. `run` calls body(context, 0 .. workers-1), possibly concurrently.
struct Threads {
  int workers;
  void (*run)(int workers, void (*body)(void* context, int worker), void* context);

  // Calls work(item) for each item. Threads take runs of consecutive items that shrink towards the end, so uneven items
  // and a busy core cost little. Which thread gets an item never affects results: items are computed independently.
  template <class MakeWork>
  void for_each(int64_t items, bool worth_threads, const MakeWork& make_work) const {
    const int wanted = worth_threads && items > 1 ? static_cast<int>(items < workers ? items : workers) : 1;
    if (wanted == 1) {
      auto work = make_work();
      for (int64_t item = 0; item < items; ++item) work(item);
      return;
    }
    struct Shared {
      const MakeWork& make_work;
      const int64_t items, share;
      std::atomic<int64_t> next{0};
      // Returns the next run's first item; `end` is one past its last.
      int64_t take(int64_t& end) {
        int64_t begin = next.load(std::memory_order_relaxed);
        do end = begin + (items - begin + share - 1) / share;
        while (begin < items && !next.compare_exchange_weak(begin, end));
        return begin;
      }
    } shared{make_work, items, 4 * wanted};
    run(
        wanted,
        [](void* context, int) {
          Shared& s = *static_cast<Shared*>(context);
          int64_t end, begin = s.take(end);
          if (begin >= s.items) return;
          auto work = s.make_work();
          for (; begin < s.items; begin = s.take(end))
            for (int64_t item = begin; item < end; ++item) work(item);
        },
        &shared);
  }
};

}  // namespace slm_fast
