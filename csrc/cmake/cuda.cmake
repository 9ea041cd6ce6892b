# Chooses whether CUDA is built, with which nvcc and for which architectures, without a GPU, and
# keeps why something was left out. Results: the target refinenet_fast_cuda, if built, and
#   REFINENET_FAST_CUDA_BUILT, REFINENET_FAST_CUDA_BUILT_ARCHS, REFINENET_FAST_CUDA_REASON
set(default_archs "80-real;90a-real;100-real")
set(default_mode auto)
if(NOT "$ENV{REFINENET_FAST_CUDA}" STREQUAL "")
  set(default_mode $ENV{REFINENET_FAST_CUDA})
endif()
set(REFINENET_FAST_CUDA ${default_mode} CACHE STRING "auto, on or off")
set(REFINENET_FAST_CUDA_ARCHS "$ENV{REFINENET_FAST_CUDA_ARCHS}" CACHE STRING
    "Architectures as in CMAKE_CUDA_ARCHITECTURES; empty: those of ${default_archs} that nvcc knows")
set(REFINENET_FAST_CUDA_OFF_BECAUSE "REFINENET_FAST_CUDA is off" CACHE STRING
    "What build_info() gives as the reason where REFINENET_FAST_CUDA is off")
set(REFINENET_FAST_CUDA_BUILT OFF)
set(REFINENET_FAST_CUDA_BUILT_ARCHS "")
set(REFINENET_FAST_CUDA_REASON "")

# Leaves CUDA out and says why, or stops where CUDA was asked for.
function(refinenet_fast_no_cuda reason)
  if(REFINENET_FAST_CUDA STREQUAL "on")
    refinenet_fast_stop("REFINENET_FAST_CUDA is on, but ${reason}")
  endif()
  set(REFINENET_FAST_CUDA_REASON "${reason}" PARENT_SCOPE)
  refinenet_fast_say("CUDA is left out: ${reason}")
endfunction()

# Builds an empty kernel for ARGN, or for nvcc's own default; error: nvcc's first complaint, if any.
function(refinenet_fast_try_nvcc error)
  set(probe ${CMAKE_BINARY_DIR}/nvcc_probe)
  file(WRITE ${probe}.cu "#include <cuda_runtime.h>\n__global__ void k() {}\n"
                         "int main() { k<<<1, 1>>>(); return cudaDeviceSynchronize(); }\n")
  set(flags -std=c++17 ${nvcc_flags})
  foreach(arch IN LISTS ARGN)
    string(REGEX REPLACE "-.*" "" number "${arch}")
    list(APPEND flags -gencode arch=compute_${number},code=sm_${number})
  endforeach()
  if(CMAKE_CUDA_HOST_COMPILER)
    list(APPEND flags -ccbin ${CMAKE_CUDA_HOST_COMPILER})
  endif()
  execute_process(COMMAND ${REFINENET_FAST_NVCC} ${flags} -o ${probe} ${probe}.cu
                  RESULT_VARIABLE status OUTPUT_VARIABLE output ERROR_VARIABLE output)
  set(complaint "")
  if(NOT status EQUAL 0)
    string(REGEX MATCH "[^\n]*([Ee]rror|fatal)[^\n]*" complaint "${output}")
    if(NOT complaint)
      set(complaint "exit status ${status}")
    endif()
    string(REGEX REPLACE "[ ;]+" " " complaint "${complaint}")
  endif()
  set(${error} "${complaint}" PARENT_SCOPE)
endfunction()

# Those of ARGN that nvcc can compile for, and why not for the others. An architecture that the
# user named has to be among them.
function(refinenet_fast_known_archs result reason)
  set(known "")
  set(left_out "")
  foreach(arch IN LISTS ARGN)
    refinenet_fast_try_nvcc(error ${arch})
    if(NOT error)
      list(APPEND known ${arch})
      continue()
    endif()
    string(REGEX REPLACE "-.*" "" number "${arch}")
    list(APPEND left_out "nvcc ${nvcc_version} does not compile for sm_${number} (${error})")
    if(REFINENET_FAST_CUDA_ARCHS)
      refinenet_fast_stop("REFINENET_FAST_CUDA_ARCHS: got \"${arch}\", but ${left_out}")
    endif()
    refinenet_fast_say("sm_${number} is left out: nvcc ${nvcc_version} does not compile for it (${error})")
  endforeach()
  list(JOIN left_out ", " left_out)
  set(${result} "${known}" PARENT_SCOPE)
  set(${reason} "${left_out}" PARENT_SCOPE)
endfunction()

if(NOT REFINENET_FAST_CUDA MATCHES "^(auto|on|off)$")
  refinenet_fast_stop("REFINENET_FAST_CUDA: expected auto, on or off, got \"${REFINENET_FAST_CUDA}\"")
elseif(REFINENET_FAST_CUDA STREQUAL "off")
  refinenet_fast_no_cuda("${REFINENET_FAST_CUDA_OFF_BECAUSE}")
  return()
endif()

find_program(REFINENET_FAST_NVCC NAMES $ENV{CUDACXX} nvcc
             HINTS $ENV{CUDA_HOME}/bin $ENV{CUDA_PATH}/bin PATHS /usr/local/cuda/bin)
if(NOT REFINENET_FAST_NVCC)
  refinenet_fast_no_cuda("no nvcc was found on this machine")
  return()
endif()

# nvcc takes the compiler that the C++ files take, unless told otherwise. Not behind a launcher
# such as CXX="ccache g++", which nvcc cannot call.
if(NOT CMAKE_CUDA_HOST_COMPILER AND "$ENV{CUDAHOSTCXX}" STREQUAL "" AND NOT CMAKE_CXX_COMPILER_ARG1)
  set(CMAKE_CUDA_HOST_COMPILER ${CMAKE_CXX_COMPILER})
elseif(NOT CMAKE_CUDA_HOST_COMPILER)
  set(CMAKE_CUDA_HOST_COMPILER $ENV{CUDAHOSTCXX})
endif()

# NVIDIA's wheels keep their libraries in lib, where their nvcc, which looks in lib64, finds none.
set(nvcc_flags "")
file(REAL_PATH ${REFINENET_FAST_NVCC} nvcc_real)
cmake_path(GET nvcc_real PARENT_PATH nvcc_bin)
if(EXISTS ${nvcc_bin}/../lib/libcudart_static.a)
  set(nvcc_flags -L${nvcc_bin}/../lib)
  string(APPEND CMAKE_CUDA_FLAGS_INIT " ${nvcc_flags}")
endif()

execute_process(COMMAND ${REFINENET_FAST_NVCC} --version OUTPUT_VARIABLE output ERROR_QUIET)
string(REGEX MATCH "V([0-9.]+)" _ "${output}")
set(nvcc_version "${CMAKE_MATCH_1}")

set(CMAKE_CUDA_ARCHITECTURES ${default_archs})
if(REFINENET_FAST_CUDA_ARCHS)
  set(CMAKE_CUDA_ARCHITECTURES ${REFINENET_FAST_CUDA_ARCHS})
endif()
foreach(arch IN LISTS CMAKE_CUDA_ARCHITECTURES)
  if(NOT arch MATCHES "^[0-9]+[af]?(-real|-virtual)?$")
    refinenet_fast_stop("REFINENET_FAST_CUDA_ARCHS: expected architectures like \"90a;120\", got \"${arch}\"")
  endif()
  string(REGEX MATCH "^[0-9]+" number "${arch}")
  if(number LESS 80) # cp.async, and mma of bfloat16
    refinenet_fast_stop("REFINENET_FAST_CUDA_ARCHS: expected sm_80 or newer, got \"${arch}\"")
  endif()
endforeach()

refinenet_fast_try_nvcc(error ${CMAKE_CUDA_ARCHITECTURES})
if(error) # nvcc itself is at fault, or an architecture
  refinenet_fast_try_nvcc(error)
  if(error)
    refinenet_fast_no_cuda("${REFINENET_FAST_NVCC} cannot compile (${error})")
    return()
  endif()
  refinenet_fast_known_archs(CMAKE_CUDA_ARCHITECTURES REFINENET_FAST_CUDA_REASON ${CMAKE_CUDA_ARCHITECTURES})
endif()
if(NOT CMAKE_CUDA_ARCHITECTURES)
  refinenet_fast_no_cuda("${REFINENET_FAST_CUDA_REASON}")
  return()
endif()

set(CMAKE_CUDA_COMPILER ${REFINENET_FAST_NVCC})
set(CMAKE_CUDA_RUNTIME_LIBRARY Static) # so that the module imports where there is no driver
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
enable_language(CUDA)

add_library(refinenet_fast_cuda STATIC csrc/cuda/conv3x3.cu csrc/cuda/conv3x3_splits.cu csrc/cuda/pool_conv3x3.cu
            csrc/cuda/weight_grad.cu csrc/cuda/maxpool5.cu csrc/cuda/bilinear.cu csrc/cuda/runtime.cu)
target_include_directories(refinenet_fast_cuda PUBLIC ${PROJECT_SOURCE_DIR}/csrc)
target_include_directories(refinenet_fast_cuda SYSTEM PUBLIC ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
# Compressed, machine code and its line numbers take a fifth.
target_compile_options(refinenet_fast_cuda PRIVATE -lineinfo -Xfatbin=-compress-all -Xcompiler=-Wall,-Wextra)

# What only sm_90a has instructions for.
set(sm90a ${CMAKE_CUDA_ARCHITECTURES})
list(FILTER sm90a INCLUDE REGEX "^90a")
if(sm90a)
  add_library(refinenet_fast_sm90a STATIC csrc/cuda/conv3x3_sm90.cu)
  set_target_properties(refinenet_fast_sm90a PROPERTIES CUDA_ARCHITECTURES "${sm90a}")
  target_include_directories(refinenet_fast_sm90a PUBLIC ${PROJECT_SOURCE_DIR}/csrc)
  target_include_directories(refinenet_fast_sm90a SYSTEM PUBLIC ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
  target_compile_options(refinenet_fast_sm90a PRIVATE -lineinfo -Xfatbin=-compress-all -Xcompiler=-Wall,-Wextra)
  target_compile_definitions(refinenet_fast_cuda PUBLIC REFINENET_FAST_SM90A)
  target_link_libraries(refinenet_fast_cuda PUBLIC refinenet_fast_sm90a)
endif()

set(REFINENET_FAST_CUDA_BUILT ON)
set(REFINENET_FAST_CUDA_BUILT_ARCHS ${CMAKE_CUDA_ARCHITECTURES})
list(JOIN CMAKE_CUDA_ARCHITECTURES ", " archs)
refinenet_fast_say("CUDA kernels for ${archs}; nvcc ${nvcc_version} (${REFINENET_FAST_NVCC})")
