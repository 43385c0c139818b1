"""`python -m dcnv3`: which kernels are loaded here, and what the missing ones need."""

from . import _extension

for device in ("cpu", "cuda"):
    print(f"{device}: {'kernels loaded' if device in _extension.kernels() else _extension.why_not(device)}")
