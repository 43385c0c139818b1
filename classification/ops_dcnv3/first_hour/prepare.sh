#!/usr/bin/env bash
# On a machine with a network and nvcc, without a GPU: what the GPU's machine lacks, into first_hour/site. The kernels are
# built against the torch there, whose wheel brings no compiler: minutes, and 8 GB on the way.
#   TORCH=2.11.0 TORCH_CUDA_ARCH_LIST=9.0 bash ops_dcnv3/first_hour/prepare.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/env"
export PATH=$work/env/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1
pip install --quiet "torch==${TORCH:-2.11.0}" 'setuptools<82' wheel ninja numpy  # the default index has the build for CUDA 13.0
DCNV3_BUILD=cuda TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0} \
  pip install --quiet --no-build-isolation --no-deps --target "$work/site" .
pip install --quiet --no-deps --target "$work/site" \
  yacs==0.1.8 'pydicom<4' 'termcolor<4' pytest iniconfig pluggy packaging pygments
rm -rf first_hour/site
mv "$work/site" first_hour/site
cat first_hour/site/dcnv3/_build.json
echo "first_hour/site: $(du -sh first_hour/site | cut -f1). Next, on the GPU: bash run.sh 1, then bash run.sh 2, in $PWD/first_hour"
