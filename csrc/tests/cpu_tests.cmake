# Tests of the CPU core: each executable runs every instruction set this machine has.
foreach(name runtime conversion gram inverse_diagonal column_scores column_mask project_merge routed_lora)
  add_executable(test_cpu_${name} ${CMAKE_CURRENT_SOURCE_DIR}/cpu/test_${name}.cpp)
  target_link_libraries(test_cpu_${name} PRIVATE hpa)
  target_compile_options(test_cpu_${name} PRIVATE -Wall -Wextra)
  add_test(NAME cpu_${name} COMMAND test_cpu_${name})
endforeach()
