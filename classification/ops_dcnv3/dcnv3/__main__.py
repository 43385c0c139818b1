"""`python -m dcnv3`: which kernels are loaded here, for which machines, and what the missing ones need."""

from . import _extension

for device in ("cpu", "cuda"):
    loaded = device in _extension.kernels()
    print(f"{device}: {f'kernels loaded ({_extension.built_for(device)})' if loaded else _extension.why_not(device)}")
