"""Loads the compiled kernels, if there are any that fit this torch, and says what is missing.

setup.py leaves two files here: the library `_C.so`, and last `_build.json`, which says what it was
built against. A library is tied to the torch it was built with, so the two are compared before it
is loaded: loading into another torch may crash instead of failing.
"""

import json
import warnings
from pathlib import Path

import torch

_FOLDER = Path(__file__).parent
_INSTALL = "pip install --no-build-isolation --no-deps --force-reinstall ./ops_dcnv3"
_MEND = f"run `{_INSTALL}` to build them"
_kernels = ()  # devices with loaded kernels
_architectures = ""  # of GPUs, that the loaded kernels were built for
_missing = {}  # device -> why it has none
_DEVICES = ("cpu", "cuda")


def describe_torch():
    """What a build is tied to."""
    return {"torch": torch.__version__, "cuda": torch.version.cuda}


def load(folder=_FOLDER):
    """Loads the library in `folder`. Why kernels are missing is remembered for the first call that would need them;
    kernels that were built and cannot be used are warned about at once."""
    global _kernels, _missing, _architectures
    library, record = folder / "_C.so", folder / "_build.json"
    if not record.exists():
        unusable = "an earlier build stopped half-way" if library.exists() else None
        _missing = dict.fromkeys(_DEVICES, unusable or "they were never built")
    else:
        build = json.loads(record.read_text())
        _missing, unusable = build["missing"], None
        if build["kernels"]:
            built_for = {key: build[key] for key in describe_torch()}
            if built_for != describe_torch():
                unusable = f"they were built for {_versions(built_for)}, and this is {_versions(describe_torch())}"
            else:
                try:
                    torch.ops.load_library(str(library))
                    _kernels, _architectures = tuple(build["kernels"]), build["architectures"]
                except OSError as error:
                    unusable = f"they do not load ({error})"
    if unusable:
        _missing = {**dict.fromkeys(_DEVICES, unusable), **_missing}
        warnings.warn(f"dcnv3: the compiled kernels are not used: {unusable}; {_MEND}", stacklevel=2)


def _versions(versions):
    return f"torch {versions['torch']}" + (f" with CUDA {versions['cuda']}" if versions["cuda"] else "")


def kernels():
    """Device types with compiled kernels, such as ('cpu', 'cuda')."""
    return _kernels


def built_for(device_type):
    """What the loaded kernels of a device are compiled for: the instructions chosen for this processor, or GPUs."""
    return _architectures if device_type == "cuda" else torch.ops.dcnv3._cpu_instruction_set()


def why_not(device_type):
    """Why there is no kernel for a device, and what to do about it."""
    if device_type not in _DEVICES:
        return f"there are kernels for cpu and cuda only, not for {device_type}"
    return f"{_missing[device_type]}; {_MEND}"


def why_not_on(capability, error):
    """Why the loaded CUDA kernels do not run on a GPU of this compute capability: (major, minor), CUDA's error."""
    this = ".".join(map(str, capability))
    return (
        f"the kernels were built for GPUs of compute capability {_architectures}, and this one has {this} ({error}); "
        f"run `TORCH_CUDA_ARCH_LIST='{_architectures};{this}' {_INSTALL}` to build them for it, or, if it is among "
        "them, install a driver for this version of CUDA"
    )
