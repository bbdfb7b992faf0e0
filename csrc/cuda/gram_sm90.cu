// gram on Hopper (sm_90a): products of whole warpgroups (wgmma) on tiles that the tensor memory accelerator brings in.
// The method and the results are gram.cu's. 16-bit samples of a list are cut into stages of 64 tokens, padded with the
// zeros that the accelerator writes outside a tensor. float32 samples are split into three bfloat16 each, chunk by
// chunk of tokens, one sample behind the other in the workspace. Emulated on the CPU only; not yet run on a GPU
// (docs/kernels.md).
#include <cstring>

#include "cuda/check.cuh"
#include "cuda/gram_sm90.cuh"
#include "cuda/gram_sm90_kernel.cuh"
#include "cuda/gram_sm90_split.cuh"
#include "cuda/gram_tile.cuh"
#include "cuda/tensor_map.cuh"

namespace hpa::cuda {
namespace {

using namespace sm90;

// tokens: those that are there; stages: what they fill.
Job job_of(std::int64_t columns, std::int64_t tokens, std::int64_t stages) {
  Job job{};
  job.in = static_cast<int>(columns);
  job.side = static_cast<int>(ceil_div<std::int64_t>(columns, kTile));
  job.tiles = static_cast<int>(tiles_of(columns));
  job.stages = static_cast<int>(stages);
  job.stages_per_split = static_cast<int>(ceil_div(stages, wanted_splits(job.tiles, tokens)));
  job.splits = ceil_div(job.stages, job.stages_per_split);
  return job;
}

std::int64_t tokens_of(const GramSample* samples, std::int64_t count) {
  std::int64_t tokens = 0;
  for (std::int64_t s = 0; s < count; ++s) tokens += samples[s].x.rows;
  return tokens;
}

Job job_of_halves(const GramSample* samples, std::int64_t count) {
  std::int64_t stages = 0;
  for (std::int64_t s = 0; s < count; ++s) stages += ceil_div<std::int64_t>(samples[s].x.rows, kStageTokens);
  return job_of(samples[0].x.columns, tokens_of(samples, count), stages);
}

// How float32 samples are cut: chunks of `tokens`, the last of which may be shorter, split and multiplied in turn.
struct Chunks {
  std::int64_t tokens, columns, pitch;

  Chunks(const GramSample* samples, std::int64_t count)
      : columns(samples[0].x.columns), pitch(round_up<std::int64_t>(columns, 8)) {
    const std::int64_t fitting = kPlaneBytes / (kParts * pitch * static_cast<std::int64_t>(sizeof(BFloat16)));
    tokens =
        smaller(larger(fitting / kFloatFlushTokens * kFloatFlushTokens, kLeastChunkTokens), tokens_of(samples, count));
  }
  Job job(std::int64_t chunk_tokens) const {
    return job_of(columns, chunk_tokens, ceil_div<std::int64_t>(chunk_tokens, kStageTokens));
  }
  std::int64_t plane_size(std::int64_t chunk_tokens) const {  // elements
    return round_up<std::int64_t>(chunk_tokens, kStageTokens) * pitch;
  }
  std::size_t plane_bytes() const { return static_cast<std::size_t>(kParts * plane_size(tokens)) * sizeof(BFloat16); }
  // A shorter last chunk may be cut into more splits than the others, but not into more than are wanted of those.
  std::size_t workspace_bytes() const {
    const std::int64_t tiles = tiles_of(columns);
    return plane_bytes() + part_bytes(wanted_splits(tiles, tokens), tiles);
  }
};

// Runs the products of a job whose sizes and place in memory are set, and adds what they leave in job.parts.
template <class T, bool kMasked, class Source>
Status multiply(const Source& source, const Job& job, Stream stream) {
  HPA_REQUIRE(static_cast<std::int64_t>(job.tiles) * job.splits <= kMaximumGrid / 4, "x: too many columns");
  int device = 0, multiprocessors = 0;  // how many share the tiles changes no bit of the result
  HPA_RETURN_UNLESS_OK(checked(cudaGetDevice(&device), "no current device"));
  HPA_RETURN_UNLESS_OK(checked(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
                               "the device's number of multiprocessors could not be read"));
  const dim3 grid = grid_of(smaller(job.tiles * job.splits, multiprocessors));
  const Status multiplied =
      launch(multiply_tiles<T, kMasked, Source>, grid, kThreads, kSharedBytes, stream, source, job);
  if (!multiplied.ok() || job.splits <= 1) return multiplied;
  return add_gram_parts(job.parts, job.splits, job.tiles, job.gram, job.gram_stride, job.in, stream);
}

Status accumulate_halves(const GramSample* samples, std::int64_t count, float* gram, std::int64_t gram_stride,
                         void* workspace, Stream stream) {
  Job job = job_of_halves(samples, count);
  if (job.splits > 1) HPA_REQUIRE_WORKSPACE(workspace);
  job.gram = gram;
  job.gram_stride = gram_stride;
  job.parts = job.splits > 1 ? static_cast<float*>(workspace) : nullptr;

  Samples table{};
  bool masked = false;
  for (std::int64_t s = 0; s < count; ++s) {
    const ConstMatrix& x = samples[s].x;
    HPA_RETURN_UNLESS_OK(encode_tensor_map(&table.maps[s], x, kAtomColumns, kStageTokens));
    table.masks[s] = samples[s].token_mask;
    table.tokens[s] = static_cast<int>(x.rows);
    table.first_stage[s + 1] = table.first_stage[s] + static_cast<int>(ceil_div<std::int64_t>(x.rows, kStageTokens));
    masked = masked || samples[s].token_mask != nullptr;
  }
  return with_bool(masked, [&](auto flag) {
    constexpr bool kMasked = decltype(flag)::value;
    return samples[0].x.dtype == DType::float16 ? multiply<Float16, kMasked>(table, job, stream)
                                                : multiply<BFloat16, kMasked>(table, job, stream);
  });
}

// Splits `rows` tokens of a sample from `first` on; the last ones of a chunk with the zeros that fill its last stage.
Status split_rows(const GramSample& sample, std::int64_t first, std::int64_t rows, Splitting job, Stream stream) {
  const ConstMatrix& x = sample.x;
  job.x = static_cast<const float*>(x.data) + first * x.row_stride;
  job.mask = sample.token_mask == nullptr ? nullptr : sample.token_mask + first;
  job.x_stride = x.row_stride;
  job.rows = rows;
  job.columns = x.columns;
  return with_bool(rows_aligned16(x), [&](auto flag) {
    return launch(split_float<decltype(flag)::value>,
                  grid_of(ceil_div<std::int64_t>(job.rows_written * (job.pitch / 8), kSplitThreads)), kSplitThreads, 0,
                  stream, job);
  });
}

Status accumulate_floats(const GramSample* samples, std::int64_t count, float* gram, std::int64_t gram_stride,
                         void* workspace, Stream stream) {
  HPA_REQUIRE_WORKSPACE(workspace);
  const Chunks chunks(samples, count);
  auto* const planes = static_cast<BFloat16*>(workspace);
  std::int64_t left = tokens_of(samples, count), sample = 0, from = 0;  // where the next chunk begins
  while (left > 0) {
    const std::int64_t tokens = smaller(chunks.tokens, left), size = chunks.plane_size(tokens);
    for (std::int64_t written = 0; written < tokens;) {
      const std::int64_t rows = smaller(samples[sample].x.rows - from, tokens - written);
      Splitting splitting{};
      splitting.planes = planes + written * chunks.pitch;
      splitting.pitch = chunks.pitch;
      splitting.plane_size = size;
      splitting.rows_written = written + rows == tokens ? size / chunks.pitch - written : rows;
      HPA_RETURN_UNLESS_OK(split_rows(samples[sample], from, rows, splitting, stream));
      written += rows;
      from += rows;
      if (from == samples[sample].x.rows) {
        ++sample;
        from = 0;
      }
    }
    Job job = chunks.job(tokens);
    job.gram = gram;
    job.gram_stride = gram_stride;
    if (job.splits > 1) {
      job.parts = reinterpret_cast<float*>(static_cast<unsigned char*>(workspace) + chunks.plane_bytes());
    }
    Planes source{};
    source.rows = static_cast<int>(size / chunks.pitch);
    const ConstMatrix all{planes, DType::bfloat16, kParts * source.rows, chunks.columns, chunks.pitch};
    HPA_RETURN_UNLESS_OK(encode_tensor_map(&source.map, all, kAtomColumns, kStageTokens));
    HPA_RETURN_UNLESS_OK((multiply<BFloat16, false>(source, job, stream)));
    left -= tokens;
  }
  return {};
}

}  // namespace

Status wgmma_available() {
#ifdef HPA_CUDA_ARCHITECTURES
  if (std::strstr(HPA_CUDA_ARCHITECTURES, "90a") == nullptr) {
    return Status::unavailable("kernel: this build has no wgmma kernel, it was compiled without sm_90a");
  }
#endif
  int device = 0, major = 0, minor = 0;
  HPA_RETURN_UNLESS_OK(checked(cudaGetDevice(&device), "no current device"));
  HPA_RETURN_UNLESS_OK(checked(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
                               "the device's compute capability could not be read"));
  HPA_RETURN_UNLESS_OK(checked(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
                               "the device's compute capability could not be read"));
  if (major == 9 && minor == 0) return {};
  return Status::unavailable("kernel: wgmma needs a device of compute capability 9.0");
}

bool wgmma_takes(const GramSample* samples, std::int64_t count) {
  constexpr std::int64_t kMostTokens = std::int64_t{1} << 30;  // coordinates are 32-bit
  for (std::int64_t s = 0; s < count; ++s) {
    const ConstMatrix& x = samples[s].x;
    if (x.dtype != samples[0].x.dtype) return false;
    if (x.dtype == DType::float32) continue;  // whose parts lie as they should
    if (!rows_aligned16(x) || x.rows > kMostTokens / count) return false;
    if (x.rows > 1 && x.row_stride * 2 >= std::int64_t{1} << 40) return false;  // bytes, of a tensor map
  }
  return count > 0;
}

std::size_t wgmma_workspace_bytes(const GramSample* samples, std::int64_t count) {
  if (samples[0].x.dtype == DType::float32) {
    return Chunks(samples, count).workspace_bytes();
  }
  const Job job = job_of_halves(samples, count);
  return part_bytes(job.splits, job.tiles);
}

Status wgmma_accumulate(const GramSample* samples, std::int64_t count, float* gram, std::int64_t gram_stride,
                        void* workspace, Stream stream) {
  const bool floats = samples[0].x.dtype == DType::float32;
  return (floats ? accumulate_floats : accumulate_halves)(samples, count, gram, gram_stride, workspace, stream);
}

}  // namespace hpa::cuda
