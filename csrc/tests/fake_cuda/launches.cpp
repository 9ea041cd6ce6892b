// What csrc/bindings.cpp needs beside the launchers to be an extension module over the runtime without a GPU, and what
// tests/launched.py asks that runtime.
#include <dlfcn.h>

#include <string>

#include "cpu/content_hash.h"
#include "cpu/kernels.h"
#include "cuda_runtime.h"
#include "shared_memory.h"

namespace refinenet_fast::cpu {

const Kernels* const* available_kernels(int* count) {
  *count = 0;
  return nullptr;
}

const Kernels& kernels() {
  static const Kernels none{};
  return none;
}

bool use_isa(const char*) { return false; }

uint64_t content_hash(const void*, size_t, int) { return 0; }

}  // namespace refinenet_fast::cpu

#define EXPORTED __attribute__((visibility("default")))

extern "C" {

EXPORTED void fake_begin(int capability, int processors) {
  fake::runtime = {};
  fake::runtime.capability = capability;
  fake::runtime.processors = processors;
}

// A line for each launch since then: where its kernel lies in this library, blocks, threads of one, blocks of a
// cluster, dynamic shared memory and how much was allowed, device, stream; then every argument's bytes in hexadecimals.
EXPORTED const char* fake_launches() {
  static std::string lines;
  lines.clear();
  for (const fake::Launch& launch : fake::runtime.launches) {
    Dl_info library;
    if (!dladdr(launch.kernel, &library)) return "";
    const auto* base = static_cast<const char*>(library.dli_fbase);
    for (const int64_t number :
         {int64_t{static_cast<const char*>(launch.kernel) - base}, launch.blocks, int64_t{launch.threads},
          int64_t{launch.cluster}, static_cast<int64_t>(launch.shared), static_cast<int64_t>(launch.allowed),
          int64_t{launch.device}, reinterpret_cast<int64_t>(launch.stream)}) {
      lines += std::to_string(number) + " ";
    }
    for (const auto& argument : launch.arguments) {
      for (const unsigned char byte : argument) {
        lines += "0123456789abcdef"[byte / 16];
        lines += "0123456789abcdef"[byte % 16];
      }
      lines += " ";
    }
    lines += "\n";
  }
  return lines.c_str();
}

}  // extern "C"
