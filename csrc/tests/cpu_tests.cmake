# Tests of the CPU core: each executable runs every instruction set this machine has.
foreach(name runtime conversion gram inverse_diagonal inverse_diagonal_rows cholesky column_scores column_mask project_merge
        routed_lora routed_lora_backward low_rank)
  add_executable(test_cpu_${name} ${CMAKE_CURRENT_SOURCE_DIR}/cpu/test_${name}.cpp)
  target_link_libraries(test_cpu_${name} PRIVATE hpa)
  target_compile_options(test_cpu_${name} PRIVATE -Wall -Wextra)
  add_test(NAME cpu_${name} COMMAND test_cpu_${name})
endforeach()

# The AMX kernel against a model of its instructions, on any processor: its source and the dispatch once more, which the
# linker takes instead of the core's, and in the test a processor that has AMX and nothing else.
add_executable(test_cpu_gram_tiles ${CMAKE_CURRENT_SOURCE_DIR}/cpu/test_gram_tiles.cpp
  ${CMAKE_CURRENT_SOURCE_DIR}/../cpu/dispatch.cpp ${CMAKE_CURRENT_SOURCE_DIR}/../cpu/simd/gram_tiles.cpp)
target_include_directories(test_cpu_gram_tiles PRIVATE
  ${CMAKE_CURRENT_SOURCE_DIR}/.. ${CMAKE_CURRENT_SOURCE_DIR}/cpu)
target_compile_definitions(test_cpu_gram_tiles PRIVATE HPA_AMX_MODEL HPA_AMX_KERNELS HPA_ISA=isa_amx_bf16)
target_compile_options(test_cpu_gram_tiles PRIVATE -Wall -Wextra -ffp-contract=off)
target_link_libraries(test_cpu_gram_tiles PRIVATE hpa)
add_test(NAME cpu_gram_tiles COMMAND test_cpu_gram_tiles)
