#!/usr/bin/env bash
# Measures the sweeps of sweep.py on this machine's GPU, most valuable rows first, and stops by itself.
#
#   bash experiments/gpu/run.sh [--seconds=540] [--rows=experiments/gpu/rows] [--out=runs/gpu] [--only="train_05b ..."]
#
# Rows join ROWS as runs end; the same command goes on where it stopped. With --plan=h100 (a name of
# efficientllm/cost/data/hardware.json) the same variants are planned instead, on any machine.
# Exit status: 0 all rows are there, 1 a run failed, 2 bad input, 130 the seconds were over.
set -u
cd "$(dirname "$0")/../.."
seconds=540 rows=experiments/gpu/rows out=runs/gpu plan="" only="train_05b infer_15b train_15b mixers_05b"
for argument in "$@"; do
  case $argument in
    --seconds=*) seconds=${argument#*=} ;;
    --rows=*) rows=${argument#*=} ;;
    --out=*) out=${argument#*=} ;;
    --plan=*) plan=${argument#*=} ;;
    --only=*) only=${argument#*=} ;;
    *) echo "run.sh: $argument: no such option; known are --seconds, --rows, --out, --plan and --only" >&2; exit 2 ;;
  esac
done
case $seconds in '' | *[!0-9]*) echo "run.sh: --seconds=$seconds: needed is a whole number" >&2; exit 2 ;; esac
end=$((SECONDS + seconds)) status=0
mkdir -p "$rows"
for study in $only; do
  tag=$study extra=()
  if [ -n "$plan" ]; then
    tag=$plan-$study extra=(--config.task=plan "--config.plan.hardware=$plan")
    case $study in infer*) extra+=(--config.plan.of=infer) ;; esac
  fi
  left=$((end - SECONDS))
  [ "$left" -gt 0 ] || { echo "run.sh: $seconds seconds are over before $study; the same command goes on" >&2; exit 130; }
  timeout --signal=TERM "$left" python -m efficientllm.sweep "--config=experiments/gpu/sweep.py:$study" \
    "--out=$out/$tag" "--rows=$rows/$tag.rows.jsonl" ${extra[@]+"${extra[@]}"}
  code=$?
  case $code in 0) ;; 1) status=1 ;; 124 | 130 | 143) exit 130 ;; *) exit "$code" ;; esac
done
exit "$status"
