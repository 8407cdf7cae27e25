#!/usr/bin/env bash
# All that only a GPU can show, in one call on a machine without a network: at most eight minutes.
#
#   tests/gpu/wheels.sh && mama pack quickstart      beforehand, where there is a network
#   OUT=results tests/gpu/device.sh [PART...]        there; PARTs of the list below, all of them by default
#
#   setup    install the carried wheels, into a folder of their own; say GPU, driver, packages, and which operators of
#            xformers are available
#   tests    tests/gpu
#   fp32     the quickstart's recipe on one GPU, killed with SIGKILL and resumed in the middle, consolidated, evaluated
#   bf16     the same in bf16, with loader processes
#   profile  five steps of the published shapes under torch.profiler
#   bench    `mama bench step --plain` at the published shapes; a row that is done stays, whatever the time limit cuts off
#
# Each part has a log $OUT/PART.log, written as it goes, and a time limit; no part's failure ends the others.
# $OUT/SUMMARY.txt says after each part how all have gone. Ends with 0 where all parts did.
#
#   OUT=runs/gpu  PYTHON=python3  WHEELS=wheels  SHARDS=runs/shards/phantom  BUDGET=480 (seconds of all parts)
#   SETTINGS= (more key=value of the recipe, to try this on a CPU: train.steps=6 train.save_every=2 eval.bootstrap=20)
set -uo pipefail
script=$(readlink -f "${BASH_SOURCE[0]}")
cd "$(dirname "$script")/../.." || exit 1

export OUT=${OUT:-runs/gpu} PYTHON=${PYTHON:-python3} WHEELS=${WHEELS:-wheels} SHARDS=${SHARDS:-runs/shards/phantom}
export SCRATCH=${SCRATCH:-} SETTINGS=${SETTINGS:-} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1
budget=${BUDGET:-480}
parts=(setup tests fp32 bf16 profile bench)
declare -A limits=([setup]=75 [tests]=240 [fp32]=180 [bf16]=180 [bench]=260 [profile]=75)

setup() {
    nvidia-smi || echo "no nvidia-smi here"
    nproc
    "$PYTHON" -m pip --disable-pip-version-check install --quiet --no-index --no-deps --no-compile \
        --target "$SCRATCH/site" "$WHEELS"/*.whl
    "$PYTHON" tests/gpu/versions.py
}

tests() {
    "$PYTHON" -m pytest tests/gpu --numprocesses 8 --dist loadgroup -p no:cacheprovider --tb=short --durations=10
}

fp32() { recipe fp32 data.workers=0; }
bf16() { recipe bf16 data.workers=4 train.compile=true; }

# One rank, as NCCL wants a GPU for each, with the same 64 pairs; the kill comes behind the first checkpoint. Half of the
# recipe's steps: where images wait for a few cores, the GPU waits too.
recipe() {
    local run=$SCRATCH/runs/$1 settings
    settings=(quickstart "name=$1" "runs=$SCRATCH/runs" "data.shards=[$SHARDS]" "train.precision=$1"
        train.ranks=1 train.micro_batch=64 train.steps=120 train.save_every=30 "${@:2}")
    # shellcheck disable=SC2206
    settings+=($SETTINGS)
    set -m # the run is a process group of its own, so that all of it can be killed
    "$PYTHON" -m mama train "${settings[@]}" &
    local training=$!
    set +m
    # shellcheck disable=SC2064
    trap "kill -KILL -- -$training 2> /dev/null || true" EXIT # where it is gone, that is no failure of this part
    trap 'exit 143' TERM
    while ! compgen -G "$run/checkpoints/step-??????/complete.json" > /dev/null && kill -0 "$training" 2> /dev/null; do sleep 0.1; done
    if ! kill -KILL -- "-$training"; then
        echo "the run ended before it could be killed"
        wait "$training"
        return 1
    fi
    wait "$training" 2> /dev/null || true
    echo "== killed behind its first checkpoint; resumed"
    "$PYTHON" -m mama train "${settings[@]}" || return
    "$PYTHON" -c 'import json, sys
for line in list(open(sys.argv[1]))[::3]:
    print({name: round(value, 4) for name, value in json.loads(line).items() if isinstance(value, int | float)})' "$run/log.jsonl"
    echo "== consolidated"
    "$PYTHON" -m mama consolidate "${settings[@]}" || return
    echo "== evaluated"
    "$PYTHON" -m mama eval "${settings[@]}" || return
    tail -n +1 "$run"/eval/*/metrics.json
}

profile() { "$PYTHON" tests/gpu/profile_step.py "$OUT"; }

bench() { "$PYTHON" -m mama bench step --rounds 2 --plain; }

# A part in a process of its own, so that it can be ended; `timeout` ends all that the part has started.
run_part() {
    local name=$1 limit=${limits[$1]} left=$((budget - SECONDS)) began=$SECONDS how
    ((limit < left)) || limit=$left
    if ((limit < 5)); then
        how="no time left"
    else
        # In a subshell that says nothing of a kill: the summary does.
        (timeout --kill-after=10 "$limit" bash "$script" --within "$name" > "$OUT/$name.log" 2>&1) 2> /dev/null
        case $? in
            0) how=ok ;;
            124 | 137) how="timed out" ;;
            *) how="failed: $(grep -v '^[[:space:]]*$' "$OUT/$name.log" | tail -n 1 | cut -c 1-100)" ;;
        esac
    fi
    printf '%-9s %4s s  %s\n' "$name" $((SECONDS - began)) "$how" >> "$OUT/SUMMARY.txt"
    printf '%-9s %4s s  %s\n' "$name" $((SECONDS - began)) "$how"
    [ "$how" = ok ]
}

if [ "${1:-}" = --within ]; then
    set -o errexit
    export PYTHONPATH=$SCRATCH/site:$PWD
    "$2"
    exit
fi

for name in "$@"; do
    [ -n "${limits[$name]:-}" ] || { echo "$name: not one of ${parts[*]}" >&2 && exit 2; }
done
mkdir -p "$OUT" && OUT=$(readlink -f "$OUT") && SHARDS=$(readlink -m "$SHARDS")
SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT
[ $# = 0 ] || parts=(setup "${@/setup/}") # the others need what it installs
date --utc > "$OUT/SUMMARY.txt"
failed=0 running=()
settle() {
    local part
    for part in "${running[@]}"; do wait "$part" || failed=1; done
    running=()
}
for name in "${parts[@]}"; do
    case $name in
        '') ;;
        tests | fp32 | bf16) # side by side, as nothing is timed in them
            run_part "$name" &
            running+=($!)
            ;;
        *)
            settle
            run_part "$name" || failed=1
            ;;
    esac
done
settle
echo "$SECONDS s together" >> "$OUT/SUMMARY.txt"
exit $failed
