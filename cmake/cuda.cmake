# CUDA is built wherever nvcc is found; without it the build says so and goes on. cudart is linked statically, so the
# same binary imports and serves the CPU on machines without a driver.
set(HPA_HAS_CUDA OFF)
if(NOT HPA_CUDA STREQUAL "OFF")
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    # Ours are set on the target; the language itself only needs one to start with.
    if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
      set(CMAKE_CUDA_ARCHITECTURES 80)
    endif()
    enable_language(CUDA)
    set(HPA_HAS_CUDA ON)
  elseif(HPA_CUDA STREQUAL "ON")
    message(FATAL_ERROR "HPA_CUDA=ON, but no CUDA compiler was found; put nvcc on PATH or set CUDACXX")
  else()
    message(STATUS "hpa_ext: no nvcc found, building without CUDA kernels")
  endif()
endif()

if(HPA_HAS_CUDA)
  if(NOT DEFINED HPA_CUDA_ARCHITECTURES)
    set(HPA_CUDA_ARCHITECTURES 80-real 90a-real)
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
      list(APPEND HPA_CUDA_ARCHITECTURES 100-real 120)  # 120 with PTX, for what comes after
    else()
      list(APPEND HPA_CUDA_ARCHITECTURES 90-virtual)
    endif()
  endif()
  set(CMAKE_CUDA_STANDARD 20)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  target_sources(hpa PRIVATE
    csrc/cuda/runtime.cu
    csrc/cuda/gram.cu
    csrc/cuda/gram_sm90.cu
    csrc/cuda/inverse_diagonal.cu
    csrc/cuda/column_scores.cu
    csrc/cuda/column_mask.cu
    csrc/cuda/project_merge.cu
    csrc/cuda/routed_lora.cu
    csrc/cuda/low_rank.cu)
  set_target_properties(hpa PROPERTIES
    CUDA_ARCHITECTURES "${HPA_CUDA_ARCHITECTURES}"
    CUDA_RUNTIME_LIBRARY Static
    CUDA_VISIBILITY_PRESET hidden)
  # By name, so that it stands in the installed package too: CMake links CUDA_RUNTIME_LIBRARY only into projects that
  # enable the language CUDA themselves.
  find_package(CUDAToolkit REQUIRED)
  target_link_libraries(hpa PRIVATE CUDA::cudart_static)
  # nvcc's defaults otherwise: IEEE division and square root, subnormals kept. No fast-math, here or anywhere.
  target_compile_options(hpa PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra>)
  option(HPA_RESOURCE_REPORT "Let ptxas print the registers, shared memory and spills of every kernel" OFF)
  if(HPA_RESOURCE_REPORT)
    target_compile_options(hpa PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-Xptxas=-v>)
  endif()
  string(REPLACE ";" "," HPA_CUDA_ARCHITECTURES_TEXT "${HPA_CUDA_ARCHITECTURES}")  # a list would become several definitions
  target_compile_definitions(hpa PRIVATE
    HPA_CUDA_VERSION="${CMAKE_CUDA_COMPILER_VERSION}" HPA_CUDA_ARCHITECTURES="${HPA_CUDA_ARCHITECTURES_TEXT}")
else()
  target_sources(hpa PRIVATE csrc/cuda/absent.cpp)
endif()
