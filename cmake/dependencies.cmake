# Where the dependencies come from: the system's packages, else a download of the same release.
include(FetchContent)

find_package(OpenMP REQUIRED COMPONENTS CXX)

# Highway: its headers only. Kernels use static dispatch, so the library does not need libhwy.so at run time.
find_path(FLASHDELTA_HWY_INCLUDE hwy/highway.h DOC "Folder that holds hwy/highway.h")
if(NOT FLASHDELTA_HWY_INCLUDE)
  message(STATUS "Highway headers not found (Debian: libhwy-dev); fetching them")
  FetchContent_Declare(highway URL https://github.com/google/highway/archive/refs/tags/1.0.3.tar.gz
                               SOURCE_SUBDIR none)
  FetchContent_MakeAvailable(highway)
  set(FLASHDELTA_HWY_INCLUDE ${highway_SOURCE_DIR} CACHE PATH "" FORCE)
endif()

# GoogleTest for tests/CMakeLists.txt: GTest::gtest, GTest::gtest_main.
macro(flashdelta_find_googletest)
  find_package(GTest QUIET)
  if(NOT GTest_FOUND)
    message(STATUS "GoogleTest not found (Debian: libgtest-dev); fetching it")
    FetchContent_Declare(googletest URL https://github.com/google/googletest/archive/refs/tags/release-1.12.1.tar.gz)
    set(INSTALL_GTEST OFF)
    FetchContent_MakeAvailable(googletest)
    if(NOT TARGET GTest::gtest)
      add_library(GTest::gtest ALIAS gtest)
      add_library(GTest::gtest_main ALIAS gtest_main)
    endif()
  endif()
endmacro()

# Google Benchmark for bench/CMakeLists.txt: benchmark::benchmark.
macro(flashdelta_find_benchmark)
  find_package(benchmark QUIET)
  if(NOT benchmark_FOUND)
    message(STATUS "Google Benchmark not found (Debian: libbenchmark-dev); fetching it")
    FetchContent_Declare(benchmark URL https://github.com/google/benchmark/archive/refs/tags/v1.7.1.tar.gz)
    set(BENCHMARK_ENABLE_TESTING OFF)
    set(BENCHMARK_ENABLE_INSTALL OFF)
    FetchContent_MakeAvailable(benchmark)
  endif()
endmacro()
