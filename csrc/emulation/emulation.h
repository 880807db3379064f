// Runs CUDA kernels on the CPU, exactly as written: one fiber per CUDA thread, switched at barriers and shuffles.
//
// What is checked while a kernel runs:
//   * __syncthreads is reached by all threads of the block, at the same place in the source;
//   * a shuffle is reached by all lanes its mask names, with one mask, at one place, and reads lanes of the mask;
//   * shared memory, static and dynamic, holds NaNs until it is written, and has exactly the size asked for, so that
//     AddressSanitizer sees an access beyond it;
//   * threads and blocks run in the order of a Schedule: results that depend on it reveal a missing barrier.
// Not modelled: memory ordering weaker than program order, 32 lanes in lockstep, speed. One grid runs at a time.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"
#include "numbers.h"

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;  // the scheduler sets them before it resumes a fiber

namespace merge_norm::emulation {

enum class Order { forward, reverse, shuffled };

// Faults that a self-test injects to see that it would notice them.
struct Faults {
  int skipped_barrier = -1;      // the n-th __syncthreads of a thread returns at once,
  int skipping_thread = -1;      // for this thread of each block; -1: for all
  uint32_t shuffle_mask = 0;     // replaces the mask of every shuffle; 0: none
};

struct Schedule {
  Order order = Order::forward;
  uint64_t seed = 0;             // of the shuffled order
  Faults faults;
};

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

constexpr int kLanes = 32;

enum class State { ready, at_barrier, at_shuffle, done };

struct Thread {
  Fiber fiber;
  State state = State::ready;
  dim3 index;
  int barriers = 0;              // passed so far
  int line = 0;                  // of the barrier or shuffle waited at, to tell two apart
  uint32_t mask = 0;
  int source_lane = 0;
  float value = 0, received = 0;
};

class Machine {
 public:
  static Machine& instance() {
    static Machine machine;
    return machine;
  }

  Schedule schedule;
  int most_barriers = 0;         // that a thread passed since this was last set to 0

  void run_grid(dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> kernel) {
    const unsigned threads = block.x * block.y * block.z;
    if (threads == 0 || threads > 1024) throw Error("a block of " + std::to_string(threads) + " threads");
    kernel_ = std::move(kernel);
    random_.seed(schedule.seed);
    shared_.reset(new float[(shared_bytes + 3) / 4]);
    shared_bytes_ = shared_bytes;
    while (all_.size() < threads) all_.push_back(std::make_unique<Thread>());
    threads_ = threads;
    order_ = ordered(threads);
    blockDim = block;
    gridDim = grid;
    for (const unsigned b : ordered(grid.x)) {
      blockIdx = dim3(b, 0, 0);
      run_block();
    }
  }

  void barrier(int line) {
    Thread& thread = *current_;
    const Faults& faults = schedule.faults;
    const bool concerned = faults.skipping_thread < 0 || faults.skipping_thread == number(thread);
    const int barrier = thread.barriers++;
    most_barriers = std::max(most_barriers, thread.barriers);
    if (barrier == faults.skipped_barrier && concerned) return;
    thread.state = State::at_barrier;
    thread.line = line;
    current_->fiber.leave();
  }

  float shuffle(uint32_t mask, float value, int source_lane, int line) {
    if (schedule.faults.shuffle_mask != 0) mask = schedule.faults.shuffle_mask;
    Thread& thread = *current_;
    const int lane = number(thread) % kLanes, first = number(thread) - lane;
    if ((mask >> lane & 1) == 0) fail("a shuffle whose mask does not name the lane that calls it");
    if (source_lane < 0 || source_lane >= kLanes || (mask >> source_lane & 1) == 0) {
      fail("a shuffle that reads a lane outside its mask");
    }
    thread.state = State::at_shuffle;
    thread.line = line;
    thread.mask = mask;
    thread.source_lane = source_lane;
    thread.value = value;
    if (!complete_shuffle(first, mask, line)) thread.fiber.leave();
    return thread.received;
  }

  // Static shared memory: one array per declaration, poisoned when a block first touches it.
  float* static_shared(const void* key, size_t count) {
    StaticArray& array = statics_[key];
    if (array.count != count) array = {std::unique_ptr<float[]>(new float[count]), count, 0};
    if (array.block != block_number_) {
      array.block = block_number_;
      poison(array.data.get(), count * sizeof(float));
    }
    return array.data.get();
  }

  float* dynamic_shared() { return shared_.get(); }

 private:
  struct StaticArray {
    std::unique_ptr<float[]> data;
    size_t count = 0;
    uint64_t block = 0;
  };

  static void poison(void* memory, size_t bytes) { std::memset(memory, 0xff, bytes); }  // NaN in every float

  static int number(const Thread& thread) {
    return static_cast<int>((thread.index.z * blockDim.y + thread.index.y) * blockDim.x + thread.index.x);
  }

  std::vector<unsigned> ordered(unsigned count) {
    std::vector<unsigned> order(count);
    std::iota(order.begin(), order.end(), 0u);
    if (schedule.order == Order::reverse) std::reverse(order.begin(), order.end());
    if (schedule.order == Order::shuffled) std::shuffle(order.begin(), order.end(), random_);
    return order;
  }

  void run_block() {
    ++block_number_;
    poison(shared_.get(), shared_bytes_);
    for (unsigned t = 0; t < threads_; ++t) {
      Thread& thread = *all_[t];
      thread.state = State::ready;
      thread.barriers = 0;
      thread.index = dim3(t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y);
    }
    for (;;) {
      if (!run_until_blocked()) {
        abandon("threads wait for each other: of " + std::to_string(threads_) + ", " +
                std::to_string(count(State::at_barrier)) + " are at a barrier, " +
                std::to_string(count(State::at_shuffle)) + " at a shuffle and " +
                std::to_string(count(State::done)) + " have ended");
      }
      if (count(State::done) == threads_) return;
      if (count(State::at_barrier) == threads_) release_barrier();
    }
  }

  // Shuffled: any thread after any other. Else warp by warp, each as far as it gets before the next one starts: the
  // largest distance between warps that barriers allow. Returns whether anything ran.
  bool run_until_blocked() {
    const unsigned group = schedule.order == Order::shuffled ? threads_ : kLanes;
    bool any = false;
    for (unsigned start = 0; start < threads_; start += group) {
      for (bool progress = true; progress;) {
        progress = false;
        if (schedule.order == Order::shuffled) std::shuffle(order_.begin(), order_.end(), random_);
        for (unsigned i = start; i < std::min(start + group, threads_); ++i) {
          Thread& thread = *all_[order_[i]];
          if (thread.state != State::ready) continue;
          any = progress = true;
          resume(thread);
        }
      }
    }
    return any;
  }

  unsigned count(State state) const {
    return static_cast<unsigned>(std::count_if(all_.begin(), all_.begin() + threads_,
                                               [&](const auto& thread) { return thread->state == state; }));
  }

  void release_barrier() {
    for (unsigned t = 0; t < threads_; ++t) {
      if (all_[t]->line != all_[0]->line) abandon("threads wait at different barriers");
      all_[t]->state = State::ready;
    }
  }

  // Exchanges the values once all lanes of the mask are there.
  bool complete_shuffle(int first, uint32_t mask, int line) {
    for (int lane = 0; lane < kLanes; ++lane) {
      if ((mask >> lane & 1) == 0) continue;
      if (first + lane >= static_cast<int>(threads_)) fail("a shuffle whose mask names a lane that does not exist");
      const Thread& other = *all_[first + lane];
      if (other.state != State::at_shuffle) return false;
      if (other.mask != mask || other.line != line) fail("lanes meet in different shuffles");
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      if ((mask >> lane & 1) == 0) continue;
      Thread& other = *all_[first + lane];
      other.received = all_[first + other.source_lane]->value;
      other.state = State::ready;
    }
    return true;
  }

  // Ends the kernel from inside a fiber: the scheduler throws, since an exception cannot leave a fiber's stack.
  void fail(const std::string& what) {
    failure_ = what;
    current_->fiber.leave();
  }

  // From outside the fibers: what they were doing is forgotten.
  void abandon(const std::string& what) {
    for (auto& thread : all_) thread->fiber.forget();
    throw Error(what + " (block " + std::to_string(blockIdx.x) + ")");
  }

  void resume(Thread& thread) {
    current_ = &thread;
    threadIdx = thread.index;
    thread.fiber.enter(&Machine::fiber_main);
    if (!failure_.empty()) {
      abandon(std::exchange(failure_, std::string()) + ", thread " + std::to_string(number(thread)));
    }
  }

  // A fiber serves the thread of the same number in every block.
  static void fiber_main() {
    Machine& machine = instance();
    for (;;) {
      try {
        machine.kernel_();
      } catch (const std::exception& error) {
        machine.failure_ = error.what();
      }
      machine.current_->state = State::done;
      machine.current_->fiber.leave();
    }
  }

  std::function<void()> kernel_;
  std::vector<std::unique_ptr<Thread>> all_;
  std::vector<unsigned> order_;  // of the threads
  unsigned threads_ = 0;         // of the block
  Thread* current_ = nullptr;
  std::string failure_;
  std::unique_ptr<float[]> shared_;
  size_t shared_bytes_ = 0;
  std::map<const void*, StaticArray> statics_;
  uint64_t block_number_ = 0;
  std::mt19937_64 random_;
};

inline void run_grid(dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> kernel) {
  Machine::instance().run_grid(grid, block, shared_bytes, std::move(kernel));
}

inline float* dynamic_shared() { return Machine::instance().dynamic_shared(); }

template <typename T> T* shared_array(const void* key, size_t count) {
  static_assert(sizeof(T) == sizeof(float));
  return reinterpret_cast<T*>(Machine::instance().static_shared(key, count));
}

}  // namespace merge_norm::emulation

inline void __syncthreads(int line = __builtin_LINE()) { merge_norm::emulation::Machine::instance().barrier(line); }

inline float __shfl_xor_sync(uint32_t mask, float value, int lane_mask, int line = __builtin_LINE()) {
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const int lane = static_cast<int>(thread % merge_norm::emulation::kLanes);
  return merge_norm::emulation::Machine::instance().shuffle(mask, value, lane ^ lane_mask, line);
}
