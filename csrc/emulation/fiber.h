// A fiber: a function on a stack of its own, entered and left at will within one operating-system thread.
#pragma once

#undef _FORTIFY_SOURCE  // its longjmp refuses to leave a fiber's stack
#include <setjmp.h>
#include <ucontext.h>

#include <cstddef>
#include <memory>

namespace merge_norm::emulation {

// Started with swapcontext, which makes a system call, then switched with longjmp, which makes none. The address
// sanitizer follows only swapcontext between stacks.
class Fiber {
 public:
  // Runs `main` (which must not return) until it leaves; from the second time on, continues where it left.
  __attribute__((noinline)) void enter(void (*main)()) {
    if (!started_) start(main);
#if defined(__SANITIZE_ADDRESS__)
    started_ = true;
    swapcontext(&outside_, &inside_);
#else
    if (_setjmp(outside_point_) != 0) return;
    if (started_) _longjmp(inside_point_, 1);
    started_ = true;
    setcontext(&inside_);
#endif
  }

  // Called inside the fiber: returns from enter().
  __attribute__((noinline)) void leave() {
#if defined(__SANITIZE_ADDRESS__)
    swapcontext(&inside_, &outside_);
#else
    if (_setjmp(inside_point_) == 0) _longjmp(outside_point_, 1);
#endif
  }

  // The next enter() starts anew; what the fiber had on its stack is forgotten.
  void forget() { started_ = false; }

 private:
  __attribute__((noinline)) void start(void (*main)()) {
    if (!stack_) stack_.reset(new char[kStackBytes]);
    getcontext(&inside_);
    inside_.uc_stack.ss_sp = stack_.get();
    inside_.uc_stack.ss_size = kStackBytes;
    inside_.uc_link = nullptr;
    makecontext(&inside_, main, 0);
  }

  static constexpr size_t kStackBytes = 64 * 1024;  // the address sanitizer clears as much at every switch

  std::unique_ptr<char[]> stack_;
  bool started_ = false;
  ucontext_t inside_, outside_;
  jmp_buf inside_point_, outside_point_;
};

}  // namespace merge_norm::emulation
