#!/usr/bin/env bash
# What `make demo` runs after the set-up. Reads DATA (a tree of the user's own, or empty), LIMIT (images per split), DEMO
# and CONFIG.
set -euo pipefail
from=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. ./mimic_settings.sh

if [ -n "${DATA:-}" ]; then
  data=${DATA/#\~/$HOME}
  data=$(cd "$from" && realpath -- "$data")
  # A run belongs to its data: another folder or limit gets a run of its own.
  tag=data-$(printf '%s' "$data${LIMIT:+ $LIMIT}" | cksum | cut -d ' ' -f 1)
else
  data=$DEMO/synthetic tag=synthetic
  "$MIMIC_PYTHON" -m dataset.synthetic --out "$data" --patients 400
fi
labels=$("$MIMIC_PYTHON" prepare_mimic.py labels --data-path "$data" | wc -l)
arguments=(--cfg "$CONFIG" --data-path "$data" --output "$DEMO/output" --tag "$tag"
  --opts RESULTS "$DEMO/results/$tag" MODEL.NUM_CLASSES "$labels" DATA.LIMIT "${LIMIT:-0}")
if [ -n "${DATA:-}" ]; then
  "$MIMIC_PYTHON" main.py "${arguments[@]}" --throughput
  echo "The last line is the time that training takes. Shorter: make demo DATA=$DATA LIMIT=2000 (images per split)"
fi
"$MIMIC_PYTHON" main.py "${arguments[@]}"
"$MIMIC_PYTHON" main.py "${arguments[@]}" --eval

results=$(find "$DEMO/results/$tag" -maxdepth 1 -name 'evaluation_*' | sort | tail -n 1)
cat <<TEXT

data         $data
the run      $DEMO/output/internimage_tiny/$tag
             checkpoints, log_rank0.txt, metrics.jsonl, training.png
the results  $results
             report.html, and what it is made of: metrics.json, predictions.csv, report.json, figures/
TEXT
