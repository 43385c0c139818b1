"""Where the CUDA toolkit is. The nvcc on PATH may be a wrapper far from it, so it is asked for its own folder."""

import os
import re
import shutil
import subprocess
from pathlib import Path


def find_nvcc():
    """The nvcc of the toolkit that CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda lead to, in its bin/; None without."""
    folders = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    found = [shutil.which("nvcc", path=f"{folder}/bin") for folder in folders if folder]
    nvcc = next(filter(None, [*found, shutil.which("nvcc"), shutil.which("nvcc", path="/usr/local/cuda/bin")]), None)
    if nvcc is None:
        return None
    said = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", said.stdout + said.stderr, re.MULTILINE)
    return Path(top[1], "bin", "nvcc").resolve() if top else Path(nvcc).resolve()
