#!/usr/bin/env bash
# Multi-node training under Slurm: one torchrun a node, restarts inside the job, a new job when the run asks for one.
#
#   sbatch --nodes=4 --gpus-per-node=8 launch/slurm.sh [--max-restarts=N] [--max-requeues=N] \
#       +config=v3_671b run_dir=/shared/runs/v3 [key=value ...]
#
# --max-restarts (default 3): attempts that torchrun makes inside one job after a process died.
# --max-requeues (default 20): times this script puts the job back into the queue, over the job's whole life.
#
# What follows an end is read from run_dir/exit.json, because torchrun hides the exit codes of its processes:
#   0 done; 2 the user's input, never tried again; 75 stopped on request or by a fault, requeued; others are bugs.
# A job killed without a word (no exit.json, a signal) is requeued too. Five minutes before the end of its time Slurm sends
# SIGTERM: the run saves its state and ends with 75.
#
#SBATCH --job-name=deepv3
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@300
#SBATCH --output=%x-%j.log

set -euo pipefail

usage() { sed -n '2,/^$/{/^#SBATCH/d;s/^# \{0,1\}//p}' "$0"; }

restarts=3
requeues=20
run_dir=""
arguments=()
for argument in "$@"; do
    case "$argument" in
        -h | --help) usage; exit 0 ;;
        --max-restarts=*) restarts="${argument#*=}" ;;
        --max-requeues=*) requeues="${argument#*=}" ;;
        run_dir=*) run_dir="${argument#*=}"; arguments+=("$argument") ;;
        *) arguments+=("$argument") ;;
    esac
done
for number in "$restarts" "$requeues"; do
    [[ "$number" =~ ^[0-9]+$ ]] || { echo "--max-restarts and --max-requeues are numbers, not '$number'" >&2; exit 2; }
done
[[ -n "$run_dir" ]] || { echo "give run_dir=PATH on a file system that all nodes share" >&2; exit 2; }
[[ -n "${SLURM_JOB_ID:-}" ]] || { echo "not inside a Slurm job; submit me: sbatch --nodes=N $0 ..." >&2; exit 2; }

# Slurm runs a copy of this script from its spool folder; the repository is where sbatch was called.
root="${DEEPV3_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}"
[[ -f "$root/launch/pretrain.py" ]] || { echo "no launch/pretrain.py under $root; submit from the repository" >&2; exit 2; }
torchrun="$root/.venv/bin/torchrun"
python="$root/.venv/bin/python"
[[ -x "$torchrun" ]] || { torchrun=torchrun; python=python3; }

nodes="${SLURM_JOB_NUM_NODES:-1}"
processes="${SLURM_GPUS_ON_NODE:-${SLURM_GPUS_PER_NODE:-1}}"
processes="${processes##*:}" # h100:8 -> 8
hosts="$(scontrol show hostnames "${SLURM_JOB_NODELIST:-localhost}")"
head="${hosts%%$'\n'*}"
port=$((20000 + SLURM_JOB_ID % 20000))

# Threads of the host: loading and launching, not computing. NCCL: see docs/operations.md before changing more.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# Seconds that torchrun leaves its processes between SIGTERM and SIGKILL: a step and a save (torch 2.13; before, 30).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-270}"

cd "$root"
rm -f "$run_dir/exit.json" # of an earlier job; this one's end is what is read below
step=""
# shellcheck disable=SC2317 # called by the trap
forward() { [[ -z "$step" ]] || kill -TERM "$step" 2>/dev/null || true; }
trap forward TERM INT

echo "deepv3: $nodes node(s) x $processes process(es), head $head:$port, attempt $((${SLURM_RESTART_COUNT:-0} + 1))"
srun --kill-on-bad-exit=1 "$torchrun" \
    --nnodes="$nodes" --nproc_per_node="$processes" --max-restarts="$restarts" \
    --rdzv_id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" --rdzv_backend=c10d --rdzv_endpoint="$head:$port" \
    launch/pretrain.py "${arguments[@]}" &
step=$!
status=0
wait "$step" || status=$?
while kill -0 "$step" 2>/dev/null; do # the wait above ends early when a signal arrives
    status=0
    wait "$step" || status=$?
done

field() { # field NAME: from exit.json, empty where there is none
    "$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))[sys.argv[2]])' "$run_dir/exit.json" "$1" 2>/dev/null || true
}
code="$(field code)"
reason="$(field reason)"
[[ -n "$code" && ! ("$code" == 0 && "$status" != 0) ]] || { code="$status" reason="no exit.json says why"; }
echo "deepv3: ended with $code at step $(field step): $reason"
if [[ "$code" == 75 || "$code" -gt 128 ]]; then
    if ((${SLURM_RESTART_COUNT:-0} < requeues)); then
        scontrol requeue "$SLURM_JOB_ID"
        exit 0
    fi
    echo "deepv3: not requeued, --max-requeues=$requeues is used up; sbatch the same line to go on" >&2
fi
exit "$code"
