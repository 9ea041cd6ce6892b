#!/usr/bin/env bash
# Runs Python with the core that `cmake --build --preset sanitize` built in place of the installed one:
#   tests/sanitized.sh tests/random_cases.py --cases 2000 --verbose
# The first access out of a tensor's bounds ends the process with a report; --verbose has named the case before it.
# PYTHON chooses the interpreter, the one that the core was built for.
set -euo pipefail
root=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")
build=${SANITIZED_BUILD:-$root/build/sanitize}
cores=("$build"/_C.*.so)
core=${cores[0]}
[[ -e $core ]] || { echo "no core in $build: cmake --preset sanitize && cmake --build --preset sanitize" >&2; exit 2; }

# A package of links to the checkout's files and to that core: it comes before an installed one.
package=$build/python/refinenet_fast
rm -rf "$package"
mkdir -p "$package"
ln -s "$root"/refinenet_fast/* "$package"
ln -sf "$core" "$package"

# The runtime has to be there before the first malloc, so that it sees every tensor's memory; it looks for the C++
# runtime's functions as it starts, and Python itself has none. Python and PyTorch leak by intent.
LD_PRELOAD=$(ldd "$core" | awk '/lib(clang_rt\.)?(asan|ubsan)|libstdc\+\+/ { print $3 }' | paste -sd:) \
  ASAN_OPTIONS=detect_leaks=0:max_malloc_fill_size=1073741824:malloc_fill_byte=255${ASAN_OPTIONS:+:$ASAN_OPTIONS} \
  UBSAN_OPTIONS=print_stacktrace=1${UBSAN_OPTIONS:+:$UBSAN_OPTIONS} \
  PYTHONPATH=$build/python${PYTHONPATH:+:$PYTHONPATH} \
  "${PYTHON:-python3}" "$@"
