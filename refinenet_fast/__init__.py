"""RefineNet's hot paths as fused kernels, forward and backward, and the model on top of them."""

from importlib.metadata import PackageNotFoundError, version

from refinenet_fast import ops
from refinenet_fast._native import build_info
from refinenet_fast.accelerate import Explanation, accelerate, explain, restore
from refinenet_fast.backends import list_backends, use_backend
from refinenet_fast.blocks import ChainedResidualPooling, MultiResolutionFusion, RefineNetBlock, ResidualConvUnit
from refinenet_fast.exporting import export
from refinenet_fast.model import RefineNet
from refinenet_fast.tuning import tune

try:
    __version__ = version("refinenet_fast")
except PackageNotFoundError:  # an uninstalled checkout on the path
    __version__ = "0+unknown"

__all__ = [
    "ChainedResidualPooling",
    "Explanation",
    "MultiResolutionFusion",
    "RefineNet",
    "RefineNetBlock",
    "ResidualConvUnit",
    "accelerate",
    "build_info",
    "explain",
    "export",
    "list_backends",
    "ops",
    "restore",
    "tune",
    "use_backend",
]
