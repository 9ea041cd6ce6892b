# The CPU kernels, compiled once per instruction set and chosen among at run time by dispatch.cpp.
include(CheckCXXSourceCompiles)

find_package(OpenMP COMPONENTS CXX)

# -ffp-contract=fast lets a * b + c become one instruction. Never -ffast-math: NaN, infinities and
# the order of sums are part of what the kernels promise.
set(REFINENET_FAST_CXX_FLAGS -Wall -Wextra -ffp-contract=fast)

function(refinenet_fast_cpu_target name)
  target_include_directories(${name} PUBLIC ${PROJECT_SOURCE_DIR}/csrc)
  target_compile_options(${name} PRIVATE ${REFINENET_FAST_CXX_FLAGS})
  if(OpenMP_CXX_FOUND)
    target_link_libraries(${name} PRIVATE OpenMP::OpenMP_CXX)
  endif()
endfunction()

add_library(refinenet_fast_cpu STATIC csrc/cpu/dispatch.cpp csrc/cpu/content_hash.cpp)
refinenet_fast_cpu_target(refinenet_fast_cpu)

set(per_isa_sources csrc/cpu/maxpool5.cpp csrc/cpu/bilinear.cpp csrc/cpu/conv3x3.cpp
    csrc/cpu/conv1x1.cpp csrc/cpu/weight_grad.cpp)
set(REFINENET_FAST_ISAS "")

function(refinenet_fast_isa isa)
  set(flags ${ARGN})
  if(flags)
    list(JOIN flags " " CMAKE_REQUIRED_FLAGS)
    # A use of the widest registers: the assembler has to accept them too.
    set(probe_avx2 "__m256 x = _mm256_fmadd_ps(a, a, a)")
    set(probe_avx512 "__m512i x = _mm512_max_epi8(_mm512_castps_si512(_mm512_castps256_ps512(a)), _mm512_setzero_si512())")
    check_cxx_source_compiles(
      "#include <immintrin.h>\nvoid f(__m256 a) { ${probe_${isa}}; (void)x; }\nint main() {}"
      REFINENET_FAST_CXX_HAS_${isa})
    if(NOT REFINENET_FAST_CXX_HAS_${isa})
      refinenet_fast_say("left out the ${isa} kernels: ${CMAKE_CXX_COMPILER} does not accept ${CMAKE_REQUIRED_FLAGS}")
      return()
    endif()
    string(TOUPPER ${isa} upper)
    target_compile_definitions(refinenet_fast_cpu PRIVATE REFINENET_FAST_HAVE_${upper}=1)
  endif()
  set(objects refinenet_fast_cpu_${isa})
  add_library(${objects} OBJECT ${per_isa_sources})
  refinenet_fast_cpu_target(${objects})
  target_compile_definitions(${objects} PRIVATE REFINENET_FAST_ISA=${isa})
  target_compile_options(${objects} PRIVATE ${flags})
  if(isa STREQUAL "avx512") # GCC 12's own intrinsics start from an undefined register, and it warns of them
    target_compile_options(${objects} PRIVATE $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized>)
  endif()
  target_sources(refinenet_fast_cpu PRIVATE $<TARGET_OBJECTS:${objects}>)
  set(REFINENET_FAST_ISAS ${REFINENET_FAST_ISAS} ${isa} PARENT_SCOPE)
endfunction()

refinenet_fast_isa(baseline)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|amd64|AMD64)$")
  refinenet_fast_isa(avx2 -mavx2 -mfma -mf16c)
  refinenet_fast_isa(avx512 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c
                     -mprefer-vector-width=512)
endif()

set(threads "OpenMP ${OpenMP_CXX_VERSION}")
if(NOT OpenMP_CXX_FOUND)
  set(threads "one thread, for want of OpenMP")
endif()
list(JOIN REFINENET_FAST_ISAS ", " isas)
set(compiler "${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}")
refinenet_fast_say("CPU kernels for ${isas}; ${threads}; ${compiler}, ${CMAKE_BUILD_TYPE}")
