#!/usr/bin/env bash
# Copies a data folder to this node's disk: bash jobs/stage.sh DATA TARGET; slurm_job.sh runs it on each node.
# The copy is TARGET/<folder above>/<data folder>. Tables beside DATA and one folder higher come along: --data-path may be
# the release's files/. It starts afresh, since an earlier job may have been killed in a file; if it fails, nothing is left.
set -uo pipefail
data=$1 target=$2
above=$(dirname "$data")
copy=$target/$(basename "$above")/$(basename "$data")
copy_tables() { # from, to
  local table
  for table in "$1"/*.csv "$1"/*.csv.gz "$1"/*.txt "$1"/*.json "$1"/*.xlsx; do
    [ ! -f "$table" ] || cp "$table" "$2/" || return 1
  done
}
trap 'rm -rf "$target"; exit 1' TERM INT
rm -rf "$target"
mkdir -p "$copy" && cp -r "$data/." "$copy/" && copy_tables "$above" "$(dirname "$copy")" &&
  copy_tables "$(dirname "$above")" "$target" && exit 0
rm -rf "$target"
exit 1
