#!/usr/bin/env bash
# Tests as on two GPUs, where there is none: bash tests/on_pretended_gpu.sh [pytest's arguments]
#
# torch believes in two GPUs whose memory is the host's: its CUDA tensors, streams, events, graphs and allocators are
# real, the work is done by the CPU and by Triton's interpreter, and gloo carries what ranks tell each other. So every line
# of Python that only a GPU reaches is run: devices that are mixed, waits within a capture, races between streams, pinned
# memory that is reused too soon and kernels that leave their arguments are found. Nothing is timed, and nothing is said of
# what the compiler makes of a kernel.
#
# It needs Linux, gcc and a torch that is built for CUDA 13. A step takes seconds.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
headers=$("$python" - <<'PY'
import pathlib
import sys

import torch

if not (torch.version.cuda or "").startswith("13."):
    sys.exit(f"on_pretended_gpu: torch {torch.__version__} is not built for CUDA 13")
site = pathlib.Path(torch.__file__).parents[1]
# Of torch's own CUDA, and what its wheel of headers lacks.
places = f"nvidia/cu{torch.version.cuda.split('.')[0]}", "nvidia/cuda_runtime", "triton/backends/nvidia"
print(*(f"-I{site / place / 'include'}" for place in places))
PY
)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# shellcheck disable=SC2086
gcc -Wall -Werror=implicit-function-declaration -shared -fPIC -O1 -Wl,-soname,libcuda.so.1 $headers tests/pretended_gpu/cudart.c -o "$scratch/libcuda.so.1"
export LD_PRELOAD=$scratch/libcuda.so.1 PYTHONPATH=$PWD/tests/pretended_gpu/site:$PWD/tests:$PWD/tests/helpers:$PWD
pytest=("$python" -m pytest -q -p no:cacheprovider -p pretended_gpu.plugin)
benches=()
if [ $# -eq 0 ]; then
    set -- tests/pretended_gpu tests/cli/test_on_a_gpu.py tests/cli/test_ranks_on_gpus.py \
        tests/training/test_short_runs_on_a_gpu.py tests/data tests/harvesting \
        tests/steering tests/towers tests/test_sparse_codes.py
    # Steerability's attacks take seven minutes there, and are a command's among the tests.
    benches=(bench --benchmark-only --benchmark-disable-gc --benchmark-columns=min -k "smoke and not steerability")
fi
# What asks for a compiler's GPU, or for the bits of its arithmetic.
"${pytest[@]}" -m gpu "$@" \
    --deselect tests/towers/test_forwards.py::test_a_gpu_tower_in_bfloat16_gives_the_same_bits_with_the_kernel \
    --deselect "tests/towers/test_hooks.py::test_on_a_gpu[True]"
if [ ${#benches[@]} -gt 0 ]; then "${pytest[@]}" "${benches[@]}"; fi
