// Dynamic shared memory of kernels that nobody calls. Once in what is linked.
#pragma once

extern "C" {
unsigned char shared_memory[1] __asm__("_ZN14refinenet_fast4cuda12_GLOBAL__N_16sharedE");
unsigned char shared_memory_sm90[1] __asm__("_ZN14refinenet_fast4cuda4sm9012_GLOBAL__N_17dynamicE");
}
