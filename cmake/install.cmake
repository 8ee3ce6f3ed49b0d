# `cmake --install` and find_package(flashdelta); a wheel takes only the library, into the Python package.
if(SKBUILD)
  install(TARGETS flashdelta LIBRARY DESTINATION flashdelta COMPONENT python)
  return()
endif()

include(CMakePackageConfigHelpers)
set(config_dir ${CMAKE_INSTALL_LIBDIR}/cmake/flashdelta)
install(TARGETS flashdelta EXPORT flashdelta-targets LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(DIRECTORY include/flashdelta DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT flashdelta-targets NAMESPACE flashdelta:: FILE flashdelta-config.cmake DESTINATION ${config_dir})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/flashdelta-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/flashdelta-config-version.cmake DESTINATION ${config_dir})
