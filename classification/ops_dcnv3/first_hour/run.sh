#!/usr/bin/env bash
# On a machine with a GPU, without a network: `run.sh 1` within 6 minutes (is it right, and how long each kernel takes),
# `run.sh 2` within 9 (the training step, tools that find wrong accesses, the tests of the product). Every step has a
# limit of its own and writes NAME.md into $OUT, by default classification/benchmarks/gpu, the most important first.
# python3 needs torch, numpy, timm, pandas, scikit-learn and pillow; the rest is in site/ (prepare.sh).
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here/../.."
export OUT=${OUT:-$PWD/benchmarks/gpu} PYTHONPATH=$here/site PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
mkdir -p "$OUT/figures"
case ${1:-} in 1) whole=350 ;; 2) whole=530 ;; *) echo "usage: run.sh 1|2" >&2; exit 2 ;; esac

step() { # name, seconds, command: its output goes to $OUT/NAME.md; the end of it is shown
  local name=$1 limit=$2 left=$((whole - SECONDS)) status
  shift 2
  [ "$left" -lt "$limit" ] && limit=$left
  [ "$limit" -gt 5 ] || { echo "== $name: left out, the time is over"; return 1; }
  timeout -k 5 "$limit" "$@" >"$OUT/$name.md" 2>&1
  status=$?
  echo "== $name: exit status $status after $SECONDS s"
  tail -n 15 "$OUT/$name.md"
  return $status
}
check() { step "$1" "$2" python3 ops_dcnv3/benchmark.py --check --only "$1" --output "$OUT/figures"; }
environment() { # what the rows below are of
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,memory.total --format=csv
  grep -m 1 'model name' /proc/cpuinfo
  nvcc --version | tail -n 2
  git rev-parse HEAD
  local loaded
  loaded=$(python3 -m dcnv3)
  echo "$loaded"
  grep -q '^cuda: kernels loaded' <<<"$loaded"
}
build() { # for another torch than that of prepare.sh
  DCNV3_BUILD=cuda TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0} python3 -m pip install --quiet --no-index \
    --no-build-isolation --no-deps --upgrade --target "$here/site" ./ops_dcnv3 && python3 -m dcnv3
}
cpu() { # of the same machine: kernels for instructions that others lack, and the step on two threads
  export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=2
  python3 -m pytest -q -p no:cacheprovider ops_dcnv3/tests/test_operator.py -k cpu
  python3 benchmarks/train_step.py --size T --rounds 5
}
tests() { # of the product, whose runs take the GPU where there is one
  local beside=(-p no:xdist)
  python3 -c 'import xdist' 2>/dev/null && beside=(-n 10 --dist loadfile)
  python3 -m pytest -q -p no:cacheprovider "${beside[@]}" tests --ignore tests/test_slurm.py
}
export -f environment build cpu tests
export here
look=(python3 ops_dcnv3/first_hour/kernels.py)

if [ "$1" = 1 ]; then
  step environment 30 bash -c environment || step build 150 bash -c build
  step cpu 200 bash -c cpu >"$OUT/cpu.said" &
  check correctness 40
  check behaviour 40
  check levels 160
  counters=(ncu --target-processes all --clock-control none --set full --kernel-name regex:'(forward|atomic|tiled|owning|ordered|dense)_kernel' --force-overwrite)
  metrics=gpu__time_duration.sum,sm__inst_executed.avg.per_cycle_active,smsp__inst_executed.max,smsp__inst_executed.min
  metrics+=,l1tex__data_bank_conflicts_pipe_lsu.sum,sm__warps_active.avg.pct_of_peak_sustained_active
  step ncu 40 "${counters[@]}" -o "$OUT/by_shape" "${look[@]}"
  step ncu_metrics 10 ncu -i "$OUT/by_shape.ncu-rep" --page raw --csv --metrics "$metrics"
  check atomics 20
  wait
  cat "$OUT/cpu.said"
else
  step training_step 240 python3 benchmarks/train_step.py --size B --batch 32 --rounds 3 --grid-sample
  for kernel in owning tiled; do
    for tool in memcheck racecheck; do
      DCNV3_BACKWARD=$kernel PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "${tool}_$kernel" 25 \
        compute-sanitizer --tool "$tool" --error-exitcode 9 "${look[@]}" --small
    done
  done
  step tests 180 bash -c tests
fi
grep -l "FAILED:" "$OUT"/*.md | sed 's/^/== FAILED, see /'
