#!/usr/bin/env bash
# All tests, in two sequences beside each other. Those of the job scripts, which mostly wait for Slurm, run beside both.
# What is not the first sequence is shown at the end.
set -uo pipefail
cd "$(dirname "$0")/.." && . ./mimic_settings.sh || exit 1
shown=$(mktemp -d)
trap 'rm -rf "$shown"' EXIT
run() { "$MIMIC_PYTHON" -m pytest -q -p no:cacheprovider --durations=10 "$@"; }
# With the operator's about as long as all others.
second=(tests/test_{ranks,releases,report,sources,step,studies,timm}.py)

run tests/test_slurm.py >"$shown/1 job scripts" 2>&1 &
jobs=$!
{
  OMP_NUM_THREADS=1 run ops_dcnv3/tests  # two threads wait for each other by turning, where others want the cores
  status=$?
  run "${second[@]}" || status=$?
  exit $status
} >"$shown/2 operator and others" 2>&1 &
others=$!
run $(printf -- '--ignore %s ' tests/test_slurm.py "${second[@]}") tests
status=$?
wait $jobs || status=$?
wait $others || status=$?
for file in "$shown"/*; do
  echo "${file##*/}:"
  cat "$file"
done
exit $status
