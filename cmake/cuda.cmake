# The CUDA backends: sets FLASHDELTA_HAS_CUDA, and defines how src/cuda is compiled and linked.
set(FLASHDELTA_HAS_CUDA OFF)
file(GLOB cuda_sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/src/cuda/*.cu)

if(FLASHDELTA_CUDA AND cuda_sources)
  find_program(FLASHDELTA_NVCC nvcc
               HINTS $ENV{CUDACXX} $ENV{CUDA_HOME}/bin ${PROJECT_SOURCE_DIR}/build/cuda/nvidia/cu13/bin /usr/local/cuda/bin)
  if(FLASHDELTA_NVCC)
    if(NOT CMAKE_CUDA_COMPILER)
      set(CMAKE_CUDA_COMPILER ${FLASHDELTA_NVCC})
    endif()
    set(CMAKE_CUDA_ARCHITECTURES 90a-real)
    enable_language(CUDA)
    set(FLASHDELTA_HAS_CUDA ON)
  elseif(NOT FLASHDELTA_CUDA STREQUAL "AUTO")
    message(FATAL_ERROR "FLASHDELTA_CUDA=${FLASHDELTA_CUDA}, but nvcc was not found: install the CUDA toolkit (12.8 or later), "
                        "or `make cuda-toolkit` for the one on PyPI")
  endif()
endif()
message(STATUS "flashdelta ${PROJECT_VERSION}: CUDA backends ${FLASHDELTA_HAS_CUDA}")

# How a target's CUDA sources are compiled; its C++ sources find the toolkit's headers.
function(flashdelta_compile_cuda target)
  target_compile_definitions(${target} PRIVATE FLASHDELTA_CUDA)
  # -std: CMake 3.25 does not know nvcc's C++20.
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:CUDA>:-std=c++20 --expt-relaxed-constexpr -Xcompiler=-Wall,-Wextra,-fvisibility=hidden>)
  if(FLASHDELTA_WERROR)
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings>)
  endif()
  target_include_directories(${target} SYSTEM PRIVATE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
  set_target_properties(${target} PROPERTIES CUDA_RUNTIME_LIBRARY Static)
endfunction()

# Adds object libraries for src/cuda to the list `targets`: step.cu for every architecture, the rest for Hopper.
function(flashdelta_cuda_targets targets)
  set(step ${PROJECT_SOURCE_DIR}/src/cuda/step.cu)
  set(hopper ${cuda_sources})
  list(REMOVE_ITEM hopper ${step})
  if(EXISTS ${step})
    add_library(flashdelta_cuda_step OBJECT ${step})
    set_target_properties(flashdelta_cuda_step PROPERTIES CUDA_ARCHITECTURES "80-real;90-real;100-real;120")
    list(APPEND cuda_targets flashdelta_cuda_step)
  endif()
  if(hopper)
    add_library(flashdelta_cuda_sm90 OBJECT ${hopper})
    list(APPEND cuda_targets flashdelta_cuda_sm90)
  endif()
  foreach(target IN LISTS cuda_targets)
    flashdelta_compile_cuda(${target})
    target_compile_options(${target} PRIVATE -Xptxas=-v)  # tools/resources.py reads registers and spills from the output
  endforeach()
  set(${targets} ${${targets}} ${cuda_targets} PARENT_SCOPE)
endfunction()

# cudart goes in statically and finds the driver at run time: the library loads where there is none.
function(flashdelta_link_cuda target)
  set_target_properties(${target} PROPERTIES CUDA_RUNTIME_LIBRARY Static LINKER_LANGUAGE CXX)
  target_link_libraries(${target} PRIVATE ${CMAKE_DL_LIBS})
  target_link_directories(${target} PRIVATE ${CMAKE_CUDA_IMPLICIT_LINK_DIRECTORIES})
  target_link_libraries(${target} PRIVATE cudart_static rt pthread)
endfunction()
