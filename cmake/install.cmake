# `cmake --install build` gives C++ users the headers, the static library and a CMake package:
#   find_package(hpa CONFIG REQUIRED); target_link_libraries(app PRIVATE hpa::hpa)
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)
install(TARGETS hpa EXPORT hpaTargets ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT cpp)
install(DIRECTORY csrc/include/hpa DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} COMPONENT cpp)
install(EXPORT hpaTargets NAMESPACE hpa:: DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/hpa COMPONENT cpp)
set(HPA_DEPENDENCIES "find_dependency(Threads)\n")
if(HPA_HAS_CUDA)
  string(APPEND HPA_DEPENDENCIES "find_dependency(CUDAToolkit)\n")
endif()
file(WRITE ${CMAKE_CURRENT_BINARY_DIR}/hpaConfig.cmake
  "include(CMakeFindDependencyMacro)\n${HPA_DEPENDENCIES}"
  "include(\${CMAKE_CURRENT_LIST_DIR}/hpaTargets.cmake)\n")
write_basic_package_version_file(${CMAKE_CURRENT_BINARY_DIR}/hpaConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/hpaConfig.cmake ${CMAKE_CURRENT_BINARY_DIR}/hpaConfigVersion.cmake
  DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/hpa COMPONENT cpp)
