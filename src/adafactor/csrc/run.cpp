// The whole model in one call: which thread does which strip when, and what is decided between sweep and apply.
//
// Small tensors are done by one thread from sweep to apply, while their gradient is in its cache. Large ones are shared:
// all threads take strips, and where they would wait for each other they take small tensors instead.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

#include "task.h"
#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif
#if defined(__SSE2__)
#include <immintrin.h>
#endif

extern const Kernels baseline;
#if defined(HAVE_X86)
extern const Kernels avx2, avx512;
#endif

namespace {

constexpr int64_t BLOCK = 32;
constexpr int64_t STRIP = 1 << 16;         // elements in a strip, at most, while there is room for its column sums
constexpr int64_t STRIP_ROWS = 256;        // and rows: that many go into a sum in float before it goes on in double
constexpr int64_t PARTIALS = 2 << 20;      // bytes of column sums that strips may leave, beyond FEW_STRIPS
constexpr int64_t FEW_STRIPS = 4;          // strips that a matrix may always have
constexpr int64_t SMALL = 1 << 17;         // elements that one thread does alone in any case
constexpr int64_t SHARE = 4;               // tensors a thread should get at least, before larger ones are shared
constexpr int64_t OWN_SCRATCH = 2 << 20;   // bytes that all threads may need for themselves

enum Phases : int64_t { SWEEP = 1, APPLY = 2, STEP = SWEEP | APPLY };

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Cutting

Job cut(Task& task) {
  Job job = {};
  job.task = &task;
  if (task.factored) {
    job.padded = ceil_div(task.cols, BLOCK) * BLOCK;
    const int64_t bytes = 8 * job.padded * task.matrices;
    const int64_t most = PARTIALS / bytes > FEW_STRIPS ? PARTIALS / bytes : FEW_STRIPS;
    const int64_t strips =
        std::min(most, std::max(ceil_div(task.rows * task.cols, STRIP), ceil_div(task.rows, STRIP_ROWS)));
    job.strip_rows = ceil_div(ceil_div(task.rows, strips), 8) * 8;
    job.strips_each = ceil_div(task.rows, job.strip_rows);
    job.chunks_each = ceil_div(task.cols, CHUNK);
  } else {
    job.strip_rows = STRIP;
    job.strips_each = ceil_div(task.cols, STRIP);
    job.chunks_each = 1;
  }
  job.strips = job.strips_each * task.matrices;
  job.chunks = job.chunks_each * task.matrices;
  return job;
}

// Scratch, in whole cache lines

struct Scratch {
  std::byte* at;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* here = reinterpret_cast<T*>(at + used);
    used += ceil_div(count * (int64_t)sizeof(T), 64) * 64;
    return here;
  }
};

void place_partial(Job& job, Scratch& scratch, bool alone) {
  if (!job.task->factored) return;
  job.partial_stride = alone ? 0 : 2 * job.padded;
  job.partial = scratch.take<float>((alone ? 1 : job.strips) * 2 * job.padded);
  if (alone) job.total = scratch.take<double>(2 * job.padded);
}

void place(Job& job, Scratch& scratch, int64_t phases) {
  Task& task = *job.task;
  job.matrix = scratch.take<Matrix>(task.matrices);
  job.strip = scratch.take<StripSums>(job.strips);
  if (!task.factored) return;
  job.chunk_sq = scratch.take<double>(job.chunks);
  job.b = scratch.take<float>(task.matrices * job.padded);
  if (phases == STEP) {
    job.new_r = scratch.take<float>(task.matrices * task.rows);
    job.new_c = scratch.take<float>(task.matrices * task.cols);
    job.ratio = scratch.take<float>(task.matrices * task.cols);
  } else {  // the plan's sums: grad_sq, row_sum, param_sq if scaled, col_sq, col_ratio
    job.new_r = task.new_r;
    job.new_c = task.sums + (task.param_sq ? 3 : 2) * task.matrices;
    job.ratio = job.new_c + task.matrices * task.cols;
  }
}

int64_t elements(const Task& task) { return task.matrices * task.rows * task.cols; }

int64_t scratch_alone(const Job& job, int64_t phases) {
  Job copy = job;
  Scratch size = {nullptr};
  place_partial(copy, size, true);
  place(copy, size, phases);
  return size.used;
}

// Of the weights, at places spread evenly over them: whoever changes all of them changes it.
uint32_t fingerprint(const Task& task) {
  constexpr int64_t PLACES = 16, WORDS = 8;
  const auto mix = [](uint64_t word) {
    word *= 0x9E3779B97F4A7C15u;
    return word ^ word >> 29;
  };
  const int64_t bytes = elements(task) * (task.p_format == FLOAT32 ? 4 : 2);
  const int64_t each = std::min<int64_t>(bytes, WORDS * 8), last = bytes - each;
  uint64_t lane[WORDS] = {};
  for (int64_t k = 0; k < PLACES; ++k) {
    uint64_t word[WORDS] = {};
    memcpy(word, static_cast<const char*>(task.p) + last * k / (PLACES - 1), each);
    for (int i = 0; i < WORDS; ++i) lane[i] = mix(lane[i] ^ word[i]);
  }
  uint64_t all = 0;
  for (uint64_t one : lane) all = mix(all ^ one);
  return (uint32_t)(all >> 32);
}

// The schedule: _schedule.py

void schedule(Job& job) {
  Task& task = *job.task;
  if (task.param_sq) {  // tensors that autograd did not see change may have changed nevertheless
    const uint32_t seen = fingerprint(task);
    task.known = task.known && memcmp(&seen, task.param_sq + task.matrices, sizeof seen) == 0;
    memcpy(task.param_sq + task.matrices, &seen, sizeof seen);
    for (int64_t k = 0; k < task.matrices && task.known; ++k)
      if (!std::isfinite(task.param_sq[k])) task.known = 0;  // or one NaN, put right since, would stop it for good
  }
  const double t = (double)*task.step + 1;
  if (!std::isnan(task.beta2)) {
    job.beta2 = task.beta2 * (1 - std::pow(task.beta2, t - 1)) / (1 - std::pow(task.beta2, t));
  } else {
    job.beta2 = 1 - std::pow(t, task.decay_rate);
    if (job.beta2 > task.beta2_cap) job.beta2 = task.beta2_cap;
  }
  job.rho = task.lr;
  if (task.relative_step) {
    const double cap = std::isnan(task.lr) ? 1e-2 : task.lr;
    job.rho = std::fmin(std::pow(t, -0.5), cap);
    if (task.warmup_init) job.rho = std::fmin(1e-6 * t, job.rho);
  }
}

// Between sweep and apply

// The sums of all strips, in their order.
void add_up(Job& job) {
  const Task& task = *job.task;
  for (int64_t k = 0; k < task.matrices; ++k) {
    StripSums sum = {};
    for (int64_t s = k * job.strips_each; s < (k + 1) * job.strips_each; ++s) {
      sum.grad_sq += job.strip[s].grad_sq;
      sum.row_sum += job.strip[s].row_sum;
      sum.update_sq += job.strip[s].update_sq;
      sum.param_sq += job.strip[s].param_sq;
    }
    if (task.param_sq && !task.known) task.param_sq[k] = (float)sum.param_sq;
    const float param_sq = task.param_sq ? task.param_sq[k] : 0;
    job.matrix[k] = {(float)sum.grad_sq, (float)sum.row_sum, (float)sum.update_sq, param_sq};
  }
}

void put_sums(const Job& job) {
  const Task& task = *job.task;
  const int64_t n = task.matrices;
  for (int64_t k = 0; k < n; ++k) {
    const Matrix& matrix = job.matrix[k];
    task.sums[k] = matrix.grad_sq;
    task.sums[n + k] = task.factored ? matrix.row_sum : matrix.update_sq;
    if (task.param_sq) task.sums[2 * n + k] = matrix.param_sq;
  }
}

void get_sums(Job& job) {
  const Task& task = *job.task;
  const int64_t n = task.matrices;
  for (int64_t k = 0; k < n; ++k) {
    const float second = task.sums[n + k], param_sq = task.param_sq ? task.sums[2 * n + k] : 0;
    job.matrix[k] = {task.sums[k], second, second, param_sq};
  }
}

// RMS(U), the step size, and whether the step is taken at all.
void settle(Job& job) {
  const Task& task = *job.task;
  const double n = (double)task.whole_rows, m = (double)task.whole_cols, rho = job.rho;
  double shared_U2 = 0, shared_p2 = 0;
  std::vector<double> mean_U2(task.matrices), mean_p2(task.matrices);
  for (int64_t k = 0; k < task.matrices; ++k) {
    Matrix& matrix = job.matrix[k];
    double update_sq = matrix.update_sq;
    if (task.factored) {
      update_sq = 0;
      for (int64_t c = k * job.chunks_each; c < (k + 1) * job.chunks_each; ++c) update_sq += job.chunk_sq[c];
      matrix.root_mean_row = std::sqrt(matrix.row_sum / n);
      update_sq *= matrix.row_sum / n;
    }
    mean_U2[k] = update_sq / (n * m);
    mean_p2[k] = matrix.param_sq / (n * m);
    shared_U2 += mean_U2[k] / task.matrices;
    shared_p2 += mean_p2[k] / task.matrices;
  }
  job.ok = true;
  double clipped = 0;
  std::vector<float> rms(task.matrices), steps(task.matrices);
  for (int64_t k = 0; k < task.matrices; ++k) {
    Matrix& matrix = job.matrix[k];
    const double rms_U = std::sqrt(task.shared_rms ? shared_U2 : mean_U2[k]);
    const double rms_p = std::sqrt(task.shared_rms ? shared_p2 : mean_p2[k]);
    const double clip = rms_U > task.clip_threshold ? rms_U / task.clip_threshold : 1;  // NaN: never
    const double alpha = task.param_sq ? rho * (rms_p > task.eps2 ? rms_p : task.eps2) : rho;
    job.ok = job.ok && std::isfinite(matrix.grad_sq + (float)rms_U + (float)alpha) && std::isfinite(rms_p);
    clipped += clip > 1;
    rms[k] = (float)rms_U;
    steps[k] = (float)alpha;
    const bool averages_U = task.m && !task.scaled_momentum;
    matrix.scale = (float)((task.maximize ? -1 : 1) / clip * (averages_U ? 1 : alpha));
    matrix.after = averages_U ? (float)alpha : 1;
    const double lr = std::isnan(task.lr) ? rho : task.lr;
    const double factors[] = {lr, alpha, 1, rho * rho};
    matrix.shrink = (float)(task.weight_decay * factors[task.decay]);
    // Half a spacing of float32 at the largest bfloat16 is 2^103; decay alone never takes a weight beyond itself.
    matrix.tame = alpha * rms_U * std::sqrt(n * m * task.matrices) < 0x1p100 && matrix.shrink <= 1;
  }
  job.moves = job.ok && rho != 0;
  if (job.ok) {
    memcpy(task.report + 3, rms.data(), rms.size() * sizeof(float));
    memcpy(task.report + 3 + task.matrices, steps.data(), steps.size() * sizeof(float));
    task.report[0] += 1;
    task.report[1] += (float)(clipped / task.matrices);
  } else {
    task.report[2] += 1;
  }
}

// After the last strip: what belongs to the tensor as a whole is committed.
void finish(Job& job) {
  Task& task = *job.task;
  if (!job.ok) return;
  *task.step += 1;
  if (task.factored) memcpy(task.c, job.new_c, task.matrices * task.cols * sizeof(float));
  if (!task.param_sq) return;
  for (int64_t k = 0; k < task.matrices; ++k) {
    double sum = 0;
    for (int64_t s = k * job.strips_each; s < (k + 1) * job.strips_each; ++s) sum += job.strip[s].param_sq;
    task.param_sq[k] = (float)sum;
  }
  const uint32_t left = fingerprint(task);
  memcpy(task.param_sq + task.matrices, &left, sizeof left);
}

// Scheduling

void sweep_end(Job& job, int64_t phases) {
  if (phases & SWEEP) add_up(job);
  if (phases == SWEEP) put_sums(job);
  if (phases == APPLY) get_sums(job);
}

void chunk(Job& job, const Kernels& kernels, int64_t phases, int64_t index) {
  if (!job.task->factored) return;
  if (phases & SWEEP) kernels.combine(job, index);
  if (phases & APPLY) kernels.prepare(job, index);
}

void alone(Task& task, const Kernels& kernels, int64_t phases, std::byte* workspace) {
  Job job = cut(task);
  Scratch scratch = {workspace};
  place_partial(job, scratch, true);
  place(job, scratch, phases);
  schedule(job);
  if (phases & SWEEP)
    for (int64_t s = 0; s < job.strips; ++s) {
      kernels.sweep(job, s);
      if (task.factored) kernels.absorb(job, s);
    }
  sweep_end(job, phases);
  if ((phases & APPLY) && task.factored)
    for (int64_t c = 0; c < job.chunks; ++c) kernels.prepare(job, c);
  if (!(phases & APPLY)) return;
  settle(job);
  if (job.ok)
    for (int64_t s = job.strips; s-- > 0;) kernels.apply(job, s);
  finish(job);
}

// Pieces of work that threads take until there are none; whoever ends the last one ends the stage.
struct Stage {
  std::atomic<int64_t> next{0}, done{0};
  std::atomic<bool> over{false};

  template <class Piece, class End>
  void work(int64_t total, Piece piece, End end) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < total;) {
      piece(i);
      if (done.fetch_add(1, std::memory_order_acq_rel) + 1 == total) {
        end();
        over.store(true, std::memory_order_release);
      }
    }
  }
};

struct Large {
  Job job;
  Stage sweep, columns, apply;
};

struct Run {
  const Kernels& kernels;
  int64_t phases;
  std::vector<Large> large;
  std::vector<Task*> single;  // the largest first
  std::byte* own_scratch;
  int64_t own_bytes;
  std::atomic<int64_t> next_single{0}, threads{0};

  bool take_one(std::byte* scratch) {
    const int64_t i = next_single.fetch_add(1, std::memory_order_relaxed);
    if (i >= (int64_t)single.size()) return false;
    alone(*single[i], kernels, phases, scratch);
    return true;
  }

  void wait(const Stage& stage, std::byte* scratch) {
    for (int spins = 0; !stage.over.load(std::memory_order_acquire); ++spins) {
      if (next_single.load(std::memory_order_relaxed) < (int64_t)single.size() && take_one(scratch)) continue;
#if defined(__SSE2__)
      _mm_pause();
#endif
      if (spins > 1000) std::this_thread::yield();
    }
  }

  void work() {
#if defined(__SSE2__)
    const unsigned mode = _mm_getcsr();
    _mm_setcsr(0x1F80);  // denormal numbers count, whichever thread meets them
#endif
    std::byte* scratch = own_scratch + threads.fetch_add(1) * own_bytes;
    for (size_t k = 0; k < large.size(); ++k) {
      Job& job = large[k].job;
      if (k >= 2) wait(large[k - 2].apply, scratch);  // whose scratch this one takes over
      large[k].sweep.work(
          phases & SWEEP ? job.strips : 1,
          [&](int64_t s) {
            if (phases & SWEEP) kernels.sweep(job, s);
          },
          [&] { sweep_end(job, phases); });
      wait(large[k].sweep, scratch);
      large[k].columns.work(
          job.chunks, [&](int64_t c) { chunk(job, kernels, phases, c); },
          [&] {
            if (phases & APPLY) settle(job);
          });
      wait(large[k].columns, scratch);
      large[k].apply.work(
          phases & APPLY ? job.strips : 1,
          [&](int64_t s) {
            if ((phases & APPLY) && job.ok) kernels.apply(job, job.strips - 1 - s);
          },
          [&] {
            if (phases & APPLY) finish(job);
          });
    }
    while (take_one(scratch)) {
    }
#if defined(__SSE2__)
    _mm_setcsr(mode);
#endif
  }
};

// The threads are torch's own where torch runs on OpenMP: those are awake already, and no second pool competes with them.
void in_parallel(int64_t threads, Run& run) {
  const auto work = [](void* run) { static_cast<Run*>(run)->work(); };
#if defined(__unix__) || defined(__APPLE__)
  using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
  static const auto openmp = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  if (openmp && threads > 1) return openmp(work, &run, (unsigned)threads, 0);
#endif
  std::vector<std::thread> others;
  others.reserve(threads);
  try {
    while ((int64_t)others.size() + 1 < threads) others.emplace_back(work, &run);
  } catch (const std::system_error&) {  // fewer do as well
  }
  work(&run);
  for (auto& other : others) other.join();
}

// Which tensors one thread does alone, which are shared, and the scratch for that.
struct Division {
  std::vector<Task*> single, shared;
  int64_t partial = 0, slot = 0, own = 0;

  Division(Task* tasks, int64_t count, int64_t phases, int64_t threads) {
    int64_t all = 0;
    for (int64_t i = 0; i < count; ++i) all += elements(tasks[i]);
    const int64_t fair = all / (threads * SHARE), most = threads == 1 ? all : fair > SMALL ? fair : SMALL;
    for (int64_t i = 0; i < count; ++i) {
      Job job = cut(tasks[i]);
      const int64_t bytes = elements(tasks[i]) <= most ? scratch_alone(job, phases) : 0;
      if (elements(tasks[i]) <= most && bytes <= OWN_SCRATCH / threads) {
        single.push_back(&tasks[i]);
        own = std::max(own, bytes);
        continue;
      }
      shared.push_back(&tasks[i]);
      Scratch partial_bytes = {nullptr}, slot_bytes = {nullptr};
      place_partial(job, partial_bytes, false);
      place(job, slot_bytes, phases);
      partial = std::max(partial, partial_bytes.used);
      slot = std::max(slot, slot_bytes.used);
    }
    std::stable_sort(single.begin(), single.end(),
                     [](const Task* a, const Task* b) { return elements(*a) > elements(*b); });
  }

  int64_t bytes(int64_t threads) const { return partial + 2 * slot + threads * own + 64; }
};

std::vector<const Kernels*> supported() {
  std::vector<const Kernels*> found;
#if defined(HAVE_X86)
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    found.push_back(&avx512);
  if (__builtin_cpu_supports("avx2")) found.push_back(&avx2);
#endif
  found.push_back(&baseline);
  return found;
}

}  // namespace

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

// What the caller must pack, to notice a library of another version.
EXPORT int64_t adafactor_task_bytes() { return sizeof(Task); }

// The instruction sets that this machine has, the best first; null beyond the last.
EXPORT const char* adafactor_instruction_set(int64_t index) {
  const auto found = supported();
  return index < (int64_t)found.size() ? found[index]->name : nullptr;
}

// Bytes of scratch that a run needs.
EXPORT int64_t adafactor_workspace(Task* tasks, int64_t count, int64_t phases, int64_t threads) {
  return Division(tasks, count, phases, threads).bytes(threads);
}

// Sweep (1), apply (2) or both (3) for all tasks. `workspace` is not read before it is written.
EXPORT void adafactor_run(Task* tasks, int64_t count, int64_t phases, void* workspace, int64_t threads,
                          int64_t instruction_set) {
  Division division(tasks, count, phases, threads);
  auto* base = reinterpret_cast<std::byte*>((reinterpret_cast<uintptr_t>(workspace) + 63) / 64 * 64);
  auto* own = base + division.partial + 2 * division.slot;
  const std::vector<Task*>& shared = division.shared;
  Run run{*supported()[instruction_set], phases, std::vector<Large>(shared.size()), std::move(division.single), own,
          division.own};
  for (size_t k = 0; k < shared.size(); ++k) {
    Job& job = run.large[k].job = cut(*shared[k]);
    Scratch partial = {base}, slot = {base + division.partial + (int64_t)(k % 2) * division.slot};
    place_partial(job, partial, false);
    place(job, slot, phases);
    schedule(job);
  }
  in_parallel(threads, run);
}
