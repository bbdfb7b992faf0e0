// gram on Hopper (sm_90a), 16-bit dtypes: products of whole warpgroups (wgmma) on tiles that the tensor memory
// accelerator brings in. The method and the results are gram.cu's. The samples of a list are cut into stages of 64
// tokens, padded with the zeros that the accelerator writes outside a tensor. Emulated on the CPU only; not yet run on
// a GPU (docs/kernels.md).
#include <cstring>

#include "cuda/check.cuh"
#include "cuda/gram_sm90.cuh"
#include "cuda/gram_sm90_kernel.cuh"
#include "cuda/gram_tile.cuh"
#include "cuda/tensor_map.cuh"

namespace hpa::cuda {
namespace {

using namespace sm90;

Job job_of(const GramSample* samples, std::int64_t count) {
  Job job{};
  std::int64_t tokens = 0, stages = 0;
  for (std::int64_t s = 0; s < count; ++s) {
    tokens += samples[s].x.rows;
    stages += ceil_div<std::int64_t>(samples[s].x.rows, kStageTokens);
  }
  const std::int64_t columns = samples[0].x.columns;
  job.in = static_cast<int>(columns);
  job.side = static_cast<int>(ceil_div<std::int64_t>(columns, kTile));
  job.tiles = static_cast<int>(tiles_of(columns));
  job.stages = static_cast<int>(stages);
  job.stages_per_split = static_cast<int>(ceil_div(stages, wanted_splits(job.tiles, tokens)));
  job.splits = ceil_div(job.stages, job.stages_per_split);
  return job;
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
    if (x.dtype == DType::float32 || !rows_aligned16(x) || x.rows > kMostTokens / count) return false;
    if (x.rows > 1 && x.row_stride * 2 >= std::int64_t{1} << 40) return false;  // bytes, of a tensor map
  }
  return count > 0;
}

std::size_t wgmma_workspace_bytes(const GramSample* samples, std::int64_t count) {
  const Job job = job_of(samples, count);
  return part_bytes(job.splits, job.tiles);
}

Status wgmma_accumulate(const GramSample* samples, std::int64_t count, float* gram, std::int64_t gram_stride,
                        void* workspace, Stream stream) {
  Job job = job_of(samples, count);
  HPA_REQUIRE(static_cast<std::int64_t>(job.tiles) * job.splits <= kMaximumGrid / 4, "x: too many columns");
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

  int device = 0, multiprocessors = 0;  // how many share the tiles changes no bit of the result
  HPA_RETURN_UNLESS_OK(checked(cudaGetDevice(&device), "no current device"));
  HPA_RETURN_UNLESS_OK(checked(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
                               "the device's number of multiprocessors could not be read"));
  const dim3 grid = grid_of(smaller(job.tiles * job.splits, multiprocessors));
  const Status multiplied = with_bool(masked, [&](auto flag) {
    constexpr bool kMasked = decltype(flag)::value;
    return samples[0].x.dtype == DType::float16
               ? launch(multiply_tiles<Float16, kMasked>, grid, kThreads, kSharedBytes, stream, table, job)
               : launch(multiply_tiles<BFloat16, kMasked>, grid, kThreads, kSharedBytes, stream, table, job);
  });
  if (!multiplied.ok() || job.splits <= 1) return multiplied;
  return add_gram_parts(job.parts, job.splits, job.tiles, gram, gram_stride, job.in, stream);
}

}  // namespace hpa::cuda
