#!/usr/bin/env bash
# What needs a GPU, offline from a plain checkout, in nine minutes: the tests marked gpu, the kernel tests with compiled
# kernels (elsewhere they run in Triton's interpreter), every command, the demo and ranks side by side, and then the
# benches, one after the other, goals first: steps by their kernels, whole runs, peers, scores, pairs, a harvest, steps
# of every other kind, an eager run, single operations in what is left of the time.
#   bench/gpu_check.sh [STEP ...]           all steps, or some of those below; results in $OUT, or bench/results/DEVICE
#   OUT=F bench/gpu_check.sh combine A B    what several calls have left in A and B, put together in F; needs no GPU
# It leaves bench.json, tables.md, speed.png, summary.txt and logs.tar.gz; the last two grow with every step, so that of a
# call that is ended in between `combine` makes the others. The exit status is 0 only if every step
# passed. PYTHON picks the interpreter, LIMIT the seconds of all steps (540). PEERS is a folder of wheels, or one where
# they are installed: other libraries for the peers step, which without it is reported as not run.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 SAEVLM_FAST_CACHE=${SAEVLM_FAST_CACHE:-$work/cache} HF_HUB_OFFLINE=1
wanted=("$@")
n=0
LIMIT=${LIMIT:-540}

# report OUT FILE.json...: the files in one, their tables and their picture.
report() {
    local out=$1
    shift
    "$python" -m bench.report "$@" --merge "$out/bench.json" --markdown "$out/tables.md" || return 1
    if ! grep -qE '"duties"|"score by number of images"' "$out/bench.json"; then return 0; fi # nothing to draw
    if ! "$python" -c "import matplotlib"; then echo "speed.png: not drawn, there is no matplotlib"; return 0; fi
    "$python" -m bench.report "$out/bench.json" --plot "$out/speed.png"
}

if ! [[ $LIMIT =~ ^[1-9][0-9]*$ ]]; then echo "LIMIT: $LIMIT is not a whole number of seconds above 0" >&2; exit 2; fi
if [ "${1:-}" = combine ]; then
    shift
    if [ $# -eq 0 ]; then echo "combine: no folders were named" >&2; exit 2; fi
    if [ -z "${OUT:-}" ]; then echo "combine: OUT names no folder" >&2; exit 2; fi
    for folder in "$@"; do
        if [ "$folder" -ef "$OUT" ]; then echo "combine: $folder is OUT, which is written" >&2; exit 2; fi
        if ! [ -f "$folder/summary.txt" ]; then echo "combine: there is no $folder/summary.txt" >&2; exit 2; fi
        mkdir "$work/$((++n))"
        if [ -f "$folder/bench.json" ]; then
            cp "$folder/bench.json" "$work/$n"
        elif ! tar xzf "$folder/logs.tar.gz" -C "$work/$n" --strip-components 1 json 2>/dev/null; then
            echo "combine: there is no $folder/bench.json, and no measurement in $folder/logs.tar.gz" >&2; exit 2
        fi
    done
    mkdir -p "$OUT"
    cat "${@/%//summary.txt}" >"$OUT/summary.txt" && report "$OUT" "$work"/*/*.json
    exit
fi

device=$("$python" - <<'PY'
import re
import sys

try:
    import torch
except ImportError as error:
    sys.exit(f"gpu_check: {sys.executable} cannot import torch ({error}); PYTHON names another interpreter")
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
    keep "$name"
}

# keep NAME: what every step has printed and measured so far; a call may be ended at any time.
keep() {
    tar czf "$work/$1.tar.gz" -C "$work" logs json 2>/dev/null
    mv "$work/$1.tar.gz" "$out/.logs.$1" && mv "$out/.logs.$1" "$out/logs.tar.gz"
}

# A module that cannot be imported fails its step, and the other tests are run all the same.
pytest=("$python" -m pytest -q -p no:cacheprovider --continue-on-collection-errors)
# Compiling is most of a kernel test's time: several processes where pytest-xdist is there.
if "$python" -c "import xdist" 2>/dev/null; then workers=(-n 7); else workers=(); fi
site=${PEERS:-}
if compgen -G "$site/*.whl" >/dev/null; then # beside the tests: with their bytecode, or every peer makes it when timed
    site=$work/site
    { "$python" -m pip install -q --no-index --no-deps --no-cache-dir --target "$site" "$PEERS"/*.whl \
        >"$work/logs/peers_install.log" 2>&1 || echo "peers: their wheels were not installed" | tee -a "$summary"; } &
fi
on_gpu=(tests/cli/test_on_a_gpu.py tests/training/test_short_runs_on_a_gpu.py)
step gpu_tests 150 "${pytest[@]}" tests "${workers[@]}" -m gpu "${on_gpu[@]/#/--ignore=}" &
step commands 150 "${pytest[@]}" "${on_gpu[@]}" -m gpu &
step kernel_tests 150 "${pytest[@]}" tests/kernels "${workers[@]}" -m "not gpu" -k "not static_compile" &
step demo 120 "$python" -m saevlm_fast.cli demo --device cuda --output "$work/demo" &
n_gpus=$("$python" -c "import torch; print(torch.cuda.device_count())")
# One rank of one GPU runs the same code, and tells nobody anything.
step ranks 90 "$python" -m torch.distributed.run --standalone --nproc-per-node "$((n_gpus < 2 ? 1 : 2))" \
    -m bench.training.ranks_on_gpus &
wait

# From here on one at a time: these are timed. What has a goal comes first, since what is left of the time is the last's.
json=$work/json
# profile D_IN D_SAE: a step by its kernels.
profile() {
    step "profile_$2" 45 "$python" -m bench.training.profile_step --d-in "$1" --d-sae "$2" --output "$json/profile_$2.json"
}
# whole_run NAME SECONDS ARGUMENT...: `train` at 16,384 latents, x16 of 1024. Of as many concepts as latents none dies at
# first; of two for every column thousands do.
whole_run() {
    local name=$1 seconds=$2
    shift 2
    step "$name" "$seconds" "$python" -m bench.training.whole_run --device cuda --architecture topk --d-in 1024 \
        --d-sae 16384 --batch-size 4096 --n-rows 200000 "$@" --output "$json/$name.json"
}
# peers D_IN D_SAE: a TopK step in turns with those of other libraries.
peers() {
    step "peers_$2" 55 env PYTHONPATH="$PWD:$site" "$python" -m bench.training.bench_peers --device cuda \
        --dtype bfloat16 --architectures topk --d-in "$1" --d-sae "$2" --rows 4096 --rounds 3 --turn-seconds 0.3 \
        --peers dictionary-learning sae-lens sparsify --output "$json/peers_$2.json"
}
# benches NAME SECONDS -k WHICH: some of `pytest bench`, large sizes included; none is begun in the last 25 s.
benches() {
    local name=$1 seconds
    seconds=$(left "$2")
    shift 2
    step "$name" "$seconds" "${pytest[@]}" bench --benchmark-only --benchmark-columns=min,median,rounds --large \
        --time-limit=$((seconds - 25)) --benchmark-json="$json/$name.json" "$@"
}
profile 768 6144
profile 1024 16384
profile 1024 65536
many_concepts=(--concepts 16384 --concepts-per-row 20)
# 20,000 steps of the recipe's 110,000: in short runs the start and a checkpoint weigh.
whole_run train_long 60 "${many_concepts[@]}" --steps 20000
whole_run train_dead 40 --steps 5000
whole_run train_host 30 "${many_concepts[@]}" --steps 3000 --data-on host
if [ -n "$site" ]; then
    peers 1024 65536
    peers 1024 16384
    peers 768 6144
else
    echo "peers: not run, PEERS names no folder of wheels" | tee -a "$summary"
fi
step scores 40 "$python" -m bench.scoring.scores_on_device --output "$json/scores.json"
benches pairs 60 -k "(dense_pairs or score_by_n) and not block_loop"
step harvest 50 "$python" -m bench.harvesting.whole_harvest --images 4608 --workers 12 --output "$json/harvest.json"
step other_steps 50 "$python" -m bench.training.other_steps --output "$json/other_steps.json"
whole_run train_eager 35 "${many_concepts[@]}" --steps 2000 --eager
# What ours is compared with is timed beside it: benches of its own add no ratio.
benches bench 130 -k "not (dense_pairs or score_by_n or -dense or block_loop or double_loop)"
for name in "${wanted[@]}"; do
    if [ ! -e "$work/known.$name" ]; then
        touch "$work/failed.$name"
        echo "$name: there is no such step" | tee -a "$summary"
    fi
done
if compgen -G "$json/*.json" >/dev/null; then report "$out" "$json"/*.json || touch "$work/failed.report"; fi
keep all
failed=$(cd "$work" && ls failed.* 2>/dev/null | sed 's/failed.//' | tr '\n' ' ')
if [ -n "$failed" ]; then echo "gpu_check: FAILED: $failed" | tee -a "$summary"; exit 1; fi
echo "gpu_check: passed" | tee -a "$summary"
