// Descriptions of a matrix for the tensor memory accelerator. cuTensorMapEncodeTiled is fetched from the driver at run
// time, so that the library loads where there is no driver.
#pragma once

#include <cstdint>

#include "argument_checks.h"
#include "cuda/hopper.cuh"
#include "hpa/types.h"

namespace hpa::cuda {

struct EncodeTiled {
  Status status;
  decltype(&cuTensorMapEncodeTiled) function;
};

inline EncodeTiled find_encode_tiled() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
  const Status asked =
      checked(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result),
              "the driver could not be asked for cuTensorMapEncodeTiled");
  if (!asked.ok()) return {asked, nullptr};
  if (result != cudaDriverEntryPointSuccess || found == nullptr) {
    return {Status::unavailable("the driver has no cuTensorMapEncodeTiled: it is older than CUDA 12.0"), nullptr};
  }
  return {Status{}, reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found)};
}

// x is cut into boxes of box_rows x box_columns elements; in shared memory a box's rows lie 128 bytes apart, and the
// eight 16-byte chunks of row r are permuted by r % 8 (128-byte swizzle). The rows of a 16-bit x must begin on 16-byte
// boundaries.
inline Status encode_tensor_map(CUtensorMap* map, const ConstMatrix& x, int box_columns, int box_rows) {
  static const EncodeTiled encode = find_encode_tiled();
  HPA_RETURN_UNLESS_OK(encode.status);
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(x.columns), static_cast<cuuint64_t>(x.rows)};
  const std::int64_t stride = x.rows > 1 ? x.row_stride : round_up<std::int64_t>(x.columns, 8);
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride) * size_of(x.dtype)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult outcome = encode.function(
      map, x.dtype == DType::float16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2,
      const_cast<void*>(x.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (outcome == CUDA_SUCCESS) return {};
  return {StatusCode::device_error, "cuTensorMapEncodeTiled refused x", static_cast<std::int32_t>(outcome)};
}

}  // namespace hpa::cuda
