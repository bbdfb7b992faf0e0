// The table of inner loops that each instruction set fills in. Drivers (cpu/<operation>.cpp) cut the work into tasks
// and call these; only the files under simd/ are compiled with instruction-set flags.
//
// This header is seen by both sides, so it holds types and constants only: an inline function here would be emitted
// by several translation units, and the linker might keep the copy that the running processor cannot execute.
#pragma once

#include <cstdint>

namespace hpa::cpu {

// Matrix products read their operands as panels: panel[k * kPanel + i], kPanel columns (or rows) side by side for
// every k. 48 is a multiple of every register tile in simd/vector.h.
constexpr std::int64_t kPanel = 48;

// Column strips of this width keep the running sums of column_scores in the first-level cache.
constexpr std::int64_t kScoreColumns = 4096;

// What inverse_diagonal needs, in one precision. Blocks are [kPanel][kPanel] and panels [k][kPanel].
template <typename T>
struct FactorKernels {
  // out[k * kPanel + r] = h[r * row_stride + k] * row_scale[r] * column_scale[k] for k < columns (a multiple of 4);
  // rows past `rows` get zeros. Returns whether everything read was finite.
  bool (*pack_scaled)(const float* h, std::int64_t row_stride, std::int64_t rows, std::int64_t columns,
                      const T* row_scale, const T* column_scale, T* out);
  // c[i * kPanel + j] -= sum over k < depth of a[k * kPanel + i] * b[k * kPanel + j]
  void (*subtract_product)(std::int64_t depth, const T* a, const T* b, T* c);
  // In-place Cholesky of the block l[column * kPanel + row], row >= column. Returns 0, or the 1-based column whose
  // pivot is not positive. `reciprocals` gets 1 / L_cc; `smallest_pivot` is lowered to the smallest pivot met.
  std::int32_t (*factor)(T* l, T* reciprocals, T* smallest_pivot);
  // x[c] = (x[c] - sum over k < c of L_ck x[k]) * reciprocals[c] for the kPanel vectors x[c * kPanel + lane]:
  // rows of X for L^-1 X, or columns of X for X L^-T.
  void (*solve)(const T* l, const T* reciprocals, T* x);
  // sums[j] = sum over rows of y[row * kPanel + j]^2
  void (*column_norms)(std::int64_t rows, const T* y, double* sums);
};

struct Kernels {
  // gram. Packs the listed tokens' columns [first_column, first_column + columns) into as many panels as they fill,
  // panel_stride elements apart; lanes past the last column get zeros. Indexed by DType.
  void (*pack_tokens[3])(const void* x, std::int64_t row_stride, const std::int64_t* tokens, std::int64_t count,
                         std::int64_t first_column, std::int64_t columns, float* out, std::int64_t panel_stride);
  // The same for bfloat16, two consecutive tokens side by side in 32 bits; an odd last token is paired with zeros.
  void (*pack_token_pairs)(const void* x, std::int64_t row_stride, const std::int64_t* tokens, std::int64_t count,
                           std::int64_t first_column, std::int64_t columns, std::uint32_t* out,
                           std::int64_t panel_stride);
  // c[i * c_stride + j] += sum over k < depth of a[k * kPanel + i] * b[k * kPanel + j]
  void (*add_product)(std::int64_t depth, const float* a, const float* b, float* c, std::int64_t c_stride);
  // The same for pairs of bfloat16; null where the instruction set has no such product. depth is a multiple of
  // pair_step.
  void (*add_pair_product)(std::int64_t depth, const std::uint32_t* a, const std::uint32_t* b, float* c,
                           std::int64_t c_stride);
  std::int64_t pair_step;
  // Where the pair product wants its first operand laid out otherwise: fills panel [depth][kPanel] up with zeros to a
  // multiple of pair_step, and writes that layout, as large, to `left`. Null where a panel serves as both.
  void (*arrange_left)(std::int64_t depth, std::uint32_t* panel, std::uint32_t* left);
  // Called by a thread before and after a run of pair products; null where there is nothing to do.
  void (*begin_products)();
  void (*end_products)();
  // out[i * out_stride + j] += c[i * c_stride + j], and the same with out transposed.
  void (*add_block)(const float* c, std::int64_t c_stride, std::int64_t rows, std::int64_t columns, float* out,
                    std::int64_t out_stride);
  void (*add_block_transposed)(const float* c, std::int64_t c_stride, std::int64_t rows, std::int64_t columns,
                               float* out, std::int64_t out_stride);

  FactorKernels<float> factor_f32;
  FactorKernels<double> factor_f64;

  // column_scores of one strip, at most kScoreColumns wide: squared_update[columns] is overwritten,
  // scalars = {<new - old, old>, ||old||^2}.
  void (*column_scores[3])(const void* w_old, std::int64_t old_stride, const void* w_new, std::int64_t new_stride,
                           std::int64_t rows, std::int64_t columns, float* squared_update, double* scalars);

  // project_merge of one row. mask null: nothing is retained.
  void (*merge_row[3])(const void* w_old, const void* w_new, const std::uint8_t* mask, float coefficient, void* out,
                       std::int64_t columns);

  // routed_lora, first product: out[t * out_stride + r] = <x[t], a[r]> for contiguous x [tokens, in], a [rows, in].
  void (*inner_products[3])(const void* x, std::int64_t tokens, const void* a, std::int64_t rows, std::int64_t in,
                            float* out, std::int64_t out_stride);
  // out[k * kPanel + r] = b[r * depth + k] in float32; lanes past `rows` get zeros.
  void (*pack_transposed[3])(const void* b, std::int64_t rows, std::int64_t depth, float* out);
  // Second product: out[t * out_stride + j] = sum over k of mid[t * mid_stride + k] * b[k * kPanel + j], j < columns.
  // Where onto is given, the sum is rounded and added to it, as far apart as out; out may be onto.
  void (*expand[3])(const float* mid, std::int64_t tokens, std::int64_t mid_stride, std::int64_t depth, const float* b,
                    const void* onto, void* out, std::int64_t out_stride, std::int64_t columns);
};

// Every file under simd/ fills in its own part, once for each instruction set it is compiled for. These run only
// where the processor has the instruction set: they are compiled with it themselves.
#define HPA_DECLARE_INSTRUCTION_SET(isa)        \
  namespace isa {                               \
  void fill_gram(Kernels& kernels);             \
  void fill_inverse_diagonal(Kernels& kernels); \
  void fill_column_scores(Kernels& kernels);    \
  void fill_project_merge(Kernels& kernels);    \
  void fill_routed_lora(Kernels& kernels);      \
  }
HPA_DECLARE_INSTRUCTION_SET(isa_portable)
HPA_DECLARE_INSTRUCTION_SET(isa_avx2)
HPA_DECLARE_INSTRUCTION_SET(isa_avx512)
#undef HPA_DECLARE_INSTRUCTION_SET

namespace isa_avx512_bf16 {
void fill_gram_pairs(Kernels& kernels);
void fill_routed_lora_pairs(Kernels& kernels);
}  // namespace isa_avx512_bf16
namespace isa_amx_bf16 {
void fill_gram_tiles(Kernels& kernels);
}

}  // namespace hpa::cpu
