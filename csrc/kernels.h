// Every kernel's declaration: raw pointers and sizes, no Python, no torch. Pointers must be valid and contiguous;
// values of index arrays are checked by the CPU kernels, which throw ArgumentError before anything is written.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace moekern {

enum class Dtype : uint8_t { f32, f64, bf16, f16, i32, i64, u8, boolean, other };
enum class Score : uint8_t { softmax, sigmoid, sqrtsoftplus, identity };
// What a stored code means; moekern/kernels/quantised.py says where each comes from. Those with a number are packed
// into 32-bit words, so many bits each: along a row (awq: in an order of its own), or down a column.
enum class Coding : uint8_t {
  e4m3, e5m2, int8, e2m1, packed2, packed3, packed4, packed8, awq4, awq8, rows2, rows3, rows4, rows8
};

struct Typed {
  const void* data = nullptr;
  Dtype dtype = Dtype::other;
};

struct ArgumentError : std::runtime_error {
  ArgumentError(std::string name, const std::string& what) : std::runtime_error(what), argument(std::move(name)) {}
  std::string argument;
};

struct RouterStats {
  Typed logits;  // [T, E], or null
  Typed idx;     // [T, K]
  Typed weight;  // [T, K]
  const bool* mask = nullptr;  // [T], or null
  int64_t* tokens;             // [1]
  int64_t* logit_tokens;       // [1]
  int64_t* count;              // [E]
  int64_t* top1_count;         // [E]
  double* gate_sum;            // [E]
  double* gate_square_sum;     // [E]
  double* score_sum;           // [E]
  double* entropy_sum;         // [1]
  double* margin_sum;          // [1]
  int64_t* coactivation;       // [E, E]
  double* logit_gram = nullptr;  // [E, E], or null
  int64_t T, E, K;
  Score score;
};

struct CombineAndMeasure {
  Typed y;                 // [N, H]
  Typed weight;            // [T, K]
  Typed idx;               // [T, K]
  const int64_t* order;    // [N]
  const int64_t* offsets;  // [E + 1]
  const bool* mask = nullptr;      // [T], or null
  const void* residual = nullptr;  // [T, H] of y's dtype, or null
  double* norm_sum;                // [E]
  double* norm_square_sum;         // [E]
  double* gated_norm_sum;          // [E]
  double* gated_norm_square_sum;   // [E]
  double* max_abs;                 // [E]
  double* pair_sum;                // [E, E]
  double* square_sum = nullptr;    // [E, H], or null with the next two
  double* value_sum = nullptr;     // [E, H]
  double* unit_sum = nullptr;      // [E, H]
  double* residual_sum;            // [E]
  int64_t* residual_tokens;        // [1]
  void* out;                       // [T, H], of y's dtype
  int64_t T, E, K, H, N;
};

struct MixtureStats {
  Typed y;                             // [N, H]
  Typed weight;                        // [T, K]
  Typed share;                         // [T, K]
  Typed idx;                           // [T, K]
  const int64_t* order;                // [N]
  const int64_t* offsets;              // [E + 1]
  const bool* mask = nullptr;          // [T], or null
  double* norm_sum = nullptr;          // [E], or null with the next five
  double* square_sum = nullptr;        // [E]
  double* left_norm_sum = nullptr;     // [E]
  double* left_square_sum = nullptr;   // [E]
  double* share_sum = nullptr;         // [1]
  double* share_square_sum = nullptr;  // [1]
  double* gram = nullptr;              // [E, E], or null
  int64_t T, E, K, H, N;
};

struct Similarity {
  Typed y;                             // [E, T, H]
  const float* norm_square = nullptr;  // [E, T], or null: y's own
  const bool* mask = nullptr;          // [T], or null
  int64_t* tokens;                     // [1]
  double* gram_sum;                    // [E, E]
  double* cosine_sum;                  // [E, E]
  int64_t E, T, H;
};

struct Sketch {
  Typed y;             // [E, T, H]
  float* z;            // [E, T, M]
  float* norm_square;  // [E, T]
  int64_t E, T, H, M;
  int64_t seed, start;  // start: the first token's position, which says what projection it gets
};

struct Vocabulary {
  Typed token_ids;             // [T]
  Typed idx;                   // [T, K]
  const bool* mask = nullptr;  // [T], or null
  uint64_t* bits;              // [E, W]
  int64_t T, E, K, W;
};

// A stack of quantised matrices: w = (value(code) - zero) * scale, rounded to float32 after each operation.
// Row r takes its scales from line group[e, r], or r / block_rows; column c from column c / block_columns.
struct Quantised {
  const uint8_t* codes;            // [E, L, B]: a row is a line, but for rows.. a line is a 32-bit word of each column
  Coding coding;
  Typed scale;                     // [E, S, Q], u8: powers of two, biased by 127
  const float* zero = nullptr;     // [E, S, Q], or null
  const int32_t* group = nullptr;  // [E, R], or null
  int64_t E, R, C, L, B, S, Q, block_rows, block_columns;
};

struct WeightStats {
  Typed dense;                           // [E, N], or null
  const Quantised* quantised = nullptr;  // where dense is null
  int64_t* count;                        // [E]
  double* abs_sum;                       // [E]
  double* square_sum;                    // [E]
  double* max_abs;                       // [E]
  int64_t E, N;
};

struct Dequantize {
  Quantised weight;
  void* out;    // [E, R, C]
  Dtype dtype;  // of out
};

struct SortByExpert {
  Typed idx;                   // [T, K]
  const bool* mask = nullptr;  // [T], or null
  int64_t* order;              // [T * K]
  int64_t* offsets;            // [E + 1]
  int64_t T, E, K;
};

// Rows are grouped by expert in the next three: offsets[e] to offsets[e + 1] are expert e's.
struct ExpertGram {
  const float* a;                   // [N, M]
  const float* r;                   // [T, H]
  const int64_t* tokens = nullptr;  // [N]: row n of a goes with row tokens[n] of r; or null: with row n
  const int64_t* offsets;           // [E + 1]
  const bool* mask = nullptr;       // [N], or null
  double* gram = nullptr;           // [E, M, M], or null: not wanted
  double* product;                  // [E, M, H]
  int64_t N, T, E, M, H;
};

struct GatedEnergy {
  Typed rows;                  // [N, M]
  Typed gates;                 // [N]
  const int64_t* offsets;      // [E + 1]
  const bool* mask = nullptr;  // [N], or null
  double* energy;              // [E, M]
  float* out;                  // [N, M]
  int64_t N, E, M;
};

struct ScatterResidual {
  float* r;                // [T, H]
  const float* a;          // [N, M]
  const float* delta;      // [E, M, H]
  const int64_t* tokens;   // [N]
  const int64_t* offsets;  // [E + 1]
  int64_t N, T, E, M, H;
};

namespace cpu {

// How to run, never what comes out: every number of threads and every instruction set gives the same bits.
struct Run {
  int threads = 1;
  std::string level;  // one of levels(); empty: the widest
};

std::vector<std::string> levels();  // the instruction sets of this machine, narrowest first
void router_stats(const RouterStats& args, const Run& run);
void combine_and_measure(const CombineAndMeasure& args, const Run& run);
void mixture_stats(const MixtureStats& args, const Run& run);
void similarity(const Similarity& args, const Run& run);
void sketch(const Sketch& args, const Run& run);
void vocabulary(const Vocabulary& args, const Run& run);
void popcount(const uint64_t* bits, int64_t E, int64_t W, int64_t* count, const Run& run);       // [E]
void pair_popcount(const uint64_t* bits, int64_t E, int64_t W, int64_t* count, const Run& run);  // [E, E]
void weight_stats(const WeightStats& args, const Run& run);
void dequantize(const Dequantize& args, const Run& run);
void sort_by_expert(const SortByExpert& args, int threads);
void expert_gram(const ExpertGram& args, const Run& run);
void gated_energy(const GatedEnergy& args, const Run& run);
void scatter_residual(const ScatterResidual& args, const Run& run);

}  // namespace cpu

namespace cuda {

std::string architectures();  // what the device code was compiled for; empty without CUDA
int device_count();           // visible devices that the compiled code runs on

// On a stream (a cudaStream_t) of the current device, without waiting for it. Throw what the driver has to say; values
// are not checked, and whatever they are nothing outside the arguments is touched.
void router_stats(const RouterStats& args, void* stream);
void combine_and_measure(const CombineAndMeasure& args, void* stream);
void sort_by_expert(const SortByExpert& args, void* stream);
void mixture_stats(const MixtureStats& args, void* stream);
void similarity(const Similarity& args, void* stream);
void sketch(const Sketch& args, void* stream);
void vocabulary(const Vocabulary& args, void* stream);
void popcount(const uint64_t* bits, int64_t E, int64_t W, int64_t* count, void* stream);       // [E]
void pair_popcount(const uint64_t* bits, int64_t E, int64_t W, int64_t* count, void* stream);  // [E, E]
void weight_stats(const WeightStats& args, void* stream);
void dequantize(const Dequantize& args, void* stream);
void expert_gram(const ExpertGram& args, void* stream);
void gated_energy(const GatedEnergy& args, void* stream);
void scatter_residual(const ScatterResidual& args, void* stream);

}  // namespace cuda
}  // namespace moekern
