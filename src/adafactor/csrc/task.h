// One parameter's update, and how it is cut into pieces of work.
#pragma once

#include <cstdint>

enum Format : int64_t { FLOAT32, BFLOAT16, FLOAT16, NONE, INT8 };  // momentum alone is NONE or INT8
enum Decay : int64_t { LR, SCALED_LR, INDEPENDENT, LR_SQUARED };

// One parameter, contiguous, seen as [matrices, rows, cols]; a full V is one row. backends/cpu.py packs this.
struct Task {
  // What changes from step to step.
  const void* g;
  float* sums;    // between a sweep and an apply that are called apart: the plan's sums, in the plan's order
  float* new_r;   // and the new R
  int64_t known;  // whether param_sq holds, for all that autograd knows
  double lr;      // NaN: the paper's

  void* p;
  void* low;        // the missing bits of a bfloat16 weight: the first byte, or null
  void* lowest;     // the second, or null
  void* m;          // momentum, or null
  float* m_scale;   // of one-byte momentum, [matrices, rows, blocks of 128 columns]
  float* r;         // R, [matrices, rows]; without factoring V, [cols]
  float* c;         // C, [matrices, cols]
  float* step;      // []
  float* report;    // updates, clipped, skipped; then RMS(U) and alpha, [matrices] each
  float* param_sq;  // null where the step is not scaled by RMS(p); else, as the last write left p, the sum of p^2,
                    // [matrices], and then p's fingerprint

  int64_t matrices, rows, cols;
  int64_t whole_rows, whole_cols;           // of the parameter, of which this may be a piece
  int64_t first, matrix_stride, row_stride;  // what stochastic rounding counts as the index of an element
  int64_t p_format, g_format, m_format;
  int64_t factored, shared_rms;

  int64_t relative_step, warmup_init, scaled_momentum, nesterov, maximize, decay, stochastic;
  double eps1, eps2, clip_threshold, decay_rate, beta1, beta2, beta2_cap, weight_decay;  // NaN: None
  int32_t weights_stream[2], momentum_stream[2];
};

// What one strip adds to its matrix's sums.
struct StripSums {
  double grad_sq, row_sum, update_sq, param_sq;
};

// A matrix's sums, and what follows from them.
struct Matrix {
  float grad_sq, row_sum, update_sq, param_sq;
  double root_mean_row = 0;  // sqrt(mean(R))
  float scale = 0;           // of U: 1 / clip, the sign of `maximize`, and alpha unless momentum averages U itself
  float after = 0;           // of the step: alpha where momentum averages U itself, else 1
  float shrink = 0;          // the share of p that weight decay takes
  bool tame = false;         // whether, without momentum, no weight can leave the finite range by its rounding
};

// A task under way. A strip is a run of whole rows of one matrix (of elements of a full V), a chunk a run of columns. How
// they are cut depends on the shape alone, and with it the order of every sum.
struct Job {
  Task* task;
  int64_t strip_rows, strips_each, strips;  // rows in a strip; strips in a matrix, in all
  int64_t chunks_each, chunks;
  int64_t padded;  // columns, up to whole blocks

  double beta2, rho;
  bool ok, moves;

  // Scratch. In pair order (formats.h) where any format has 16 bits: partial and b.
  float* partial;    // [strips, 2, padded], or [2, padded] for a thread alone: column sums of g^2 and of g^2 / R
  int64_t partial_stride;
  double* total;     // [2, padded], for a thread alone: their sums over the strips of a matrix so far
  float* new_r;      // [matrices, rows]
  float* new_c;      // [matrices, cols]: column sums of g^2, then C
  float* ratio;      // [matrices, cols]: column sums of g^2 / R
  float* b;          // [matrices, padded]: 1 / sqrt(C)
  StripSums* strip;  // [strips]
  double* chunk_sq;  // [chunks]: sums of s_j / C_j
  Matrix* matrix;    // [matrices]
};

constexpr int64_t CHUNK = 512;        // columns
constexpr int64_t SEGMENT = 1 << 12;  // elements that are added up in float before they go on in double

// The work itself, for one instruction set.
struct Kernels {
  const char* name;
  void (*sweep)(Job&, int64_t strip);
  void (*combine)(Job&, int64_t chunk);  // the column sums of all strips, into new_c and ratio
  void (*absorb)(Job&, int64_t strip);   // the same strip by strip, for a thread alone
  void (*prepare)(Job&, int64_t chunk);  // C, b, and the chunk's part of sum_j s_j / C_j
  void (*apply)(Job&, int64_t strip);
};
