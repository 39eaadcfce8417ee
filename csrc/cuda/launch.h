// Where the ops, which know tensors, hand over to the kernels, which do not.
#pragma once

#include <cuda_runtime_api.h>

#include "../philox_normal.h"
#include "../q_sample.h"
#include "../reverse_step.h"

namespace ddpm_fast::cuda {

// What can be numbered in 31 bits: the samples, and a sample's elements by fours.
constexpr int64_t kMostSamples = (int64_t{1} << 31) - 1;
constexpr int64_t kMostElements = 4 * ((int64_t{1} << 31) - 1);

// Each queues its kernel on the stream of the current device; cudaGetLastError() tells of failures.
template <class State, class Output>
void launch(const ReverseStepKernel<State, Output>& kernel, cudaStream_t stream);
template <class State>
void launch(const QSampleKernel<State>& kernel, cudaStream_t stream);
template <class State>
void launch(const PhiloxNormalKernel<State>& kernel, cudaStream_t stream);
void launch(const PhiloxKernel& kernel, cudaStream_t stream);

}  // namespace ddpm_fast::cuda
