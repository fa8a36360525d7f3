// Inner products of the rows of all experts on one token, and of rows with a random projection. Both are products of
// row-major blocks, kDepth columns at a time, with lanes along the columns: a row is only widened, never transposed.
#include <memory>

#include "../kernels.h"
#include "parallel.h"
#include "slots.h"

namespace moekern::cpu {
namespace {

constexpr int64_t kDepth = 256;  // columns summed in 8 lanes before they join a float32 sum, in order
constexpr int64_t kRows = 3;     // rows times
constexpr int64_t kColumns = 4;  // other rows: 12 sums of 8 lanes stay in registers
constexpr int64_t kBlock = 12;   // rows that stay in L1 while the others pass
constexpr int64_t kGroupBytes = 1 << 24;  // of float32 products that wait to be added to the float64 sums
constexpr int64_t kSketchTokens = 64;     // tokens that share a projection; part of the meaning of `sketch`

constexpr int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Columns [0, n) of one row as float32, in the order of unpack, up to a multiple of 16 and zero beyond n.
template <class T>
MOEKERN_INLINE void widen(const T* row, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + 2 * kVector <= n; i += 2 * kVector) {
    Floats a, b;
    unpack(row + i, a, b);
    std::memcpy(to + i, &a, sizeof a);
    std::memcpy(to + i + kVector, &b, sizeof b);
  }
  if (i == n) return;
  T tail[2 * kVector] = {};
  std::memcpy(tail, row + i, (n - i) * sizeof(T));
  Floats a, b;
  unpack(tail, a, b);
  std::memcpy(to + i, &a, sizeof a);
  std::memcpy(to + i + kVector, &b, sizeof b);
}

// product[r, c] += <a[r], b[c]> over one block of columns; rows of a and b lie kDepth apart.
MOEKERN_INLINE void multiply_tile(const float* a, const float* b, int64_t depth, float* product, int64_t stride) {
  Floats s00 = {}, s01 = {}, s02 = {}, s03 = {}, s10 = {}, s11 = {}, s12 = {}, s13 = {}, s20 = {}, s21 = {}, s22 = {},
         s23 = {};
  for (int64_t i = 0; i < depth; i += kVector) {
    const Floats b0 = read<Floats>(b + i), b1 = read<Floats>(b + kDepth + i);
    const Floats b2 = read<Floats>(b + 2 * kDepth + i), b3 = read<Floats>(b + 3 * kDepth + i);
    const Floats a0 = read<Floats>(a + i);
    s00 += a0 * b0;
    s01 += a0 * b1;
    s02 += a0 * b2;
    s03 += a0 * b3;
    const Floats a1 = read<Floats>(a + kDepth + i);
    s10 += a1 * b0;
    s11 += a1 * b1;
    s12 += a1 * b2;
    s13 += a1 * b3;
    const Floats a2 = read<Floats>(a + 2 * kDepth + i);
    s20 += a2 * b0;
    s21 += a2 * b1;
    s22 += a2 * b2;
    s23 += a2 * b3;
  }
  float* p = product;
  p[0] += sum_of_lanes(s00), p[1] += sum_of_lanes(s01), p[2] += sum_of_lanes(s02), p[3] += sum_of_lanes(s03);
  p += stride;
  p[0] += sum_of_lanes(s10), p[1] += sum_of_lanes(s11), p[2] += sum_of_lanes(s12), p[3] += sum_of_lanes(s13);
  p += stride;
  p[0] += sum_of_lanes(s20), p[1] += sum_of_lanes(s21), p[2] += sum_of_lanes(s22), p[3] += sum_of_lanes(s23);
}

// product [n, m] += a b^T over one block of columns. Where a is b only columns at and right of a row's own are needed.
MOEKERN_INLINE void multiply(const float* a, int64_t n, const float* b, int64_t m, int64_t depth, float* product,
                             int64_t stride, bool symmetric) {
  for (int64_t block = 0; block < n; block += kBlock)
    for (int64_t c = symmetric ? block / kColumns * kColumns : 0; c < m; c += kColumns)
      for (int64_t r = block; r < std::min(block + kBlock, n); r += kRows)
        if (!symmetric || c + kColumns > r)
          multiply_tile(a + r * kDepth, b + c * kDepth, depth, product + r * stride + c, stride);
}

// All products of one token's rows: product [padded(E, kRows), stride], upper triangle.
template <class T>
MOEKERN_INLINE void multiply_token(const Similarity& args, const T* y, int64_t t, float* rows, float* product,
                                   int64_t stride) {
  std::fill(product, product + padded(args.E, kRows) * stride, 0.0f);
  for (int64_t i = 0; i < args.H; i += kDepth) {
    const int64_t n = std::min(kDepth, args.H - i);
    for (int64_t e = 0; e < args.E; ++e) {
      const T* row = y + (e * args.T + t) * args.H + i;
      for (size_t line = 0; line < n * sizeof(T); line += 64)  // this row goes on there, then the next token's
        prefetch(reinterpret_cast<const char*>(row + n) + line);
      widen(row, n, rows + e * kDepth);
    }
    multiply(rows, args.E, rows, args.E, padded(n, 2 * kVector), product, stride, true);
  }
}

// One token's squared norms, and one over the norms, 0 for rows of zeros.
void invert_norms(const Similarity& args, int64_t t, const float* product, int64_t stride, double* square,
                  double* inverse) {
  for (int64_t e = 0; e < args.E; ++e) {
    square[e] = args.norm_square ? args.norm_square[e * args.T + t] : product[e * stride + e];
    inverse[e] = square[e] == 0 ? 0 : 1 / std::sqrt(square[e]);
  }
}

MOEKERN_INLINE void add_row(const float* product, double scale, const double* inverse, int64_t n, double* gram,
                            double* cosine) {
  for (int64_t j = 0; j < n; ++j) {
    const double v = product[j];
    gram[j] += v;
    cosine[j] += v * scale * inverse[j];
  }
}

// Row i of the sums, token by token: the float64 sums have one order however tokens are divided into calls.
void add_expert(const Similarity& args, int64_t i, int64_t tokens, const float* products, int64_t size, int64_t stride,
                const double* squares, const double* inverses, Level level) {
  const int64_t E = args.E;
  double* gram = args.gram_sum + i * E;
  double* cosine = args.cosine_sum + i * E;
  for (int64_t t = 0; t < tokens; ++t) {
    const double *square = squares + t * E, *inverse = inverses + t * E;
    const double before = gram[i], cosine_before = cosine[i];
    at_level(level, [&]() __attribute__((always_inline)) {
      add_row(products + t * size + i * stride + i, inverse[i], inverse + i, E - i, gram + i, cosine + i);
    });
    gram[i] = before + square[i];
    cosine[i] = cosine_before + (square[i] == 0 ? 0 : square[i] / square[i]);
  }
}

void mirror(double* sums, int64_t E) {
  for (int64_t i = 0; i < E; ++i)
    for (int64_t j = i + 1; j < E; ++j) sums[j * E + i] = sums[i * E + j];
}

template <class T>
void run_similarity(const Similarity& args, const T* y, const Run& run) {
  const Level level = level_of(run.level);
  const int64_t E = args.E, stride = padded(E, kColumns), size = padded(E, kRows) * stride;
  std::vector<int64_t> counted;
  for (int64_t t = 0; t < args.T; ++t)
    if (!args.mask || args.mask[t]) counted.push_back(t);
  const int64_t tokens = counted.size();
  *args.tokens += tokens;
  if (E == 0 || tokens == 0) return;
  const int64_t fit = std::max<int64_t>(kGroupBytes / (4 * size), 1);
  const int64_t group = std::min(tokens, padded(fit, workers_for(tokens, run.threads)));
  const std::unique_ptr<float[]> products(new float[group * size]);
  std::vector<double> squares(group * E), inverses(group * E);
  std::vector<std::vector<float>> rows(workers_for(group, run.threads));
  for (std::vector<float>& r : rows) r.resize(padded(E, kBlock) * kDepth);

  for (int64_t first = 0; first < tokens; first += group) {
    const int64_t n = std::min(group, tokens - first);
    parallel_for(n, run.threads, [&](int64_t i, int worker) {
      float* product = products.get() + i * size;
      at_level(level, [&]() __attribute__((always_inline)) {
        multiply_token(args, y, counted[first + i], rows[worker].data(), product, stride);
      });
      invert_norms(args, counted[first + i], product, stride, squares.data() + i * E, inverses.data() + i * E);
    });
    parallel_for(E, run.threads, [&](int64_t e, int) {
      add_expert(args, e, n, products.get(), size, stride, squares.data(), inverses.data(), level);
    });
  }
  mirror(args.gram_sum, E);
  mirror(args.cosine_sum, E);
}

// The finaliser of SplitMix64: a bijection whose outputs for a counter pass as random bits.
uint64_t mixed(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

MOEKERN_INLINE float signed_one(bool positive, float) { return positive ? 1.0f : -1.0f; }
template <class Half>
MOEKERN_INLINE Half signed_one(bool positive, Half) {
  const auto one = static_cast<uint16_t>(narrowed<uint32_t>(1.0f, Half{}));
  return Half{static_cast<uint16_t>(positive ? one : one | 0x8000)};
}

// One row of a chunk's projection, +1 or -1: column h is bit h mod 64 of its word's random number.
template <class T>
void draw_row(const Sketch& args, int64_t chunk, int64_t m, std::vector<T>& row) {
  constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u;
  const uint64_t key = mixed(static_cast<uint64_t>(args.seed) + static_cast<uint64_t>(chunk + 1) * kGolden);
  const int64_t words = (args.H + 63) / 64;
  for (int64_t w = 0; w < words; ++w) {
    const uint64_t word = mixed(key + static_cast<uint64_t>(m * words + w + 1) * kGolden);
    for (int64_t h = 64 * w; h < std::min(64 * (w + 1), args.H); ++h)
      row[h] = signed_one(word >> (h % 64) & 1, T{});
  }
}

// Blocks of kDepth columns, each with all rows: [blocks, rows, kDepth]; rows from M on are left as they are.
template <class T>
void draw_projection(const Sketch& args, int64_t chunk, int64_t rows, const Run& run, float* projection) {
  std::vector<std::vector<T>> scratch(workers_for(args.M, run.threads), std::vector<T>(args.H));
  parallel_for(args.M, run.threads, [&](int64_t m, int worker) {
    draw_row(args, chunk, m, scratch[worker]);
    for (int64_t i = 0; i < args.H; i += kDepth)
      widen(scratch[worker].data() + i, std::min(kDepth, args.H - i), projection + i * rows + m * kDepth);
  });
}

// Tokens [t, t + n) of one expert: products with the projection, and squared norms in the same order as similarity's.
template <class T>
MOEKERN_INLINE void sketch_rows(const Sketch& args, const T* y, int64_t n, const float* projection, int64_t stride,
                                float* rows, float* product, float* square) {
  std::fill(product, product + padded(n, kRows) * stride, 0.0f);
  std::fill(square, square + n, 0.0f);
  for (int64_t i = 0; i < args.H; i += kDepth) {
    const int64_t width = std::min(kDepth, args.H - i), depth = padded(width, 2 * kVector);
    for (int64_t r = 0; r < n; ++r) {
      widen(y + r * args.H + i, width, rows + r * kDepth);
      Floats sum = {};
      for (int64_t j = 0; j < depth; j += kVector) {
        const Floats v = read<Floats>(rows + r * kDepth + j);
        sum += v * v;
      }
      square[r] += sum_of_lanes(sum);
    }
    multiply(rows, n, projection + i * stride, args.M, depth, product, stride, false);
  }
}

template <class T>
void run_sketch(const Sketch& args, const T* y, const Run& run) {
  const Level level = level_of(run.level);
  const int64_t stride = padded(args.M, kColumns), height = padded(kSketchTokens, kBlock);
  const float scale = static_cast<float>(1 / std::sqrt(static_cast<double>(args.M)));
  struct Scratch {
    std::vector<float> rows, product;
  };
  std::vector<Scratch> scratch(workers_for(args.E, run.threads));
  for (Scratch& s : scratch) {
    s.rows.resize(height * kDepth);
    s.product.resize(height * stride);
  }
  std::vector<float> projection(padded(args.H, kDepth) * stride);
  for (int64_t t = 0; t < args.T;) {
    const int64_t chunk = (args.start + t) / kSketchTokens;
    const int64_t n = std::min(args.T - t, (chunk + 1) * kSketchTokens - (args.start + t));
    draw_projection<T>(args, chunk, stride, run, projection.data());
    parallel_for(args.E, run.threads, [&](int64_t e, int worker) {
      Scratch& s = scratch[worker];
      const int64_t row = e * args.T + t;
      at_level(level, [&]() __attribute__((always_inline)) {
        sketch_rows(args, y + row * args.H, n, projection.data(), stride, s.rows.data(), s.product.data(),
                    args.norm_square + row);
      });
      for (int64_t r = 0; r < n; ++r)
        for (int64_t m = 0; m < args.M; ++m) args.z[(row + r) * args.M + m] = s.product[r * stride + m] * scale;
    });
    t += n;
  }
}

}  // namespace

void similarity(const Similarity& args, const Run& run) {
  with_floats(args.y, [&](const auto* y) { run_similarity(args, y, run); });
}

void sketch(const Sketch& args, const Run& run) {
  with_floats(args.y, [&](const auto* y) { run_sketch(args, y, run); });
}

}  // namespace moekern::cpu
