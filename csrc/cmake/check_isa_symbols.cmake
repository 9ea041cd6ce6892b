# A test: cmake -DNM=<nm> -DISA=<instruction set> -DOBJECTS=<its object files> -P check_isa_symbols.cmake
# The linker keeps one of several weak functions of one name, say of an inline function's copies. Had an object for
# AVX-512 one outside its own namespace, that could come to run on a processor without AVX-512.
foreach(object IN LISTS OBJECTS)
  execute_process(COMMAND ${NM} -C --defined-only ${object} OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "[^\n]* W [^\n]*" weak "${symbols}")
  list(FILTER weak EXCLUDE REGEX "::${ISA}::")
  if(weak)
    message(SEND_ERROR "${object} has a weak function; make it static: ${weak}")
  endif()
endforeach()
