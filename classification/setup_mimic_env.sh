#!/usr/bin/env bash
# Sets up everything the project needs, and can run again at any time: what is there is reused.
# See --help. The answers go to mimic_settings.sh, which `make` and the job scripts read.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

usage() {
  cat <<'TEXT'
usage: bash setup_mimic_env.sh [options]

  --env-name NAME   conda environment to make where conda or mamba exists (internimage-mimic)
  --env-dir DIR     make a venv in DIR instead, with conda or without (default without: .venv
                    in the repository); the variable MIMIC_ENV_DIR does the same
  --python EXE      Python for the venv, 3.10 to 3.13 (python3, or the first python3.x that fits)
  --data-path DIR   the MIMIC-CXR folder, remembered for the job scripts
  --yes             ask nothing; also without a terminal
  --help            this text
TEXT
}

say() { printf '%s\n' "setup: $*"; }
fail() { printf '%s\n' "setup: error: $*" >&2; exit 2; }

# ------------------------------------------------------------------------------------- options
env_name=internimage-mimic env_dir=${MIMIC_ENV_DIR:-} python='' data_path='' ask=1
while [ $# -gt 0 ]; do
  case $1 in
    --env-name | --env-dir | --python | --data-path)
      [ $# -ge 2 ] || fail "$1 needs a value"
      case $1 in
        --env-name) env_name=$2 ;;
        --env-dir) env_dir=$2 ;;
        --python) python=$2 ;;
        --data-path) data_path=$2 ;;
      esac
      shift 2 ;;
    --yes) ask=0; shift ;;
    --help) usage; exit 0 ;;
    *) usage >&2; fail "unknown option $1" ;;
  esac
done
[ -t 0 ] || ask=0

settings=$here/mimic_settings.sh
# Answers of an earlier run are the defaults of this one.
if [ -z "$data_path" ] && [ -f "$settings" ]; then
  data_path=$(. "$settings" && printf '%s' "${MIMIC_DATA_PATH:-}")
  if [ -n "$data_path" ] && [ ! -d "$data_path" ]; then
    say "the data folder of the last set-up, $data_path, is gone; name the new one with --data-path"
    data_path=''
  fi
fi
if [ "$ask" = 1 ]; then
  read -r -p "MIMIC-CXR folder [${data_path:-none yet}]: " answer
  data_path=${answer:-$data_path}
fi
if [ -n "$data_path" ] && [ ! -d "$data_path" ]; then
  fail "--data-path $data_path is not a folder; give the folder that holds files/ and the CSV files"
fi
[ -z "$data_path" ] || data_path=$(cd "$data_path" && pwd)

# --------------------------------------------------------------------------------- environment
fits() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }
conda=$(command -v mamba || command -v conda || true)
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
    if [ -z "$python" ]; then
      for candidate in python3 python3.11 python3.12 python3.13 python3.10; do
        command -v "$candidate" >/dev/null && fits "$candidate" && { python=$candidate; break; }
      done
      [ -n "$python" ] || fail "no Python 3.10 to 3.13 found (tried python3, python3.10 to python3.13); install one or name it with --python"
    fi
    fits "$python" || fail "--python $python is not a Python 3.10 to 3.13"
    say "making a venv in $env_dir with $("$python" --version)"
    "$python" -m venv "$env_dir" || fail "the venv could not be made; on Debian and Ubuntu install python3-venv, then remove $env_dir"
  fi
fi
py=$env_dir/bin/python
fits "$py" && "$py" -m pip --version >/dev/null 2>&1 ||
  fail "$env_dir holds no working Python 3.10 to 3.13 with pip (on Debian and Ubuntu install python3-venv); remove it and run again"
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

torch=2.13.0 torchvision=0.28.0
if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then build=cu126; else build=cpu; fi
index=https://download.pytorch.org/whl/$build
step="$build $torch $(hash_of "$here/requirements_mimic.txt")"
if is_done packages "$step"; then
  say "packages are up to date in $env_dir"
else
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
# What the kernels depend on: their sources, torch, and which compilers there are.
step=$({
  cd "$operator" && find csrc dcnv3 setup.py pyproject.toml -type f -not -name '*.pyc' -not -name '*.so' -not -name '_build.json' |
    LC_ALL=C sort | tr '\n' '\0' | xargs -0 sha256sum
  echo "$torch $build $(command -v "${CXX:-c++}" nvcc || true)"
} | sha256sum | cut -c1-16)
if is_done operator "$step" && "$py" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("dcnv3") is None)'; then
  say "the DCNv3 operator is up to date"
else
  say "installing the DCNv3 operator"
  rm -rf "$operator/build"  # a build folder of another torch or compiler would be reused
  "$py" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --force-reinstall "$operator"
  mark_done operator "$step"
fi
"$py" -m dcnv3 | sed "s/^/setup: DCNv3 on /"

# ------------------------------------------------------------------------------------ settings
cat >"$settings" <<TEXT
# Written by setup_mimic_env.sh; run it again to change an answer.
MIMIC_PYTHON='$py'
MIMIC_DATA_PATH='$data_path'
TEXT

(cd "$here" && "$py" - <<'TEXT')
import torch
import models  # imports timm, torchvision and the operator the way the trainer does
import timm, torchvision
from dcnv3 import dcnv3

# With no offsets and equal weights the operator is a 3x3 mean.
x = torch.rand(1, 6, 7, 8)
y = dcnv3(x, torch.zeros(1, 6, 7, 36), torch.full((1, 6, 7, 18), 1 / 9), group=2)
mean = torch.nn.functional.avg_pool2d(x.permute(0, 3, 1, 2), 3, 1, 1).permute(0, 2, 3, 1)
assert torch.allclose(y, mean, atol=1e-6), "the DCNv3 operator gives wrong results"
device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
print(f"setup: torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}, {device}")
TEXT
say "ready. Next: make demo, or, in $here:"
say "  $py main.py --cfg configs/internimage_b_mimic_cxr_224.yaml --data-path ${data_path:-FOLDER}"
