#!/usr/bin/env bash
# What needs a GPU, offline from a plain checkout, in under nine minutes: the tests marked gpu, the kernel tests with
# compiled kernels (elsewhere they run in Triton's interpreter), the demo, and then the benches, one after the other:
# steps by their kernels, steps of every other kind, scores, ranks, whole runs, a harvest, single operations, peers.
#   bench/gpu_check.sh [STEP ...]        all steps, or some of those below; results in $OUT, or bench/results/DEVICE
# It leaves bench.json, tables.md, speed.png, summary.txt and logs.tar.gz. The exit status is 0 only if every step
# passed. PYTHON picks the interpreter. PEERS is a folder of wheels, or one where they are installed: other libraries
# for the peers step, which without it is reported as not run.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 SAEVLM_FAST_CACHE=${SAEVLM_FAST_CACHE:-$work/cache} HF_HUB_OFFLINE=1
wanted=("$@")
LIMIT=510 # seconds of all steps

device=$("$python" - <<'PY'
import re
import sys

import torch

if not torch.cuda.is_available():
    sys.exit(f"gpu_check: torch {torch.__version__} sees no GPU on this machine; nothing was checked")
print(re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"))
PY
) || exit 2
out=${OUT:-bench/results/$device}
mkdir -p "$out" "$work/logs" "$work/json"
summary=$out/summary.txt
echo "gpu_check: $device, $(date -u +%FT%TZ), results in $out" | tee "$summary"
nvidia-smi >"$work/logs/environment.log" 2>&1

# left MOST: seconds that are left of all, but not more than MOST.
left() { echo $((LIMIT - SECONDS < $1 ? LIMIT - SECONDS : $1)); }

# step NAME SECONDS COMMAND...: the output goes to NAME.log; its end is shown if it failed.
step() {
    local name=$1 seconds status=0 start=$SECONDS
    seconds=$(left "$2")
    shift 2
    touch "$work/known.$name"
    if [ "${#wanted[@]}" -gt 0 ] && [[ " ${wanted[*]} " != *" $name "* ]]; then return; fi
    if [ "$seconds" -lt 5 ]; then
        touch "$work/failed.$name"
        echo "$name: not run, no time is left" | tee -a "$summary"
        return
    fi
    timeout --kill-after=5 "$seconds" "$@" >"$work/logs/$name.log" 2>&1 || status=$?
    if [ "$status" -eq 124 ] || [ "$status" -eq 137 ]; then
        echo "the limit of $seconds s ended it" >>"$work/logs/$name.log"
    fi
    if [ "$status" -ne 0 ]; then
        touch "$work/failed.$name"
        tail -n 40 "$work/logs/$name.log"
    fi
    echo "$name: exit status $status after $((SECONDS - start)) s: $(tail -n 1 "$work/logs/$name.log")" |
        tee -a "$summary"
}

# A module that cannot be imported fails its step, and the other tests are run all the same.
pytest=("$python" -m pytest -q -p no:cacheprovider --continue-on-collection-errors)
# Compiling is most of a kernel test's time: several processes where pytest-xdist is there.
if "$python" -c "import xdist" 2>/dev/null; then workers=(-n 7); else workers=(); fi
step gpu_tests 150 "${pytest[@]}" tests "${workers[@]}" -m gpu &
step kernel_tests 150 "${pytest[@]}" tests/kernels "${workers[@]}" -m "not gpu" -k "not static_compile" &
step demo 150 "$python" -m saevlm_fast.cli demo --device cuda --output "$work/demo" &
wait

# From here on one at a time: these are timed. What says most comes first, since what is left of the time is the last's.
json=$work/json
shapes=("1024 65536" "1024 16384" "768 6144")
for shape in "${shapes[@]}"; do
    read -r d_in d_sae <<<"$shape"
    step "profile_$d_sae" 45 "$python" -m bench.training.profile_step --d-in "$d_in" --d-sae "$d_sae" \
        --output "$json/profile_$d_sae.json"
done
step other_steps 60 "$python" -m bench.training.other_steps --output "$json/other_steps.json"
step scores 60 "$python" -m bench.scoring.scores_on_device --output "$json/scores.json"
n_gpus=$("$python" -c "import torch; print(torch.cuda.device_count())")
# One rank of one GPU runs the same code, and tells nobody anything.
step ranks 60 "$python" -m torch.distributed.run --standalone --nproc-per-node "$((n_gpus < 2 ? 1 : 2))" \
    -m bench.training.ranks_on_gpus
for way in captured eager; do
    flag=()
    if [ "$way" = eager ]; then flag=(--eager); fi
    step "train_$way" 40 "$python" -m bench.training.whole_run --device cuda --architecture topk --d-in 1024 \
        --d-sae 16384 --batch-size 4096 --n-rows 200000 --steps 4000 "${flag[@]}" --output "$json/train_$way.json"
done
step harvest 60 "$python" -m bench.harvesting.whole_harvest --images 4608 --workers 12 --output "$json/harvest.json"
step bench 130 "${pytest[@]}" bench --benchmark-only --benchmark-columns=min,median,rounds --large \
    --time-limit=$(($(left 130) - 30)) --benchmark-json="$json/bench.json"
if [ -n "${PEERS:-}" ]; then
    site=$PEERS
    if compgen -G "$PEERS/*.whl" >/dev/null; then
        site=$work/site
        "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$PEERS"/*.whl
    fi
    for shape in "${shapes[@]}"; do
        read -r d_in d_sae <<<"$shape"
        step "peers_$d_sae" 60 env PYTHONPATH="$PWD:$site" "$python" -m bench.training.bench_peers --device cuda \
            --dtype bfloat16 --architectures topk --d-in "$d_in" --d-sae "$d_sae" --rows 4096 --rounds 3 \
            --turn-seconds 0.3 --peers dictionary-learning sae-lens sparsify --output "$json/peers_$d_sae.json"
    done
else
    echo "peers: not run, PEERS names no folder of wheels" | tee -a "$summary"
fi

for name in "${wanted[@]}"; do
    if [ ! -e "$work/known.$name" ]; then
        touch "$work/failed.$name"
        echo "$name: there is no such step" | tee -a "$summary"
    fi
done
if compgen -G "$json/*.json" >/dev/null; then
    "$python" bench/report.py "$json"/*.json --merge "$out/bench.json" --markdown "$out/tables.md" ||
        touch "$work/failed.report"
    if compgen -G "$json/peers*.json" >/dev/null || [ -e "$json/bench.json" ]; then
        "$python" bench/report.py "$out/bench.json" --plot "$out/speed.png" || touch "$work/failed.plot"
    fi
fi
tar czf "$out/logs.tar.gz" -C "$work" logs
failed=$(cd "$work" && ls failed.* 2>/dev/null | sed 's/failed.//' | tr '\n' ' ')
if [ -n "$failed" ]; then echo "gpu_check: FAILED: $failed" | tee -a "$summary"; exit 1; fi
echo "gpu_check: passed" | tee -a "$summary"
