// As much of CUDA as csrc/cuda needs, in C++: a grid of threads is a loop.
#pragma once

#include <cassert>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>

#define __global__
#define __launch_bounds__(...)

using cudaStream_t = void*;

struct alignas(8) uint2 {
  unsigned int x, y;
};
struct alignas(16) uint4 {
  unsigned int x, y, z, w;
};

struct Index3 {
  unsigned int x;
};
inline thread_local Index3 blockIdx, threadIdx;

// One for each kernel that was compiled. At the end it tells how often it was launched.
struct Launches {
  const char* kernel;
  int64_t count = 0;

  explicit Launches(const char* kernel) : kernel(kernel) {}
  ~Launches() {
    if (const char* path = std::getenv("CUDA_ON_CPU_LAUNCHES")) {
      std::ofstream(path, std::ios::app) << count << ' ' << kernel << '\n';
    }
  }
};

template <class Thread>
struct Grid {
  static Launches launches;
  static const char* name() { return __PRETTY_FUNCTION__; }
};
template <class Thread>
Launches Grid<Thread>::launches{Grid<Thread>::name()};

// From the last thread to the first, as no kernel may rely on their order.
template <class Thread>
void run_grid(unsigned int blocks, unsigned int threads, int, cudaStream_t, const Thread& thread) {
  ++Grid<Thread>::launches.count;
  for (blockIdx.x = blocks; blockIdx.x-- > 0;) {
    for (threadIdx.x = threads; threadIdx.x-- > 0;) thread();
  }
}
