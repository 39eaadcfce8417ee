#!/usr/bin/env bash
# All that a machine with a GPU can tell of a checkout, in under eight minutes and one folder:
#
#     benchmarks/gpu.sh [FOLDER [SECONDS]]      (by default $OUT, or else gpu-results, and 470)
#
# Needs no network: python3 with a CUDA build of torch, the packages of the `dev` and `benchmarks` extras
# (diffusers and lucidrains are left out where they are missing), nvcc and compute-sanitizer; with
# pytest-xdist the tests run side by side. Each section has a time limit; one that fails lets the others
# go on, and the script exit with 1. Where the checkout comes without its history, DDPM_FAST_COMMIT may
# name the commit in the results.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-${OUT:-gpu-results}}")
deadline=${2:-470}
failed=0
mkdir -p "$out"

# section NAME LIMIT COMMAND...: runs a command, whose output goes to NAME.log, for LIMIT seconds or
# until the deadline. Stopped by an interrupt, pytest still writes what it has.
section() {
  local name=$1 limit=$2 start=$SECONDS status
  shift 2
  limit=$((limit < deadline - SECONDS ? limit : deadline - SECONDS))
  if ((limit < 5)); then
    status="no time left"
  else
    timeout --signal=INT --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1
    status=$?
  fi
  printf '%-12s %4d s, exit code: %s\n' "$name" $((SECONDS - start)) "$status" | tee -a "$out/summary.log"
  if [[ $status != 0 ]]; then
    failed=1
    tail -n 12 "$out/$name.log" 2>/dev/null
  fi
}

machine() {
  git log -1 --format='commit %H' 2>/dev/null
  nvidia-smi && nvcc --version && python3 -VV && python3 -m pip list 2>/dev/null
}

build() {
  # One architecture, the one that is here: a build for all of them takes several times as long.
  TORCH_CUDA_ARCH_LIST=$(
    python3 -c 'import torch; print(*torch.cuda.get_device_capability(), sep=".")'
  ) || return
  export TORCH_CUDA_ARCH_LIST DDPM_FAST_BUILD=cuda
  python3 -m pip install -v --no-build-isolation --no-deps -e . && ddpm-fast info
}

export -f machine build
export PYTHONUNBUFFERED=1
: >"$out/summary.log"
parallel=()
if python3 -c 'import xdist' 2>/dev/null; then
  parallel=(-n 8 --dist worksteal --benchmark-disable)
fi
kernels='formula or layouts or beside or empty or history or coefficients or holds or prefix'

section machine 20 bash -c machine
section build 160 bash -c build
section tests-cuda 120 env OMP_NUM_THREADS=2 python3 -m pytest -q "${parallel[@]}" -m 'cuda and not slow'
section benchmarks 210 python3 -m pytest benchmarks -q -k cuda --benchmark-only \
  --benchmark-json="$out/benchmarks.json"
# Without PyTorch's cache of device memory, whose blocks are larger than the tensors in them.
section sanitizer 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
  compute-sanitizer --error-exitcode 9 python3 -m pytest -q -x -m 'cuda and not slow' \
  -k "native and ($kernels) or what_else" tests/test_reverse_step.py tests/test_q_sample.py tests/test_philox.py
section tests-cpu 200 env OMP_NUM_THREADS=2 python3 -m pytest -q "${parallel[@]}" -m 'not cuda and not slow'

exit "$failed"
