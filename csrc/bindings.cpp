// The only native file that knows Python. Tensors arrive as addresses and sizes: hpa_ext/ops/ has checked them, and
// owns memory, dispatch and streams. Every call releases the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "hpa/hpa.h"

namespace py = pybind11;
using Address = std::uintptr_t;

namespace {

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

void raise_unless_ok(hpa::Status status) {
  switch (status.code) {
    case hpa::StatusCode::ok:
      return;
    case hpa::StatusCode::invalid_argument:
      throw py::value_error(status.message);
    case hpa::StatusCode::unavailable:
      throw std::runtime_error(status.message);
    case hpa::StatusCode::device_error:
      throw std::runtime_error(std::string(status.message) + ": " + hpa::cuda::error_text(status.device_code) +
                               " (CUDA error " + std::to_string(status.device_code) + ")");
  }
}

// Runs `operation` without the GIL and turns its Status into an exception once the GIL is held again.
template <typename Operation>
void call(Operation&& operation) {
  hpa::Status status;
  {
    py::gil_scoped_release release;
    status = operation();
  }
  raise_unless_ok(status);
}

hpa::ConstMatrix matrix(Address data, int dtype, std::int64_t rows, std::int64_t columns, std::int64_t row_stride) {
  return {pointer<const void>(data), static_cast<hpa::DType>(dtype), rows, columns, row_stride};
}

// w_old, its stride, w_new, its stride, dtype, rows, columns, squared_update, inner_product, old_squared_norm
using ColumnScoresTuple = std::tuple<Address, std::int64_t, Address, std::int64_t, int, std::int64_t, std::int64_t,
                                     Address, Address, Address>;

std::vector<hpa::ColumnScoresItem> column_scores_items(const std::vector<ColumnScoresTuple>& list) {
  std::vector<hpa::ColumnScoresItem> items;
  items.reserve(list.size());
  for (const auto& [w_old, old_stride, w_new, new_stride, dtype, rows, columns, squares, inner, norm] : list) {
    items.push_back({matrix(w_old, dtype, rows, columns, old_stride),
                     matrix(w_new, dtype, rows, columns, new_stride),
                     {pointer<float>(squares), pointer<float>(inner), pointer<float>(norm)}});
  }
  return items;
}

// scores, eligible, counts (or null: count), count, mask, batch, columns
using ColumnMaskTuple = std::tuple<Address, Address, Address, std::int64_t, Address, std::int64_t, std::int64_t>;

std::vector<hpa::ColumnMaskItem> column_mask_items(const std::vector<ColumnMaskTuple>& list) {
  std::vector<hpa::ColumnMaskItem> items;
  items.reserve(list.size());
  for (const auto& [scores, eligible, counts, count, mask, batch, columns] : list) {
    items.push_back({{pointer<const float>(scores), pointer<const std::uint8_t>(eligible),
                      pointer<const std::int64_t>(counts), pointer<std::uint8_t>(mask), batch, columns},
                     count});
  }
  return items;
}

// w_old, its stride, w_new, its stride, out, its stride, dtype, rows, columns, mask, mask_rows, coefficient
using ProjectMergeTuple = std::tuple<Address, std::int64_t, Address, std::int64_t, Address, std::int64_t, int,
                                     std::int64_t, std::int64_t, Address, bool, Address>;

std::vector<hpa::ProjectMergeItem> project_merge_items(const std::vector<ProjectMergeTuple>& list) {
  std::vector<hpa::ProjectMergeItem> items;
  items.reserve(list.size());
  for (const auto& [w_old, old_stride, w_new, new_stride, out, out_stride, dtype, rows, columns, mask, mask_rows,
                    coefficient] : list) {
    items.push_back({matrix(w_old, dtype, rows, columns, old_stride),
                     matrix(w_new, dtype, rows, columns, new_stride),
                     pointer<const std::uint8_t>(mask),
                     mask_rows ? hpa::MaskAxis::output : hpa::MaskAxis::input,
                     pointer<const float>(coefficient),
                     {pointer<void>(out), static_cast<hpa::DType>(dtype), rows, columns, out_stride}});
  }
  return items;
}

void bind_cpu_lists(py::module_ m) {
  using namespace hpa;
  m.def("column_scores_list", [](const std::vector<ColumnScoresTuple>& list) {
    const std::vector<ColumnScoresItem> items = column_scores_items(list);
    call([&] { return cpu::column_scores_list(items.data(), std::ssize(items)); });
  });
  m.def("column_mask_list", [](const std::vector<ColumnMaskTuple>& list) {
    const std::vector<ColumnMaskItem> items = column_mask_items(list);
    call([&] { return cpu::column_mask_list(items.data(), std::ssize(items)); });
  });
  m.def("project_merge_list", [](const std::vector<ProjectMergeTuple>& list) {
    const std::vector<ProjectMergeItem> items = project_merge_items(list);
    call([&] { return cpu::project_merge_list(items.data(), std::ssize(items)); });
  });
}

void bind_cuda_lists(py::module_ m) {
  using namespace hpa;
  m.def("column_scores_list_workspace_bytes", [](const std::vector<ColumnScoresTuple>& list) {
    const std::vector<ColumnScoresItem> items = column_scores_items(list);
    return cuda::column_scores_list_workspace_bytes(items.data(), std::ssize(items));
  });
  m.def("column_scores_list", [](const std::vector<ColumnScoresTuple>& list, Address workspace, Address stream) {
    const std::vector<ColumnScoresItem> items = column_scores_items(list);
    call([&] {
      return cuda::column_scores_list(items.data(), std::ssize(items), pointer<void>(workspace), pointer<void>(stream));
    });
  });
  m.def("column_mask_list", [](const std::vector<ColumnMaskTuple>& list, Address stream) {
    const std::vector<ColumnMaskItem> items = column_mask_items(list);
    call([&] { return cuda::column_mask_list(items.data(), std::ssize(items), pointer<void>(stream)); });
  });
  m.def("project_merge_list", [](const std::vector<ProjectMergeTuple>& list, Address stream) {
    const std::vector<ProjectMergeItem> items = project_merge_items(list);
    call([&] { return cuda::project_merge_list(items.data(), std::ssize(items), pointer<void>(stream)); });
  });
}

// data, dtype, row stride
using FactorTuple = std::tuple<Address, int, std::int64_t>;

// D = scaling * b a for a weight [rows, columns]: a [rank, columns], b [rows, rank].
hpa::LowRankUpdate low_rank_update(const FactorTuple& a, const FactorTuple& b, std::int64_t rank, std::int64_t rows,
                                   std::int64_t columns, float scaling) {
  const auto& [a_data, a_dtype, a_stride] = a;
  const auto& [b_data, b_dtype, b_stride] = b;
  return {matrix(a_data, a_dtype, rank, columns, a_stride), matrix(b_data, b_dtype, rows, rank, b_stride), scaling};
}

// The same arguments on both devices; the workspace of scores and the stream, which come last, are 0 on the CPU.
void bind_low_rank(py::module_ m, bool cuda) {
  using namespace hpa;
  const auto scores = [cuda](Address w_old, std::int64_t stride, int dtype, std::int64_t rows, std::int64_t columns,
                             const FactorTuple& a, const FactorTuple& b, std::int64_t rank, float scaling,
                             Address squared_update, Address inner_product, Address old_squared_norm, Address workspace,
                             Address stream) {
    const ConstMatrix w = matrix(w_old, dtype, rows, columns, stride);
    const LowRankUpdate update = low_rank_update(a, b, rank, rows, columns, scaling);
    const ColumnScores result = {pointer<float>(squared_update), pointer<float>(inner_product),
                                 pointer<float>(old_squared_norm)};
    call([&] {
      return cuda ? cuda::low_rank_scores(w, update, result, pointer<void>(workspace), pointer<void>(stream))
                  : cpu::low_rank_scores(w, update, result);
    });
  };
  const auto merge = [cuda](Address w_old, std::int64_t stride, Address out, std::int64_t out_stride, int dtype,
                            std::int64_t rows, std::int64_t columns, const FactorTuple& a, const FactorTuple& b,
                            std::int64_t rank, float scaling, Address mask, bool mask_rows, Address coefficient,
                            Address stream) {
    const ConstMatrix w = matrix(w_old, dtype, rows, columns, stride);
    const LowRankUpdate update = low_rank_update(a, b, rank, rows, columns, scaling);
    const Matrix target = {pointer<void>(out), static_cast<DType>(dtype), rows, columns, out_stride};
    const MaskAxis axis = mask_rows ? MaskAxis::output : MaskAxis::input;
    const auto* keep = pointer<const std::uint8_t>(mask);
    const auto* factor = pointer<const float>(coefficient);
    call([&] {
      return cuda ? cuda::low_rank_merge(w, update, keep, axis, factor, target, pointer<void>(stream))
                  : cpu::low_rank_merge(w, update, keep, axis, factor, target);
    });
  };
  const auto add = [cuda](Address old, std::int64_t stride, Address out, std::int64_t out_stride, int dtype,
                          std::int64_t rows, std::int64_t columns, const FactorTuple& a, const FactorTuple& b,
                          std::int64_t rank, float scaling, Address gain, bool gain_rows, Address stream) {
    const ConstMatrix w = matrix(old, dtype, rows, columns, stride);
    const LowRankUpdate update = low_rank_update(a, b, rank, rows, columns, scaling);
    const Matrix target = {pointer<void>(out), static_cast<DType>(dtype), rows, columns, out_stride};
    const MaskAxis axis = gain_rows ? MaskAxis::output : MaskAxis::input;
    call([&] {
      return cuda ? cuda::low_rank_add(w, update, pointer<const float>(gain), axis, target, pointer<void>(stream))
                  : cpu::low_rank_add(w, update, pointer<const float>(gain), axis, target);
    });
  };
  if (cuda) m.def("low_rank_scores_workspace_bytes", &cuda::low_rank_scores_workspace_bytes);
  m.def("low_rank_scores", scores);
  m.def("low_rank_merge", merge);
  m.def("low_rank_add", add);
}

// a, b, scaling, onto, output, out, rank
using RoutedLoraTuple = std::tuple<Address, Address, Address, Address, Address, std::int64_t, std::int64_t>;

std::vector<hpa::RoutedLoraLinear> routed_lora_linears(const std::vector<RoutedLoraTuple>& list) {
  std::vector<hpa::RoutedLoraLinear> linears;
  linears.reserve(list.size());
  for (const auto& [a, b, scaling, onto, output, out, rank] : list) {
    linears.push_back({pointer<const void>(a), pointer<const void>(b), pointer<const float>(scaling),
                       pointer<const void>(onto), pointer<void>(output), out, rank});
  }
  return linears;
}

hpa::RoutedLoraArguments routed_lora_arguments(Address x, Address weights, int dtype, std::int64_t batch,
                                               std::int64_t tokens, std::int64_t in, std::int64_t tasks,
                                               const std::vector<hpa::RoutedLoraLinear>& linears) {
  return {pointer<const void>(x),
          pointer<const float>(weights),
          static_cast<hpa::DType>(dtype),
          batch,
          tokens,
          in,
          tasks,
          linears.data(),
          std::ssize(linears)};
}

using RoutedLoraGradientsTuple =
    std::tuple<Address, Address, Address, Address, std::int64_t, std::int64_t, Address, Address, Address>;

void bind_cpu(py::module_ m) {
  using namespace hpa;
  m.def("set_thread_count", &cpu::set_thread_count);
  m.def("thread_count", &cpu::thread_count);
  m.def("available_instruction_sets", &cpu::available_instruction_sets);
  m.def("instruction_set", &cpu::instruction_set);
  m.def("set_instruction_set",
        [](const std::string& name) { raise_unless_ok(cpu::set_instruction_set(name.c_str())); });

  m.def("gram_accumulate", [](Address x, int dtype, std::int64_t tokens, std::int64_t in, std::int64_t stride,
                              Address mask, Address gram, std::int64_t gram_stride) {
    call([&] {
      return cpu::gram_accumulate(matrix(x, dtype, tokens, in, stride), pointer<const std::uint8_t>(mask),
                                  pointer<float>(gram), gram_stride);
    });
  });
  m.def("inverse_diagonal",
        [](Address h, std::int64_t batch, std::int64_t size, std::int64_t batch_stride, std::int64_t row_stride,
           double damping, bool float64, Address diagonal, Address failed_minor, Address smallest_pivot) {
          call([&] {
            return cpu::inverse_diagonal(
                {pointer<const float>(h), batch, size, batch_stride, row_stride}, damping,
                float64 ? Precision::float64 : Precision::float32,
                {pointer<float>(diagonal), pointer<std::int32_t>(failed_minor), pointer<float>(smallest_pivot)});
          });
        });
  m.def("inverse_diagonal_of_rows", [](Address x, int dtype, std::int64_t tokens, std::int64_t in, std::int64_t stride,
                                       double damping, Address diagonal, Address squares, Address failed_minor,
                                       Address smallest_pivot, Address smallest_remainder) {
    call([&] {
      return cpu::inverse_diagonal_of_rows(
          matrix(x, dtype, tokens, in, stride), damping,
          {pointer<float>(diagonal), pointer<float>(squares), pointer<std::int32_t>(failed_minor),
           pointer<float>(smallest_pivot), pointer<float>(smallest_remainder)});
    });
  });
  m.def("cholesky_factor_size", &cpu::cholesky_factor_size);
  m.def("cholesky", [](Address s, std::int64_t size, std::int64_t row_stride, Address diagonal, Address factor,
                       Address failed_minor, Address smallest_pivot) {
    call([&] {
      return cpu::cholesky(
          matrix(s, 0, size, size, row_stride), pointer<const double>(diagonal),
          {pointer<float>(factor), pointer<std::int32_t>(failed_minor), pointer<float>(smallest_pivot)});
    });
  });
  m.def("cholesky_solve", [](Address factor, Address rows, std::int64_t count, std::int64_t size,
                             std::int64_t row_stride, Address out, std::int64_t out_stride) {
    call([&] {
      return cpu::cholesky_solve(pointer<const float>(factor), matrix(rows, 0, count, size, row_stride),
                                 {pointer<void>(out), DType::float32, count, size, out_stride});
    });
  });
  m.def("column_scores",
        [](Address w_old, std::int64_t old_stride, Address w_new, std::int64_t new_stride, int dtype, std::int64_t rows,
           std::int64_t columns, Address squared_update, Address inner_product, Address old_squared_norm) {
          call([&] {
            return cpu::column_scores(
                matrix(w_old, dtype, rows, columns, old_stride), matrix(w_new, dtype, rows, columns, new_stride),
                {pointer<float>(squared_update), pointer<float>(inner_product), pointer<float>(old_squared_norm)});
          });
        });
  m.def("column_mask",
        [](Address scores, Address eligible, Address counts, Address mask, std::int64_t batch, std::int64_t columns) {
          call([&] {
            return cpu::column_mask({pointer<const float>(scores), pointer<const std::uint8_t>(eligible),
                                     pointer<const std::int64_t>(counts), pointer<std::uint8_t>(mask), batch, columns});
          });
        });
  m.def("project_merge", [](Address w_old, std::int64_t old_stride, Address w_new, std::int64_t new_stride, Address out,
                            std::int64_t out_stride, int dtype, std::int64_t rows, std::int64_t columns, Address mask,
                            bool mask_rows, Address coefficient) {
    call([&] {
      return cpu::project_merge(matrix(w_old, dtype, rows, columns, old_stride),
                                matrix(w_new, dtype, rows, columns, new_stride), pointer<const std::uint8_t>(mask),
                                mask_rows ? MaskAxis::output : MaskAxis::input, pointer<const float>(coefficient),
                                {pointer<void>(out), static_cast<DType>(dtype), rows, columns, out_stride});
    });
  });
  m.def("routed_lora", [](Address x, Address weights, int dtype, std::int64_t batch, std::int64_t tokens,
                          std::int64_t in, std::int64_t tasks, const std::vector<RoutedLoraTuple>& list) {
    const std::vector<RoutedLoraLinear> linears = routed_lora_linears(list);
    call([&] { return cpu::routed_lora(routed_lora_arguments(x, weights, dtype, batch, tokens, in, tasks, linears)); });
  });
  // The linears: a, b_transposed, scaling, output, out, rank, a_gradient, b_transposed_gradient, gate_gradient.
  m.def("routed_lora_backward",
        [](Address x, Address weights, Address x_gradient, int dtype, std::int64_t batch, std::int64_t tokens,
           std::int64_t in, std::int64_t tasks, const std::vector<RoutedLoraGradientsTuple>& list) {
          std::vector<RoutedLoraGradients> linears;
          for (const auto& [a, b, scaling, output, out, rank, to_a, to_b, to_gate] : list) {
            linears.push_back({pointer<const void>(a), pointer<const void>(b), pointer<const float>(scaling),
                               pointer<const void>(output), out, rank, pointer<float>(to_a), pointer<float>(to_b),
                               pointer<float>(to_gate)});
          }
          call([&] {
            return cpu::routed_lora_backward({pointer<const void>(x), pointer<const float>(weights),
                                              pointer<void>(x_gradient), static_cast<DType>(dtype), batch, tokens, in,
                                              tasks, linears.data(), std::ssize(linears)});
          });
        });
}

// x, dtype, tokens, in, stride, mask
using GramSampleTuple = std::tuple<Address, int, std::int64_t, std::int64_t, std::int64_t, Address>;

std::vector<hpa::cuda::GramSample> gram_samples(const std::vector<GramSampleTuple>& list) {
  std::vector<hpa::cuda::GramSample> samples;
  for (const auto& [x, dtype, tokens, in, stride, mask] : list) {
    samples.push_back({matrix(x, dtype, tokens, in, stride), pointer<const std::uint8_t>(mask)});
  }
  return samples;
}

void bind_cuda(py::module_ m) {
  using namespace hpa;
  m.def("device_count", &cuda::device_count);

  m.def(
      "gram_workspace_bytes",
      [](int dtype, std::int64_t tokens, std::int64_t in, std::int64_t stride, int kernel) {
        return cuda::gram_workspace_bytes(matrix(0, dtype, tokens, in, stride), static_cast<cuda::GramKernel>(kernel));
      },
      py::arg("dtype"), py::arg("tokens"), py::arg("in"), py::arg("stride"), py::arg("kernel") = 0);
  m.def(
      "gram_accumulate",
      [](Address x, int dtype, std::int64_t tokens, std::int64_t in, std::int64_t stride, Address mask, Address gram,
         std::int64_t gram_stride, Address workspace, Address stream, int kernel) {
        call([&] {
          return cuda::gram_accumulate(matrix(x, dtype, tokens, in, stride), pointer<const std::uint8_t>(mask),
                                       pointer<float>(gram), gram_stride, pointer<void>(workspace),
                                       pointer<void>(stream), static_cast<cuda::GramKernel>(kernel));
        });
      },
      py::arg("x"), py::arg("dtype"), py::arg("tokens"), py::arg("in"), py::arg("stride"), py::arg("mask"),
      py::arg("gram"), py::arg("gram_stride"), py::arg("workspace"), py::arg("stream"), py::arg("kernel") = 0);
  m.def("gram_list_workspace_bytes", [](const std::vector<GramSampleTuple>& list, int kernel) {
    const std::vector<cuda::GramSample> samples = gram_samples(list);
    return cuda::gram_list_workspace_bytes(samples.data(), std::ssize(samples), static_cast<cuda::GramKernel>(kernel));
  });
  m.def("gram_accumulate_list", [](const std::vector<GramSampleTuple>& list, Address gram, std::int64_t gram_stride,
                                   Address workspace, Address stream, int kernel) {
    const std::vector<cuda::GramSample> samples = gram_samples(list);
    call([&] {
      return cuda::gram_accumulate_list(samples.data(), std::ssize(samples), pointer<float>(gram), gram_stride,
                                        pointer<void>(workspace), pointer<void>(stream),
                                        static_cast<cuda::GramKernel>(kernel));
    });
  });
  m.def("gram_kernel_of", [](const std::vector<GramSampleTuple>& list, int kernel) {
    const std::vector<cuda::GramSample> samples = gram_samples(list);
    return static_cast<int>(
        cuda::gram_kernel_of(samples.data(), std::ssize(samples), static_cast<cuda::GramKernel>(kernel)));
  });
  m.def("inverse_diagonal_workspace_bytes", [](std::int64_t batch, std::int64_t size, bool float64) {
    return cuda::inverse_diagonal_workspace_bytes(batch, size, float64 ? Precision::float64 : Precision::float32);
  });
  m.def("inverse_diagonal", [](Address h, std::int64_t batch, std::int64_t size, std::int64_t batch_stride,
                               std::int64_t row_stride, double damping, bool float64, Address diagonal,
                               Address failed_minor, Address smallest_pivot, Address workspace, Address stream) {
    call([&] {
      return cuda::inverse_diagonal(
          {pointer<const float>(h), batch, size, batch_stride, row_stride}, damping,
          float64 ? Precision::float64 : Precision::float32,
          {pointer<float>(diagonal), pointer<std::int32_t>(failed_minor), pointer<float>(smallest_pivot)},
          pointer<void>(workspace), pointer<void>(stream));
    });
  });
  m.def("column_scores_workspace_bytes", &cuda::column_scores_workspace_bytes);
  m.def("column_scores", [](Address w_old, std::int64_t old_stride, Address w_new, std::int64_t new_stride, int dtype,
                            std::int64_t rows, std::int64_t columns, Address squared_update, Address inner_product,
                            Address old_squared_norm, Address workspace, Address stream) {
    call([&] {
      return cuda::column_scores(
          matrix(w_old, dtype, rows, columns, old_stride), matrix(w_new, dtype, rows, columns, new_stride),
          {pointer<float>(squared_update), pointer<float>(inner_product), pointer<float>(old_squared_norm)},
          pointer<void>(workspace), pointer<void>(stream));
    });
  });
  m.def("column_mask", [](Address scores, Address eligible, Address counts, Address mask, std::int64_t batch,
                          std::int64_t columns, Address stream) {
    call([&] {
      return cuda::column_mask({pointer<const float>(scores), pointer<const std::uint8_t>(eligible),
                                pointer<const std::int64_t>(counts), pointer<std::uint8_t>(mask), batch, columns},
                               pointer<void>(stream));
    });
  });
  m.def("project_merge", [](Address w_old, std::int64_t old_stride, Address w_new, std::int64_t new_stride, Address out,
                            std::int64_t out_stride, int dtype, std::int64_t rows, std::int64_t columns, Address mask,
                            bool mask_rows, Address coefficient, Address stream) {
    call([&] {
      return cuda::project_merge(matrix(w_old, dtype, rows, columns, old_stride),
                                 matrix(w_new, dtype, rows, columns, new_stride), pointer<const std::uint8_t>(mask),
                                 mask_rows ? MaskAxis::output : MaskAxis::input, pointer<const float>(coefficient),
                                 {pointer<void>(out), static_cast<DType>(dtype), rows, columns, out_stride},
                                 pointer<void>(stream));
    });
  });
  m.def("routed_lora_workspace_bytes",
        [](std::int64_t batch, std::int64_t tokens, std::int64_t tasks, const std::vector<RoutedLoraTuple>& list) {
          const std::vector<RoutedLoraLinear> linears = routed_lora_linears(list);
          return cuda::routed_lora_workspace_bytes(routed_lora_arguments(0, 0, 0, batch, tokens, 0, tasks, linears));
        });
  m.def("routed_lora",
        [](Address x, Address weights, int dtype, std::int64_t batch, std::int64_t tokens, std::int64_t in,
           std::int64_t tasks, const std::vector<RoutedLoraTuple>& list, Address workspace, Address stream) {
          const std::vector<RoutedLoraLinear> linears = routed_lora_linears(list);
          call([&] {
            return cuda::routed_lora(routed_lora_arguments(x, weights, dtype, batch, tokens, in, tasks, linears),
                                     pointer<void>(workspace), pointer<void>(stream));
          });
        });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native operations of hpa_ext; use hpa_ext.ops, which checks what this module takes on trust.";
  m.def("build_info", [] {
    const hpa::BuildInfo info = hpa::build_info();
    py::dict result;
    result["version"] = info.version;
    result["compiler"] = info.compiler;
    result["cuda_version"] = info.cuda_version;
    result["cuda_architectures"] = info.cuda_architectures;
    return result;
  });
  py::module_ on_host = m.def_submodule("cpu", "Operations on host memory.");
  py::module_ on_device = m.def_submodule("cuda", "Operations on device memory, launched on a stream.");
  bind_cpu(on_host);
  bind_cpu_lists(on_host);
  bind_low_rank(on_host, false);
  bind_cuda(on_device);
  bind_cuda_lists(on_device);
  bind_low_rank(on_device, true);
}
