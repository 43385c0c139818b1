"""DCNv3, the deformable convolution of InternImage."""

from ._extension import kernels
from .functional import dcnv3, reference
from .module import DCNv3

__all__ = ["DCNv3", "dcnv3", "kernels", "reference"]
__version__ = "0.1.0"
