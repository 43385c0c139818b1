#!/usr/bin/env bash
# All tests. Those of the operator mostly wait for compilers: they run beside the others, and are shown at the end.
set -uo pipefail
cd "$(dirname "$0")/.." && . ./mimic_settings.sh || exit 1
shown=$(mktemp)
trap 'rm -f "$shown"' EXIT
"$MIMIC_PYTHON" -m pytest -q -p no:cacheprovider --durations=5 ops_dcnv3/tests >"$shown" 2>&1 &
"$MIMIC_PYTHON" -m pytest -q --durations=10 tests
status=$?
wait $! || status=$?
echo "tests of the operator:"
cat "$shown"
exit $status
