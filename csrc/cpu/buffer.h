// Cache-line-aligned scratch memory.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

#include "../poison.h"

namespace slm_fast::SLM_ISA {

template <class X>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count) { at_least(count); }
  // Growing discards the contents.
  void at_least(int64_t count) {
    if (count <= size_) return;
    memory_.reset(static_cast<X*>(::operator new(static_cast<size_t>(count) * sizeof(X), kLine)));
    poison(memory_.get(), count * static_cast<int64_t>(sizeof(X)));
    size_ = count;
  }
  X* data() { return memory_.get(); }
  const X* data() const { return memory_.get(); }
  X& operator[](int64_t i) { return memory_.get()[i]; }
  const X& operator[](int64_t i) const { return memory_.get()[i]; }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(X* memory) const { ::operator delete(memory, kLine); }
  };
  std::unique_ptr<X, Free> memory_;
  int64_t size_ = 0;
};

}  // namespace slm_fast::SLM_ISA
