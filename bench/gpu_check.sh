#!/usr/bin/env bash
# The checks that need a GPU, offline from a plain checkout, in under nine minutes:
#   bench/gpu_check.sh                   results and logs in $OUT, or in bench/results
# It runs the tests marked gpu, the kernel tests with compiled kernels (elsewhere they run in Triton's interpreter) and
# the benches, and ends with a table. The exit status is 0 only if every step passed. PYTHON picks the interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-bench/results}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
failed=()

# step NAME SECONDS COMMAND...: the command's output goes to NAME.log; its end is shown if it failed.
step() {
    local name=$1 seconds=$2 status=0 start=$SECONDS
    shift 2
    timeout --kill-after=5 "$seconds" "$@" >"$out/$name.log" 2>&1 || status=$?
    if [ "$status" -eq 124 ] || [ "$status" -eq 137 ]; then echo "the limit of $seconds s ended it" >>"$out/$name.log"; fi
    if [ "$status" -ne 0 ]; then
        failed+=("$name")
        tail -n 40 "$out/$name.log"
    fi
    echo "$name: exit status $status after $((SECONDS - start)) s: $(tail -n 1 "$out/$name.log")"
}

device=$("$python" - <<'PY'
import re
import sys

import torch

if not torch.cuda.is_available():
    sys.exit(f"gpu_check: torch {torch.__version__} sees no GPU on this machine; nothing was checked")
print(re.sub(r"[^A-Za-z0-9]+", "-", torch.cuda.get_device_name()).strip("-"))
PY
) || exit 2
mkdir -p "$out"
echo "gpu_check: $device, results in $out"

nvidia-smi >"$out/environment.log" 2>&1
# Compiling is most of a kernel test's time: several processes where pytest-xdist is there.
workers=()
if "$python" -c "import xdist" 2>/dev/null; then workers=(-n 8); fi
step gpu_tests 130 "$python" -m pytest tests -q -m gpu
step kernel_tests 150 "$python" -m pytest -q "${workers[@]}" -m "not gpu" -k "not static_compile" \
    tests/kernels
step bench 250 "$python" -m pytest bench -q --benchmark-only --benchmark-columns=min,median,rounds \
    --large --time-limit=220 --benchmark-json="$out/$device.json"

if [ -s "$out/$device.json" ]; then "$python" bench/report.py "$out/$device.json"; fi
if [ "${#failed[@]}" -gt 0 ]; then
    echo "gpu_check: FAILED: ${failed[*]}"
    exit 1
fi
echo "gpu_check: passed"
