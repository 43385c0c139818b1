#!/usr/bin/env bash
# Sets up everything the project needs, and can run again at any time: what exists is reused.
# See --help. The answers go to mimic_settings.sh, which `make` and the job scripts read.
set -euo pipefail
export PYTHONNOUSERSITE=1  # packages in ~/.local would come before the environment's
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

usage() {
  cat <<'TEXT'
usage: bash setup_mimic_env.sh [options]

  --data-path DIR   the MIMIC-CXR folder
  --email ADDRESS   mail of the jobs' end and failure goes there (Slurm's default: to the user)
  --account NAME    Slurm account, where you have several
  --env-name NAME   conda environment to make where conda or mamba exists (internimage-mimic)
  --env-dir DIR     make a venv in DIR instead, with conda or without (default without: .venv
                    in the repository); the variable MIMIC_ENV_DIR does the same
  --python EXE      Python for the venv, 3.10 to 3.13 (python3, or the first python3.x that fits)
  --weights FILE    published InternImage-B weights that you have already
  --no-weights      do not download them (390 MB)
  --yes             ask nothing; also without a terminal
  --check           only report what would be used; change nothing
  --help            this text

Answers are remembered in mimic_settings.sh and are the defaults of the next run.
On a cluster run it in a job, for example: sbatch -p lightwork -c 8 -t 2:00:00 --wrap "bash setup_mimic_env.sh --yes"
TEXT
}

say() { printf '%s\n' "setup: $*"; }
fail() { printf '%s\n' "setup: error: $*" >&2; exit 2; }
have() { command -v "$1" >/dev/null; }
# Its answer counts, not its exit status: other programs have a -c too.
fits() { [ "$("$1" -c 'import sys; print((3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null)" = True ]; }

# ------------------------------------------------------------------------------------- options
settings=$here/mimic_settings.sh
remembered() { [ ! -f "$settings" ] || (. "$settings" && printf '%s' "${!1:-}"); }
data_path=$(remembered MIMIC_DATA_PATH) email=$(remembered MIMIC_EMAIL) account=$(remembered MIMIC_ACCOUNT)
weights=$(remembered MIMIC_PRETRAINED) config=$(remembered MIMIC_CONFIG) env_name=$(remembered MIMIC_ENV_NAME)
env_name=${env_name:-internimage-mimic} env_dir=${MIMIC_ENV_DIR:-$(remembered MIMIC_ENV_DIR)}
python=$(remembered MIMIC_VENV_PYTHON) ask=1 check=0 download=1
if [ -n "$python" ] && [ ! -x "$python" ]; then
  say "the Python of the last set-up, $python, is gone; another is looked for, or name one with --python"
  python=''
fi
if [ -n "$data_path" ] && [ ! -d "$data_path" ]; then
  say "the data folder of the last set-up, $data_path, is gone; name the new one with --data-path"
  data_path=''
fi
while [ $# -gt 0 ]; do
  case $1 in
    --env-name | --env-dir | --python | --data-path | --email | --account | --weights)
      [ $# -ge 2 ] || fail "$1 needs a value"
      name=${1#--}
      printf -v "${name//-/_}" %s "$2"
      # A name asks for conda, whatever the last set-up did.
      [ "$1" != --env-name ] || env_dir=${MIMIC_ENV_DIR:-}
      shift 2 ;;
    --no-weights) download=0; shift ;;
    --yes) ask=0; shift ;;
    --check) check=1 ask=0; shift ;;
    --help) usage; exit 0 ;;
    *) usage >&2; fail "unknown option $1" ;;
  esac
done
[ -t 0 ] || ask=0
question() { # variable, text
  local answer
  read -r -p "$2 [${!1:-none}]: " answer
  [ -z "$answer" ] || printf -v "$1" %s "$answer"
}
if [ "$ask" = 1 ]; then
  question data_path "MIMIC-CXR folder"
  ! have sbatch || { question email "e-mail for the jobs"; question account "Slurm account"; }
  [ -n "$env_dir" ] || question env_name "name of the conda environment, where there is conda"
fi
if [ -n "$data_path" ]; then
  [ -d "$data_path" ] || fail "--data-path $data_path is not a folder; give the folder that holds files/ and the CSV files"
  data_path=$(cd "$data_path" && pwd)
fi
if [ -n "$weights" ]; then
  [ -f "$weights" ] || fail "the weights $weights do not exist; name the file with --weights, or remove MIMIC_PRETRAINED from $settings"
  weights=$(cd "$(dirname "$weights")" && pwd)/$(basename "$weights")
fi
if [ -n "$python" ]; then
  have "$python" || fail "--python $python does not exist"
  fits "$python" || fail "--python $python is not a Python 3.10 to 3.13"
  python=$(command -v "$python")
fi
case $env_dir in '' | /*) ;; *) env_dir=$PWD/$env_dir ;; esac
# What was asked for is remembered, not what is found below.
chosen_env_dir=$env_dir chosen_python=$python

# ------------------------------------------------------------------------------ modules, CUDA
# A name differs from cluster to cluster, so each tool has a list; the first that brings it is loaded.
python_modules=(mamba/latest anaconda3 miniconda3 mamba conda)
cuda_modules=(cuda-12.6.1-gcc-12.1.0 cuda-12.8.1-gcc-12.1.0 cuda-13.0.1-gcc-12.1.0 cuda-11.8.0-gcc-12.1.0 cuda/12.6 cuda/11.8 cuda)
gcc_modules=(gcc-12.1.0-gcc-11.2.0 gcc-11.2.0-gcc-11.2.0 gcc/12 gcc/11 gcc)
is_there() { type module >/dev/null 2>&1; }
load_for() { # test, modules...: loads modules until the test holds
  local test=$1 name
  shift
  is_there || return 1
  for name; do
    # Not in a subshell: a module changes this shell's PATH. Its own complaints are not the user's.
    module load "$name" >/dev/null 2>&1 || continue
    if $test; then say "module $name loaded"; return 0; fi
  done
  return 1
}
tried() { is_there && printf 'tried the modules %s' "$*" || printf 'no module system here'; }

# Where jobs will find GPUs, the kernels are built for them, although this machine may have none.
gpus=''
if have nvidia-smi && nvidia-smi >/dev/null 2>&1; then
  gpus="here: $(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)"
elif have sinfo && timeout 10 sinfo -h -o %G 2>/dev/null | grep -q gpu; then
  gpus="on nodes of this cluster"
  [ -n "${SLURM_JOB_ID:-}" ] || say "this is no job: if it is a login node, better: sbatch -p lightwork -c 8 -t 2:00:00 --wrap \"bash setup_mimic_env.sh --yes\""
fi
find_nvcc() { nvcc=''; for nvcc in "${CUDA_HOME:-}/bin/nvcc" "$(command -v nvcc || true)"; do [ -x "$nvcc" ] && return 0; done; nvcc=''; return 1; }
cuda=none
if [ -n "$gpus" ] && { find_nvcc || load_for find_nvcc "${cuda_modules[@]}"; }; then
  cuda=$("$nvcc" --version | sed -n 's/.*release \([0-9.]*\).*/\1/p')
  # A wrapper (in /usr/local/bin, say) is asked for its toolkit.
  top=$({ "$nvcc" --dryrun -x cu /dev/null 2>&1 || true; } | sed -n 's/^#\$ TOP=//p')
  CUDA_HOME=$(cd "${top:-$(dirname "$(readlink -f "$nvcc")")/..}" && pwd)
  export CUDA_HOME
fi
# Toolkit -> PyTorch's build (only the major number has to agree) and the newest gcc that nvcc takes.
torch=2.13.0 torchvision=0.28.0 build=cpu newest_gcc=99
[ -z "$gpus" ] || build=cu126
case $cuda in
  none) ;;
  11.*) build=cu118 torch=2.7.1 torchvision=0.22.1 newest_gcc=11 ;;  # the last build for CUDA 11
  12.[0-2]) newest_gcc=12 ;;
  12.[3-7]) newest_gcc=13 ;;
  12.*) newest_gcc=14 ;;
  13.*) build=cu130 newest_gcc=15 ;;
  *) say "CUDA $cuda is not known to this script: it is tried with the build for 13"; build=cu130 ;;
esac
gcc_version() { "$1" -dumpversion 2>/dev/null | cut -d. -f1; }
find_compiler() {
  local v
  for compiler in ${CXX:-} g++ c++ g++-15 g++-14 g++-13 g++-12 g++-11 g++-10 g++-9; do
    v=$(gcc_version "$compiler")
    [ "${v:-0}" -ge 9 ] && [ "$v" -le "$newest_gcc" ] && return 0
  done
  compiler=''
  return 1
}
if find_compiler || load_for find_compiler "${gcc_modules[@]}"; then
  compiler=$(command -v "$compiler")
  export CXX=$compiler CUDAHOSTCXX=$compiler
  cc=${compiler%/*}/$(basename "$compiler" | sed 's/g++/gcc/; s/c++/cc/')
  [ ! -x "$cc" ] || export CC=$cc
fi

# --------------------------------------------------------------------------------- environment
find_conda() { conda=$(command -v mamba || command -v conda); }
[ -n "$env_dir" ] || find_conda || load_for find_conda "${python_modules[@]}" || conda=''
for candidate in "$python" python3 python3.11 python3.12 python3.13 python3.10; do
  [ -z "$python" ] && have "$candidate" && fits "$candidate" && python=$candidate
done
[ -n "$python" ] || [ -n "${conda:-}" ] ||
  fail "no Python 3.10 to 3.13 found ($(tried "${python_modules[@]}"); then python3, python3.10 to python3.13); install one or name it with --python"

report() {
  local kernels="for the CPU" slow="the operator is then PyTorch code, which took 6 to 16 times as long on a CPU (ops_dcnv3/README.md)"
  [ "$cuda" = none ] || kernels="for the CPU, A100 and H100/H200"
  [ -n "$compiler" ] || kernels="none: no g++ from 9 to $newest_gcc ($(tried "${gcc_modules[@]}")); $slow"
  say "GPUs:          ${gpus:-none}"
  say "CUDA toolkit:  $([ "$cuda" = none ] && { [ -n "$gpus" ] && tried "${cuda_modules[@]}" || echo "not needed without a GPU"; } || echo "$cuda in $CUDA_HOME")"
  say "C++ compiler:  ${compiler:-none}${compiler:+ ($(gcc_version "$compiler"))}"
  say "kernels:       $kernels"
  if [ -n "$gpus" ] && [ "$cuda" = none ]; then
    say "               none for the GPU: load or install a CUDA toolkit and set CUDA_HOME; until then $slow"
  fi
  say "PyTorch:       $torch, build $build"
  say "environment:   ${env_dir:-$([ -n "${conda:-}" ] && echo "$env_name, by $conda" || echo "$(dirname "$here")/.venv")}"
  say "Slurm:         $(have sbatch && echo yes || echo no)"
  say "data:          ${data_path:-none yet}"
  say "weights:       ${weights:-none yet}"
}
report
[ "$check" = 0 ] || exit 0
# Kernels for the CPU alone would be noticed by the first slow job: with a CUDA build of PyTorch, those for GPUs or an error.
kernels=${DCNV3_BUILD:-$([ "$build" = cpu ] || echo cuda)}
[ "$kernels" != cuda ] || [ "$cuda" != none ] || fail "no CUDA toolkit for the GPUs ($gpus): load or install one and set CUDA_HOME to it, or set DCNV3_BUILD=cpu to do without kernels for them"

if [ -z "$env_dir" ] && [ -n "$conda" ]; then
  if ! "$conda" env list | awk '{print $1}' | grep -qx "$env_name"; then
    say "making the conda environment $env_name (Python 3.11)"
    "$conda" create --yes --quiet --name "$env_name" python=3.11
  fi
  # `env list` ends each line with the folder.
  env_dir=$("$conda" env list | awk -v name="$env_name" '$1 == name {print $NF}')
else
  env_dir=${env_dir:-$(dirname "$here")/.venv}
  if [ ! -x "$env_dir/bin/python" ]; then
    say "making a venv in $env_dir with $("$python" --version)"
    "$python" -m venv "$env_dir" || fail "the venv could not be made; on Debian and Ubuntu install python3-venv, then remove $env_dir"
  fi
fi
py=$env_dir/bin/python
fits "$py" && "$py" -m pip --version >/dev/null 2>&1 ||
  fail "$env_dir has no working Python 3.10 to 3.13 with pip (on Debian and Ubuntu install python3-venv); remove it and run again"
env_dir=$(cd "$env_dir" && pwd) py=$env_dir/bin/python

# Two set-ups of one environment wait for each other.
if command -v flock >/dev/null; then
  exec 9>"$env_dir/.setup_lock"
  flock 9
fi

# ------------------------------------------------------------------------------------ packages
hash_of() { cat "$@" | sha256sum | cut -c1-16; }
# Remembers in the environment what a step was done with, so that a second run skips it.
is_done() { [ -f "$env_dir/.setup_$1" ] && [ "$(cat "$env_dir/.setup_$1")" = "$2" ]; }
mark_done() { printf '%s' "$2" >"$env_dir/.setup_$1"; }

index=https://download.pytorch.org/whl/$build
step="$build $torch $(hash_of "$here/requirements_mimic.txt")"
if is_done packages "$step"; then
  say "packages are up to date in $env_dir"
else
  needed=3
  [ "$build" = cpu ] || needed=12
  free=$(df -Pk "$env_dir" | awk 'NR == 2 {print int($4 / 1048576)}')
  [ "$free" -ge "$needed" ] || fail "$env_dir has $free GB free, the packages take about $needed; make room, or choose another folder with --env-dir"
  say "installing torch $torch ($build) and the packages of requirements_mimic.txt; this takes some minutes"
  # torch and torchvision first and pinned: left to the resolver, pip takes the newest CUDA build.
  if "$py" -c 'import sys, urllib.request as u; u.urlopen(sys.argv[1], timeout=10)' "$index/torch/" 2>/dev/null; then
    "$py" -m pip install --quiet --disable-pip-version-check --index-url "$index" "torch==$torch" "torchvision==$torchvision"
  else
    say "$index cannot be reached; taking torch from pip's default index (there, Linux builds may bring CUDA along: several GB)"
    "$py" -m pip install --quiet --disable-pip-version-check "torch==$torch" "torchvision==$torchvision" ||
      fail "pip could not install torch (its message is above); with a network, run this again"
  fi
  "$py" -m pip install --quiet --disable-pip-version-check -r "$here/requirements_mimic.txt" ||
    fail "pip could not install requirements_mimic.txt (its message is above); with a network, run this again"
  mark_done packages "$step"
fi

operator=$here/ops_dcnv3
# What the kernels depend on: their sources, torch, and the compilers.
step=$({
  cd "$operator" && find csrc dcnv3 setup.py pyproject.toml -type f -not -name '*.pyc' -not -name '*.so' -not -name '_build.json' |
    LC_ALL=C sort | tr '\n' '\0' | xargs -0 sha256sum
  echo "$torch $build ${CXX:-} $cuda $kernels"
} | sha256sum | cut -c1-16)
if is_done operator "$step" && "$py" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("dcnv3") is None)'; then
  say "the DCNv3 operator is up to date"
else
  say "installing the DCNv3 operator"
  rm -rf "$operator/build"  # a build folder of another torch or compiler would be reused
  DCNV3_BUILD=$kernels "$py" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
    --force-reinstall "$operator" || fail "the operator's kernels could not be built (the reason is above); mend it and run again, or set DCNV3_BUILD=cpu to do without those for GPUs"
  mark_done operator "$step"
fi
"$py" -m dcnv3 | sed "s/^/setup: DCNv3 on /"

# ------------------------------------------------------------------------- weights, settings
mkdir -p "$here/output" "$here/logs" "$here/results"
if [ "$download" = 1 ] && [ -z "$weights" ]; then
  (cd "$here" && "$py" download_weights.py pretrained) ||
    fail "the weights are missing (see above): run again, give a file with --weights, or go without by --no-weights"
  weights=$here/pretrained/internimage_b_1k_224.pth
fi
{
  echo "# Written by setup_mimic_env.sh; run it again to change an answer."
  echo "# MIMIC_PRETRAINED: weights that train_mimic.sbatch starts from if the job's model is that of MIMIC_CONFIG, by"
  echo "# default InternImage-B (configs/internimage_b_mimic_cxr_224.yaml); empty: random weights."
  for setting in "MIMIC_PYTHON=$py" "MIMIC_ENV_NAME=$env_name" "MIMIC_ENV_DIR=$chosen_env_dir" \
    "MIMIC_VENV_PYTHON=$chosen_python" "MIMIC_DATA_PATH=$data_path" "MIMIC_EMAIL=$email" "MIMIC_ACCOUNT=$account" \
    "MIMIC_PRETRAINED=$weights" "MIMIC_CONFIG=$config"; do
    printf '%s=%q\n' "${setting%%=*}" "${setting#*=}"
  done
  # What sbatch itself reads, once this file was sourced in the shell that submits.
  [ -z "$account" ] || printf 'export SBATCH_ACCOUNT=%q\n' "$account"
} >"$settings.part"
mv "$settings.part" "$settings"

# ----------------------------------------------------------------------------------- self-test
(cd "$here" && "$py" -m jobs.self_test) || fail "the self-test failed (above): this environment must not be trained with"
[ -n "$weights" ] || say "no weights: training starts from random ones. To fetch them, run this again without --no-weights"
say "ready. Next: make demo, or, in $here:"
if have sbatch && [ -n "$data_path" ]; then
  say "  sbatch${account:+ -A $account} train_mimic.sbatch${weights:+   (starts from $weights)}"
else
  say "  $py main.py --cfg ${config:-configs/internimage_b_mimic_cxr_224.yaml} --data-path ${data_path:-FOLDER} --pretrained ${weights:-FILE}"
fi
