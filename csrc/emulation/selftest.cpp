// Self-test of the kernels on the emulator, and of the emulator itself.
//
//   selftest                 all kernels against fp64 references under three schedules, then injected bugs
//   selftest quick           few shapes, one schedule; for builds with sanitizers
//   selftest bugs            the injected bugs only
//   selftest misaligned      must FAIL under UndefinedBehaviorSanitizer: a 16-byte load from an odd address
//   selftest out-of-bounds   must FAIL under AddressSanitizer: a norm weight shorter than the row
#include <array>
#include <cstdio>
#include <cstring>

#include "cases.h"
#include "instances.h"

namespace merge_norm::emulation {
namespace {

const Schedule kSchedules[] = {{Order::forward, 0, {}}, {Order::reverse, 0, {}}, {Order::shuffled, 7, {}}};

int failures = 0, calls = 0;

void report(const std::string& what, const char* problem) {
  std::printf("FAILED %s: %s\n", what.c_str(), problem);
  ++failures;
}

// ---- kernels against the reference -------------------------------------------------------------------------

template <typename S> void test_case(const Case& c, const char* type, bool one_schedule) {
  Operands<S> operands(c, 1);
  for (const Operator op : {Operator::forward, Operator::backward, Operator::transposed}) {
    if (op == Operator::transposed && c.n == 0) continue;
    ++calls;
    try {
      const Bytes first = run(operands, op, kSchedules[0]);
      check(operands, op);
      if (one_schedule) continue;
      for (const Schedule& schedule : {kSchedules[1], kSchedules[2]}) {
        if (run(operands, op, schedule) != first) throw Error("the result depends on the order of the threads");
      }
    } catch (const std::exception& error) {
      report(std::string(kOperatorNames[static_cast<int>(op)]) + " " + type + " " + c.name(), error.what());
    }
  }
}

// Every shape once; R (or a norm), the optional operands and the alignment go through their combinations from shape to
// shape.
std::vector<Case> all_cases(bool quick) {
  std::vector<std::array<int64_t, 3>> shapes;
  for (const int64_t h : {1, 7, 64, 1000, 1024}) {
    for (const int64_t t : {0, 1, 3, 33}) {
      for (const int64_t n : {0, 1, 5, 24}) {
        if (t * h * n <= 200000) shapes.push_back({t, h, n});
      }
    }
  }
  for (const int64_t n : {0, 1, 5, 24}) shapes.push_back({3, 4096, n});
  for (const int64_t n : {0, 1, 5}) shapes.push_back({1, 16384, n});
  for (const int64_t n : {1, 5}) shapes.push_back({1, 8192, n});
  for (const int64_t h : {7, 64, 1024}) shapes.push_back({3, h, 128});
  shapes.push_back({33, 1000, 24});
  shapes.push_back({4101, 8, 2});  // more rows than partial sums
  std::vector<Case> cases;
  std::mt19937 random(3);
  const auto flip = [&] { return random() % 2 == 0; };
  for (const auto& [t, h, n] : shapes) {
    if (quick && (t * h * n > 2000 || random() % 3 != 0)) continue;
    const bool norm = flip();
    const int64_t rows = norm ? 1 : 1 + static_cast<int64_t>(random() % 3);
    Case c = {t, h, n, rows, flip(), flip(), flip(), norm, flip(), random() % 4 == 0};
    cases.push_back(c);
  }
  // The variants that the draw may have missed: every width, aligned and not, one and two rows, all outputs.
  for (const int64_t h : {512, 2560, 8192}) {
    for (const int64_t rows : {1, 2}) {
      for (const bool misaligned : {false, true}) {
        cases.push_back({quick ? 1 : 2, h, 3, rows, true, true, true, rows == 1, misaligned, misaligned});
      }
    }
  }
  return cases;
}

void test_kernels(bool quick) {
  for (const Case& c : all_cases(quick)) {
    test_case<float>(c, "fp32", quick);
    test_case<bf16>(c, "bf16", quick);
    test_case<f16>(c, "fp16", quick);
  }
  std::printf("kernels: %d calls, each under %d schedules\n", calls, quick ? 1 : 3);
}

// The norm of a stored merged is bit-equal to the norm the merge returned, whatever the alignment.
void test_norm_of_stored_merged() {
  for (const int64_t hidden : {64, 1000, 4096}) {
    Operands<bf16> merge({5, hidden, 3, 1, true, true, false, true, true, false}, 5);
    run(merge, Operator::forward, {});
    for (const bool misaligned : {false, true}) {
      Operands<bf16> norm({5, hidden, 0, 1, true, false, false, true, true, misaligned}, 5);
      std::copy_n(merge.merged.data(), norm.residual.size(), norm.residual.data());
      std::copy_n(merge.weight32.data(), hidden, norm.weight32.data());
      run(norm, Operator::forward, {});
      const size_t bytes = norm.normed.size() * sizeof(bf16);
      if (std::memcmp(norm.normed.data(), merge.normed.data(), bytes) != 0) {
        report("norm of a stored merged, h=" + std::to_string(hidden), "differs from the one the merge returned");
      }
    }
  }
}

void test_limits() {
  const auto expect = [](Status actual, Status expected, const char* what) {
    if (actual != expected) report(what, message(actual));
  };
  ForwardArgs wide;
  wide.rows = 1;
  wide.hidden = kMaxHidden + 1;
  wide.residual = &wide;
  expect(launch_forward(wide, nullptr), Status::hidden_too_wide, "h = 16385");
  wide.hidden = 8;
  wide.n_increments = kMaxIncrements + 1;
  expect(launch_forward(wide, nullptr), Status::too_many_increments, "129 increments");
  ForwardArgs normed_rows;
  normed_rows.rows = 1;
  normed_rows.hidden = 8;
  normed_rows.residual = normed_rows.norm_weight.data = &normed_rows;
  normed_rows.coefficient_rows = 2;
  expect(launch_forward(normed_rows, nullptr), Status::norm_of_coefficient_rows, "a norm of two rows");
  float sums[8];
  BackwardArgs normed_gradients;
  normed_gradients.rows = 1;
  normed_gradients.hidden = 8;
  normed_gradients.grad_norm_weight = sums;
  normed_gradients.coefficient_rows = 2;
  expect(launch_backward(normed_gradients, nullptr), Status::norm_of_coefficient_rows, "the norm's gradient of two rows");
  TransposedArgs none;
  none.rows = none.hidden = 1;
  expect(launch_transposed(none, nullptr), Status::nothing_to_merge, "no gradients");
}

// ---- injected bugs -----------------------------------------------------------------------------------------

const Case kNormed = {9, 1000, 5, 1, true, true, true, true, false, false};
const Case kTwoRows = {9, 1000, 5, 2, true, true, true, false, false, false};

// Whether some schedule shows that something is wrong.
bool caught(Operator op, const Case& c, const Faults& faults) {
  Operands<bf16> sound(c, 2);
  const Bytes expected = run(sound, op, {});
  for (Schedule schedule : kSchedules) {
    schedule.faults = faults;
    Operands<bf16> operands(c, 2);
    try {
      if (run(operands, op, schedule) != expected) return true;
    } catch (const Error&) {
      return true;
    }
  }
  return false;
}

void test_faults() {
  int injected = 0;
  const auto inject = [&](Operator op, const Case& c, bool shuffles) {
    const auto expect_caught = [&](const Faults& faults, const std::string& what) {
      ++injected;
      const std::string where = std::string(" in ") + kOperatorNames[static_cast<int>(op)] + " " + c.name();
      if (!caught(op, c, faults)) report(what + where, "was not noticed");
    };
    Operands<bf16> operands(c, 2);
    Machine::instance().most_barriers = 0;
    run(operands, op, {});
    const int barriers = Machine::instance().most_barriers;
    for (int k = 0; k < barriers; ++k) {
      const std::string number = std::to_string(k);
      expect_caught({k, -1, 0}, "barrier " + number + " left out");
      expect_caught({k, 37, 0}, "barrier " + number + " left out by one thread");
    }
    if (shuffles) expect_caught({-1, -1, 0x0000ffffu}, "a shuffle mask of half a warp");
  };
  for (const Operator op : {Operator::forward, Operator::backward, Operator::transposed}) inject(op, kNormed, true);
  inject(Operator::forward, kTwoRows, false);  // without a norm nothing is summed over a row
  inject(Operator::backward, kTwoRows, true);
  std::printf("injected bugs: %d\n", injected);
}

void misaligned_load() {
  Operands<bf16> operands({1, 64, 1, 1, false, false, false, false, false, true}, 1);
  ForwardParams<bf16> params = {};
  params.terms[0] = operands.increments[0].data();
  params.n_terms = 1;
  params.hidden = 64;
  params.rows = 1;
  params.merged = operands.merged.data();
  launch_blocks(forward_kernel<bf16, 8, 1, Access::wide>, 1, row_block(64), 1, nullptr, params);
}

void out_of_bounds_read() {
  Operands<bf16> operands({1, 64, 1, 1, false, false, false, true, false, false}, 1);
  Array<bf16> short_weight(56, false);
  ForwardArgs args = operands.forward_args();
  args.norm_weight.data = short_weight.data();
  launch_forward(args, nullptr);
}

int run_selftest(const char* mode) {
  if (std::strcmp(mode, "misaligned") == 0) {
    misaligned_load();
  } else if (std::strcmp(mode, "out-of-bounds") == 0) {
    out_of_bounds_read();
  } else {
    const bool quick = std::strcmp(mode, "quick") == 0, only_bugs = std::strcmp(mode, "bugs") == 0;
    if (!only_bugs) {
      test_kernels(quick);
      test_norm_of_stored_merged();
      test_limits();
    }
    if (!quick) test_faults();
    std::printf(failures == 0 ? "selftest: ok\n" : "selftest: %d FAILED\n", failures);
  }
  return failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace merge_norm::emulation

int main(int argc, char** argv) { return merge_norm::emulation::run_selftest(argc > 1 ? argv[1] : "all"); }
