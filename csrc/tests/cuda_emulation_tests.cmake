# The CUDA kernels, compiled as C++ and run on an emulator of our own: csrc/tests/cuda_emulation/cuda_emulation.h says
# what that checks and what it does not. Needs neither nvcc nor a GPU; nothing here has touched one.
if(NOT CMAKE_SYSTEM_NAME STREQUAL "Linux")
  message(STATUS "hpa_ext: the CUDA emulation tests need ucontext and are left out on ${CMAKE_SYSTEM_NAME}")
  return()
endif()

set(HPA_EMULATED_KERNELS runtime gram gram_sm90 inverse_diagonal column_scores column_mask project_merge routed_lora
        low_rank)
set(HPA_EMULATED_SOURCES)
foreach(kernel IN LISTS HPA_EMULATED_KERNELS)
  list(APPEND HPA_EMULATED_SOURCES ${CMAKE_CURRENT_SOURCE_DIR}/../cuda/${kernel}.cu)
endforeach()
# In this directory alone; the target hpa compiles the same files with nvcc.
set_source_files_properties(${HPA_EMULATED_SOURCES} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "-xc++")

add_library(hpa_cuda_emulation STATIC EXCLUDE_FROM_ALL
  ${HPA_EMULATED_SOURCES} ${CMAKE_CURRENT_SOURCE_DIR}/cuda_emulation/cuda_emulation.cpp
  ${CMAKE_CURRENT_SOURCE_DIR}/cuda_emulation/hopper_emulation.cpp)
target_include_directories(hpa_cuda_emulation PUBLIC
  ${CMAKE_CURRENT_SOURCE_DIR}/.. ${CMAKE_CURRENT_SOURCE_DIR}/../include ${CMAKE_CURRENT_SOURCE_DIR}/cuda_emulation)
target_compile_definitions(hpa_cuda_emulation PUBLIC HPA_CUDA_EMULATION HPA_GRAM_FLUSH_TOKENS=512
  HPA_GRAM_PLANE_BYTES=262144)
target_compile_features(hpa_cuda_emulation PUBLIC cxx_std_20)
target_compile_options(hpa_cuda_emulation PUBLIC -Wall -Wextra -Wno-unknown-pragmas -Wno-psabi -ffp-contract=off)
option(HPA_EMULATION_SANITIZE "Run the CUDA emulation tests under AddressSanitizer and UBSan" OFF)
if(HPA_EMULATION_SANITIZE)
  target_compile_options(hpa_cuda_emulation PUBLIC -fsanitize=address,undefined -fno-sanitize-recover=undefined -g)
  target_link_options(hpa_cuda_emulation PUBLIC -fsanitize=address,undefined)
endif()

# The Python module with the emulated kernels in the place of the CUDA ones, so that the Python tests of the operations
# can run their CUDA cases through it: pytest --emulated-cuda=<build>/csrc/tests/emulated
option(HPA_EMULATED_PYTHON "Build the Python module on the emulated kernels" OFF)
if(HPA_EMULATED_PYTHON)
  find_package(Python COMPONENTS Interpreter Development.Module REQUIRED)
  find_package(pybind11 CONFIG REQUIRED)
  pybind11_add_module(emulated_C MODULE ${CMAKE_CURRENT_SOURCE_DIR}/../bindings.cpp)
  set_target_properties(emulated_C PROPERTIES OUTPUT_NAME _C LIBRARY_OUTPUT_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR}/emulated)
  # Its kernels come first, and so nothing of hpa's own CUDA part is taken.
  target_link_libraries(emulated_C PRIVATE hpa_cuda_emulation hpa)
endif()

foreach(operation gram gram_sm90 gram_sm90_split inverse_diagonal column_scores column_mask project_merge routed_lora
        low_rank)
  add_executable(cuda_emulation_${operation} ${CMAKE_CURRENT_SOURCE_DIR}/cuda_emulation/test_${operation}.cpp)
  target_link_libraries(cuda_emulation_${operation} PRIVATE hpa_cuda_emulation)
  add_test(NAME cuda_emulation_${operation} COMMAND cuda_emulation_${operation})
endforeach()
