"""DCNv3, the deformable convolution of InternImage."""

from .functional import dcnv3
from .module import DCNv3

__all__ = ["DCNv3", "dcnv3"]
__version__ = "0.1.0"
