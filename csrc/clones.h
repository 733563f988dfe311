// Marks a function that is compiled once per SIMD level and picked at run time.
#pragma once

#if defined(FASTRLHF_TARGET_CLONES)
#define FASTRLHF_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FASTRLHF_CLONES
#endif
