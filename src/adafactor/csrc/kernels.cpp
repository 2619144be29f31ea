// Sweep and apply over strips. Compiled once for every instruction set (KERNELS names the table), with the same result.
//
// The comments are those of reference.py, whose translation this is.
#include <type_traits>

#include "formats.h"
#include "task.h"

namespace {

constexpr int TOGETHER = 4;  // rows in a sweep

// The rows and columns of a strip.
struct Strip {
  int64_t matrix, begin, end;

  Strip(const Job& job, int64_t index) {
    matrix = index / job.strips_each;
    begin = index % job.strips_each * job.strip_rows;
    const int64_t limit = job.task->factored ? job.task->rows : job.task->cols;
    end = begin + job.strip_rows < limit ? begin + job.strip_rows : limit;
  }
};

// A block in place, or, where the end of a row cuts it off, a copy of what there is, filled up.
template <class T>
struct Cut {
  T* const place;
  const int64_t count;
  alignas(64) std::remove_const_t<T> copy[BLOCK];
  T* at;

  MEMBER Cut(T* place, int64_t left, std::remove_const_t<T> fill = {}) : place(place), count(left), at(place) {
    if (__builtin_expect(left >= BLOCK, 1)) return;
    memcpy(copy, place, left * sizeof(T));
    for (int64_t k = left; k < BLOCK; ++k) copy[k] = fill;
    at = copy;
  }

  MEMBER void put_back() const {
    if (__builtin_expect(at != place, 0)) memcpy(place, copy, count * sizeof(T));
  }
};

struct Uncut {
  nothing* const at = nullptr;

  MEMBER Uncut(const nothing*, int64_t, int = 0) {}
  MEMBER void put_back() const {}
};
template <>
struct Cut<nothing> : Uncut {
  using Uncut::Uncut;
};
template <>
struct Cut<const nothing> : Uncut {
  using Uncut::Uncut;
};

template <class T>
INLINE T* past(T* at, int64_t elements) {
  if constexpr (IS_NOTHING<T>)
    return at;
  else
    return at + elements;
}

// sum of x^2 over a run of elements
template <bool PAIRS, class T, class L = nothing, class K = nothing>
double sum_of_squares(const T* x, int64_t count, const L* low = nullptr, const K* lowest = nullptr) {
  double total = 0;
  for (int64_t start = 0; start < count; start += SEGMENT) {
    const int64_t stop = start + SEGMENT < count ? start + SEGMENT : count;
    Sums lanes;
    const auto add = [&](const T* block, const L* byte, const K* last) __attribute__((always_inline)) {
      EACH_PART(k) {
        const Part part = load_weight<PAIRS>(block, byte, last, k);
        lanes.part[k] += sum(part * part);
      }
    };
    int64_t j = start;
    for (; j + BLOCK <= stop; j += BLOCK) add(x + j, past(low, j), past(lowest, j));
    if (j < stop) {
      const int64_t left = stop - j;
      add(Cut<const T>(x + j, left).at, Cut<const L>(past(low, j), left).at, Cut<const K>(past(lowest, j), left).at);
    }
    total += lanes.total();
  }
  return total;
}

// Column sums of ROWS rows of g: of g^2, and of g^2 / R.
template <bool PAIRS, int ROWS, class G>
void add_columns(const G* g, int64_t cols, const float* inverse, float* col_sq, float* col_ratio) {
  alignas(64) G last[ROWS * BLOCK];
  for (int64_t j = 0; j < cols; j += BLOCK) {
    const G* block = g + j;
    int64_t stride = cols;
    if (__builtin_expect(cols - j < BLOCK, 0)) {
      memset(last, 0, sizeof last);
      for (int i = 0; i < ROWS; ++i) memcpy(last + i * BLOCK, block + i * cols, (cols - j) * sizeof(G));
      block = last;
      stride = BLOCK;
    }
    EACH_PART(k) {
      Part sq = load_lanes(col_sq + j, k), ratio = load_lanes(col_ratio + j, k);
      Part squares[ROWS], ratios[ROWS];
      _Pragma("GCC unroll 4") for (int i = 0; i < ROWS; ++i) {
        const Part x = load_part<PAIRS>(block + i * stride, k);
        squares[i] = x * x;
        ratios[i] = squares[i] * all(inverse[i]);
      }
      if constexpr (ROWS == 4) {  // short chains: faster, and closer to the sum
        sq = sq + ((squares[0] + squares[1]) + (squares[2] + squares[3]));
        ratio = ratio + ((ratios[0] + ratios[1]) + (ratios[2] + ratios[3]));
      } else {
        static_assert(ROWS == 1);
        sq = sq + squares[0];
        ratio = ratio + ratios[0];
      }
      store_lanes(col_sq + j, k, sq);
      store_lanes(col_ratio + j, k, ratio);
    }
  }
}

// The sum of p^2 over a run of elements.
template <class P, class L, class K, bool PAIRS>
double param_sq(const Task& task, int64_t offset, int64_t count) {
  return sum_of_squares<PAIRS>(static_cast<const P*>(task.p) + offset, count, past(static_cast<const L*>(task.low), offset),
                               past(static_cast<const K*>(task.lowest), offset));
}

// R of this step into scratch; per column the sums of g^2 and of g^2 / R; the sums of R, g^2 and p^2.
template <class P, class L, class K, class G, bool PAIRS>
void sweep_factored(Job& job, int64_t index) {
  const Task& task = *job.task;
  const Strip strip(job, index);
  const int64_t cols = task.cols;
  const int64_t at = strip.matrix * task.rows;
  float* col_sq = job.partial + index * job.partial_stride;
  float* col_ratio = col_sq + job.padded;
  memset(col_sq, 0, 2 * job.padded * sizeof(float));
  StripSums sums = {};
  // Rows are read twice, the second time from the cache nearest by.
  for (int64_t i = strip.begin; i < strip.end;) {
    const int64_t count = strip.end - i < TOGETHER ? 1 : TOGETHER;
    const G* g = static_cast<const G*>(task.g) + (at + i) * cols;
    float inverse[TOGETHER];
    for (int64_t k = 0; k < count; ++k) {
      const double row_sq = sum_of_squares<PAIRS>(g + k * cols, cols);
      const double old = task.r[at + i + k];
      const float R = (float)(job.beta2 * old + (1 - job.beta2) * (row_sq / cols + task.eps1));
      job.new_r[at + i + k] = R;
      inverse[k] = 1 / R;
      sums.grad_sq += row_sq;
      sums.row_sum += R;
    }
    if (count == TOGETHER)
      add_columns<PAIRS, TOGETHER>(g, cols, inverse, col_sq, col_ratio);
    else
      add_columns<PAIRS, 1>(g, cols, inverse, col_sq, col_ratio);
    i += count;
  }
  if (task.param_sq && !task.known)
    for (int64_t i = strip.begin; i < strip.end; ++i)
      sums.param_sq += param_sq<P, L, K, PAIRS>(task, (at + i) * cols, cols);
  job.strip[index] = sums;
}

// V <- beta2 V + (1 - beta2) (g^2 + eps1)
struct SecondMoment {
  F32 beta2, rest, eps1;

  explicit SecondMoment(const Job& job)
      : beta2(all((float)job.beta2)), rest(all((float)(1 - job.beta2))), eps1(all((float)job.task->eps1)) {}

  MEMBER Part operator()(Part V, Part g) const { return V * beta2 + (g * g + eps1) * rest; }
};

// The sums of g^2, U^2 and p^2.
template <class P, class L, class K, class G, bool PAIRS>
void sweep_full(Job& job, int64_t index) {
  const Task& task = *job.task;
  const Strip strip(job, index);
  const G* g = static_cast<const G*>(task.g);
  const SecondMoment moment(job);
  StripSums sums = {};
  for (int64_t start = strip.begin; start < strip.end; start += SEGMENT) {
    const int64_t stop = start + SEGMENT < strip.end ? start + SEGMENT : strip.end;
    Sums lanes;
    for (int64_t j = start; j < stop; j += BLOCK) {
      const Cut<const G> cut_g(g + j, stop - j);
      const Cut<const float> cut_v(task.r + j, stop - j, 1);  // filled with 1: a V of zero would make NaN of nothing
      EACH_PART(k) {
        const Part x = load_part<PAIRS>(cut_g.at, k);
        lanes.part[k] += sum(x * x / moment(load_part<PAIRS>(cut_v.at, k), x));
      }
    }
    sums.update_sq += lanes.total();
    sums.grad_sq += sum_of_squares<PAIRS>(g + start, stop - start);
    if (task.param_sq && !task.known)
      sums.param_sq += param_sq<P, L, K, PAIRS>(task, start, stop - start);
  }
  job.strip[index] = sums;
}

bool in_pairs(const Task& task) {
  return task.p_format == BFLOAT16 || task.p_format == FLOAT16 || task.g_format == BFLOAT16 ||
         task.g_format == FLOAT16 || task.m_format == BFLOAT16 || task.m_format == INT8;
}

struct Chunk {
  int64_t matrix, begin, end;

  Chunk(const Job& job, int64_t index) {
    matrix = index / job.chunks_each;
    begin = index % job.chunks_each * CHUNK;
    end = begin + CHUNK < job.task->cols ? begin + CHUNK : job.task->cols;
  }
};

// The column sums of a matrix: those of its strips, added in their order.

void put_columns(const Job& job, int64_t matrix, int which, int64_t begin, int64_t count, const double* sum) {
  float* out = (which ? job.ratio : job.new_c) + matrix * job.task->cols + begin;
  const bool pairs = in_pairs(*job.task);
  for (int64_t j = 0; j < count; ++j) out[j] = (float)sum[pairs ? paired(j) : j];
}

void combine(Job& job, int64_t index) {
  const Chunk chunk(job, index);
  const int64_t count = chunk.end - chunk.begin, width = (count + BLOCK - 1) / BLOCK * BLOCK;
  for (int which = 0; which < 2; ++which) {
    double sum[CHUNK] = {};
    for (int64_t s = 0; s < job.strips_each; ++s) {
      const int64_t strip = chunk.matrix * job.strips_each + s;
      const float* part = job.partial + strip * job.partial_stride + which * job.padded + chunk.begin;
      for (int64_t j = 0; j < width; ++j) sum[j] += part[j];
    }
    put_columns(job, chunk.matrix, which, chunk.begin, count, sum);
  }
}

void absorb(Job& job, int64_t strip) {
  const int64_t s = strip % job.strips_each;
  if (s == 0) memset(job.total, 0, 2 * job.padded * sizeof(double));
  for (int64_t j = 0; j < 2 * job.padded; ++j) job.total[j] += job.partial[j];
  if (s + 1 < job.strips_each) return;
  for (int which = 0; which < 2; ++which)
    put_columns(job, strip / job.strips_each, which, 0, job.task->cols, job.total + which * job.padded);
}

// C of this step and 1 / sqrt(C); the chunk's part of sum_j s_j / C_j.
void prepare(Job& job, int64_t index) {
  const Task& task = *job.task;
  const Chunk chunk(job, index);
  const int64_t offset = chunk.matrix * task.cols + chunk.begin, width = chunk.end - chunk.begin;
  const float* C = task.c + offset;
  float* new_c = job.new_c + offset;
  float* b = job.b + chunk.matrix * job.padded + chunk.begin;
  float inverse[CHUNK];
  double ratio[CHUNK];
  const double beta2 = job.beta2, rest = 1 - beta2, eps1 = task.eps1, rows = (double)task.whole_rows;
  for (int64_t j = 0; j < width; ++j) {
    new_c[j] = (float)(beta2 * C[j] + rest * (new_c[j] / rows + eps1));
    inverse[j] = 1 / __builtin_sqrtf(new_c[j]);
    ratio[j] = job.ratio[offset + j] / (double)new_c[j];
  }
  const bool pairs = in_pairs(task);
  for (int64_t j = 0; j < width; ++j) b[pairs ? paired(j) : j] = inverse[j];
  if (chunk.end == task.cols)  // beyond the last column nothing moves
    for (int64_t j = width; j < job.padded - chunk.begin; ++j) b[pairs ? paired(j) : j] = 0;
  double sum[8] = {};
  for (int64_t j = 0; j < width; ++j) sum[j % 8] += ratio[j];
  job.chunk_sq[index] = ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
}

// U, momentum and decay, committed.
template <class P, class L, class K, class G, class M, bool PAIRS, bool FACTORED>
void apply(Job& job, int64_t index) {
  using V = std::conditional_t<FACTORED, nothing, float>;
  using B = std::conditional_t<FACTORED, float, nothing>;
  constexpr bool momentum = !IS_NOTHING<M>, one_byte = std::is_same_v<M, i8>, extended = !IS_NOTHING<L>;
  using A = std::conditional_t<one_byte, lane, M>;  // momentum as it is worked on
  constexpr int64_t GROUP = one_byte ? MOMENTUM_BLOCK : SEGMENT;

  const Task& task = *job.task;
  const Strip strip(job, index);
  const Matrix& matrix = job.matrix[strip.matrix];
  const bool scaled = flag(task.param_sq), stochastic = flag(task.stochastic), nesterov = flag(task.nesterov);
  const bool moves = flag(job.moves), decays = flag(matrix.shrink != 0);
  const bool simple = moves && (momentum || extended || matrix.tame);
  const F32 beta1 = all((float)task.beta1), rest1 = all((float)(1 - task.beta1));
  const F32 after = all(matrix.after), shrink = all(matrix.shrink);
  const SecondMoment moment(job);
  const int64_t step = (int64_t)*task.step + 1;
  Draws weights(task.weights_stream, step), averages(task.momentum_stream, step);
  alignas(64) lane fresh[one_byte ? MOMENTUM_BLOCK : 1] = {};  // one-byte momentum, unpacked

  // Part k of a block. `plain` is std::true_type where things are as they nearly always are: `simple`, with plain draws.
  const auto update = [&](auto plain, P* p, L* low, K* lowest, const G* g, A* m, V* v, const B* b, F32 scale, int k,
                          Sums& written_sq) __attribute__((always_inline)) {
    constexpr bool PLAIN = decltype(plain)::value;
    const Part gradient = load_part<PAIRS>(g, k), weight = load_weight<PAIRS>(p, low, lowest, k);
    Part x;
    if constexpr (FACTORED) {
      x = gradient * load_lanes(b, k) * scale;
    } else {
      const Part moved = moment(load_part<PAIRS>(v, k), gradient);
      x = gradient * Part{1 / root(moved.a), 1 / root(moved.b)} * scale;
      store_part<PAIRS, PLAIN, true>(v, k, moved, false, weights);
    }
    if constexpr (momentum) {
      const Part M_new = load_part<PAIRS>(m, k) * beta1 + x * rest1;
      store_part<PAIRS, PLAIN, false>(m, k, M_new, stochastic, averages);
      x = nesterov ? M_new * beta1 + x * rest1 : M_new;
      x = x * after;
      if constexpr (sizeof(A) == 4 && std::is_same_v<P, bf16>) x = short_nan(x);
    }
    if (decays) x = x + weight * shrink;
    if (PLAIN || moves) {
      if constexpr (extended)
        store_split(p, low, lowest, k, weight - x);
      else
        store_part<PAIRS, PLAIN, PLAIN && !momentum>(p, k, weight - x, stochastic, weights);
    }
    if (scaled) {
      const Part written = load_weight<PAIRS>(p, low, lowest, k);
      written_sq.part[k] += sum(written * written);
    }
  };

  // One run of elements: a row of a matrix, or a segment of a full V. Returns the sum of p^2 as written, in the order of
  // sum_of_squares.
  const auto run = [&](int64_t offset, int64_t element, int64_t count, const B* b, float* m_scale, float factor)
                       __attribute__((always_inline)) {
    P* p = static_cast<P*>(task.p) + offset;
    L* low = past(static_cast<L*>(task.low), offset);
    K* lowest = past(static_cast<K*>(task.lowest), offset);
    const G* g = static_cast<const G*>(task.g) + offset;
    M* kept = past(static_cast<M*>(task.m), offset);
    V* v = past(reinterpret_cast<V*>(FACTORED ? nullptr : task.r), offset);
    const F32 scale = all(factor);
    double param_sq = 0;
    for (int64_t start = 0; start < count; start += SEGMENT) {
      const int64_t stop = start + SEGMENT < count ? start + SEGMENT : count;
      weights.begin(element + start, stop - start);
      averages.begin(element + start, stop - start);
      const bool plain = simple && weights.plain() && averages.plain();
      Sums lanes;
      for (int64_t from = start; from < stop; from += GROUP) {
        const int64_t to = from + GROUP < stop ? from + GROUP : stop;
        A* m = nullptr;
        if constexpr (one_byte) {
          dequantize(kept + from, to - from, m_scale[from / GROUP], fresh);
          m = fresh;
        } else {
          m = past(kept, from);
        }
        int64_t j = from;
        if (plain)
          for (; j + BLOCK <= to; j += BLOCK)
            EACH_PART(k) update(std::true_type(), p + j, past(low, j), past(lowest, j), g + j, past(m, j - from),
                                past(v, j), past(b, j), scale, k, lanes);
        for (; j < to; j += BLOCK) {
          const Cut<P> cut_p(p + j, to - j);
          const Cut<L> cut_low(past(low, j), to - j);
          const Cut<K> cut_lowest(past(lowest, j), to - j);
          const Cut<const G> cut_g(g + j, to - j);
          const Cut<A> cut_m(past(m, j - from), one_byte ? BLOCK : to - j);
          const Cut<V> cut_v(past(v, j), to - j, 1);
          EACH_PART(k) update(std::false_type(), cut_p.at, cut_low.at, cut_lowest.at, cut_g.at, cut_m.at, cut_v.at,
                              past(b, j), scale, k, lanes);
          cut_p.put_back();
          cut_low.put_back();
          cut_lowest.put_back();
          cut_m.put_back();
          cut_v.put_back();
        }
        if constexpr (one_byte) {
          float& block_scale = m_scale[from / GROUP];
          if (plain)
            quantize<true>(fresh, to - from, stochastic, averages, kept + from, block_scale);
          else
            quantize<false>(fresh, to - from, stochastic, averages, kept + from, block_scale);
        }
      }
      if (scaled) param_sq += lanes.total();
    }
    return param_sq;
  };

  double param_sq = 0;
  if constexpr (FACTORED) {
    const float* b = job.b + strip.matrix * job.padded;
    const int64_t groups = (task.cols + MOMENTUM_BLOCK - 1) / MOMENTUM_BLOCK;
    for (int64_t i = strip.begin; i < strip.end; ++i) {
      const int64_t row = strip.matrix * task.rows + i;
      const float R = job.new_r[row];
      const float a = (float)(matrix.root_mean_row / __builtin_sqrtf(R));
      float* m_scale = one_byte ? task.m_scale + row * groups : nullptr;
      const int64_t first = task.first + strip.matrix * task.matrix_stride + i * task.row_stride;
      param_sq += run(row * task.cols, first, task.cols, b, m_scale, a * matrix.scale);
      task.r[row] = R;
    }
  } else {
    param_sq = run(strip.begin, task.first + strip.begin, strip.end - strip.begin, static_cast<const B*>(nullptr), nullptr, matrix.scale);
  }
  job.strip[index].param_sq = param_sq;
}

// The instances, by the formats of p, g and m. cpu.py asks for these mixtures only.

template <class P, class L, class K, class G>
void sweep_with(Job& job, int64_t strip) {
  constexpr bool narrow = NARROW<P> || NARROW<G>;
  if (narrow || in_pairs(*job.task))
    job.task->factored ? sweep_factored<P, L, K, G, true>(job, strip) : sweep_full<P, L, K, G, true>(job, strip);
  else if constexpr (!narrow)
    job.task->factored ? sweep_factored<P, L, K, G, false>(job, strip) : sweep_full<P, L, K, G, false>(job, strip);
}

template <class P, class L, class K, class G, class M>
void apply_keeping(Job& job, int64_t strip) {
  constexpr bool one_byte = std::is_same_v<M, i8>, pairs = NARROW<P> || NARROW<G> || NARROW<M> || one_byte;
  if constexpr (one_byte)
    apply<P, L, K, G, M, pairs, true>(job, strip);
  else
    job.task->factored ? apply<P, L, K, G, M, pairs, true>(job, strip) : apply<P, L, K, G, M, pairs, false>(job, strip);
}

template <class P, class L, class K, class G>
void apply_with(Job& job, int64_t strip) {
  switch (job.task->m_format) {
    case FLOAT32:
      return apply_keeping<P, L, K, G, float>(job, strip);
    case BFLOAT16:
      return apply_keeping<P, L, K, G, bf16>(job, strip);
    case INT8:
      return apply_keeping<P, L, K, G, i8>(job, strip);
    default:
      return apply_keeping<P, L, K, G, nothing>(job, strip);
  }
}

#define MIXTURES(each)                                                                       \
  template <class P, class G>                                                                \
  void each##_as(Job& job, int64_t strip) {                                                  \
    if constexpr (std::is_same_v<P, bf16>) {                                                 \
      if (job.task->lowest) return each##_with<P, uint8_t, uint8_t, G>(job, strip);          \
      if (job.task->low) return each##_with<P, uint8_t, nothing, G>(job, strip);             \
    }                                                                                        \
    each##_with<P, nothing, nothing, G>(job, strip);                                         \
  }                                                                                          \
  void each(Job& job, int64_t strip) {                                                       \
    switch (job.task->p_format * 4 + job.task->g_format) {                                   \
      case FLOAT32 * 4 + FLOAT32:                                                            \
        return each##_as<float, float>(job, strip);                                          \
      case FLOAT32 * 4 + BFLOAT16:                                                           \
        return each##_as<float, bf16>(job, strip);                                           \
      case BFLOAT16 * 4 + BFLOAT16:                                                          \
        return each##_as<bf16, bf16>(job, strip);                                            \
      case BFLOAT16 * 4 + FLOAT32:                                                           \
        return each##_as<bf16, float>(job, strip);                                           \
      case FLOAT16 * 4 + FLOAT16:                                                            \
        return each##_as<f16, f16>(job, strip);                                              \
      case FLOAT16 * 4 + FLOAT32:                                                            \
        return each##_as<f16, float>(job, strip);                                            \
    }                                                                                        \
  }
MIXTURES(sweep)
MIXTURES(apply)
#undef MIXTURES

}  // namespace

#define TEXT_OF(name) #name
#define TEXT(name) TEXT_OF(name)
extern const Kernels KERNELS;  // const alone would hide it
const Kernels KERNELS = {TEXT(KERNELS), sweep, combine, absorb, prepare, apply};
