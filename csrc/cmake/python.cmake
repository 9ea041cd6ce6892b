# The extension module refinenet_fast._C, and what it says about its own build.

# text as a JSON string; null where it is empty
function(refinenet_fast_json result text)
  string(REPLACE "\\" "\\\\" text "${text}")
  string(REPLACE "\"" "\\\"" text "${text}")
  string(REGEX REPLACE "[\r\n\t]+" " " text "${text}")
  set(json "\"${text}\"")
  if(text STREQUAL "")
    set(json null)
  endif()
  set(${result} "${json}" PARENT_SCOPE)
endfunction()

function(refinenet_fast_json_list result)
  list(TRANSFORM ARGN REPLACE "(.+)" "\"\\1\"")
  list(JOIN ARGN ", " items)
  set(${result} "[${items}]" PARENT_SCOPE)
endfunction()

function(refinenet_fast_write_build_info path)
  set(nvcc "")
  set(nvcc_version "")
  set(built false)
  if(REFINENET_FAST_CUDA_BUILT)
    set(built true)
    set(nvcc_version "${CMAKE_CUDA_COMPILER_VERSION}")
    # pip's copy of the wheel's compiler is gone once the build ends: its path would say nothing.
    string(REGEX REPLACE ".*/nvidia/cu[0-9]+/bin/nvcc$" "nvidia-cuda-nvcc from PyPI" nvcc "${CMAKE_CUDA_COMPILER}")
  endif()
  set(openmp false)
  if(OpenMP_CXX_FOUND)
    set(openmp true)
  endif()
  refinenet_fast_json(cxx "${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}")
  refinenet_fast_json(nvcc "${nvcc}")
  refinenet_fast_json(nvcc_version "${nvcc_version}")
  refinenet_fast_json(reason "${REFINENET_FAST_CUDA_REASON}")
  refinenet_fast_json_list(isas ${REFINENET_FAST_ISAS})
  refinenet_fast_json_list(archs ${REFINENET_FAST_CUDA_BUILT_ARCHS})
  string(CONFIGURE [=[{
    "version": "@REFINENET_FAST_VERSION@",
    "cxx_compiler": @cxx@,
    "build_type": "@CMAKE_BUILD_TYPE@",
    "openmp": @openmp@,
    "cpu_isas": @isas@,
    "cuda": {
      "built": @built@,
      "compiler": @nvcc@,
      "version": @nvcc_version@,
      "archs": @archs@,
      "reason": @reason@
    }
  }]=] json @ONLY)
  string(REGEX REPLACE "\n *" " " json "${json}") # a macro's raw string may not span lines
  # file(CONFIGURE) leaves an unchanged file alone, so nothing is compiled again.
  file(CONFIGURE OUTPUT ${path} @ONLY
       CONTENT "#pragma once\n#define REFINENET_FAST_BUILD_INFO_JSON R\"json(@json@)json\"\n")
endfunction()

# Leaves the module out and says why, or stops where it is what the build is for.
function(refinenet_fast_no_python reason)
  if(REFINENET_FAST_PYTHON STREQUAL "on")
    refinenet_fast_stop("refinenet_fast cannot be built: ${reason}")
  endif()
  refinenet_fast_say("the extension module _C is left out: ${reason}")
endfunction()

find_package(Python 3.10 COMPONENTS Interpreter Development.Module)
if(NOT Python_Development.Module_FOUND)
  refinenet_fast_no_python("no Python 3.10 or later with its C headers (python3-dev) was found")
  return()
endif()
execute_process(COMMAND ${Python_EXECUTABLE} -m pybind11 --cmakedir OUTPUT_VARIABLE pybind11_hint
                OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
find_package(pybind11 CONFIG QUIET HINTS "${pybind11_hint}")
if(NOT pybind11_FOUND)
  refinenet_fast_no_python("${Python_EXECUTABLE} has no pybind11 (pip install pybind11)")
  return()
endif()

set(generated ${CMAKE_BINARY_DIR}/generated)
refinenet_fast_write_build_info(${generated}/build_info.h)
pybind11_add_module(_C NO_EXTRAS csrc/bindings.cpp)
target_include_directories(_C PRIVATE ${generated})
target_compile_options(_C PRIVATE ${REFINENET_FAST_CXX_FLAGS})
target_link_libraries(_C PRIVATE refinenet_fast_cpu)
if(REFINENET_FAST_CUDA_BUILT)
  target_link_libraries(_C PRIVATE refinenet_fast_cuda)
  target_compile_definitions(_C PRIVATE REFINENET_FAST_WITH_CUDA=1)
endif()
if(UNIX AND NOT APPLE)
  # Nothing but the init function is exported: torch carries its own copies of libraries that are
  # linked into this module, and the two must not find each other's symbols.
  file(WRITE ${generated}/exports.map "{ global: PyInit__C; local: *; };\n")
  target_link_options(_C PRIVATE -Wl,--exclude-libs,ALL -Wl,--version-script=${generated}/exports.map)
endif()
if(CMAKE_BUILD_TYPE STREQUAL "Release")
  pybind11_strip(_C)
endif()
