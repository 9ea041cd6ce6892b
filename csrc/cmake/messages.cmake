# What the build says to people.

function(refinenet_fast_say text)
  message(STATUS "refinenet_fast: ${text}")
endfunction()

# Ends the configuration. setup.py shows the file's one sentence in place of CMake's trace.
function(refinenet_fast_stop sentence)
  file(WRITE ${CMAKE_BINARY_DIR}/why_it_stopped.txt "${sentence}")
  message(FATAL_ERROR "${sentence}")
endfunction()
