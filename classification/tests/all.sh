#!/usr/bin/env bash
# All tests, in two sequences beside each other. Those of the operator mostly wait for compilers and those of the job
# scripts for Slurm: they make the second sequence, whose output is shown at the end.
set -uo pipefail
cd "$(dirname "$0")/.." && . ./mimic_settings.sh || exit 1
shown=$(mktemp)
trap 'rm -f "$shown"' EXIT
{
  "$MIMIC_PYTHON" -m pytest -q -p no:cacheprovider --durations=5 ops_dcnv3/tests
  operator=$?
  "$MIMIC_PYTHON" -m pytest -q -p no:cacheprovider --durations=5 tests/test_slurm.py && exit $operator
} >"$shown" 2>&1 &
"$MIMIC_PYTHON" -m pytest -q --durations=10 --ignore tests/test_slurm.py tests
status=$?
wait $! || status=$?
echo "tests of the operator and of the job scripts:"
cat "$shown"
exit $status
