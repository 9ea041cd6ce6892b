"""``export(model, path)``: a network for other programs, as ONNX or as PyTorch's exported program."""

from __future__ import annotations

import copy
import importlib
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from refinenet_fast.backends import use_backend
from refinenet_fast.files import whole
from refinenet_fast.model import RefineNet
from refinenet_fast.ops import _check

FORMATS = ("onnx", "torch")
INPUT, OUTPUT = "images", "logits"


class Normalised(nn.Module):
    """A network behind the normalisation of its images.

    Args:
        model: Takes normalised images.
        mean, std: Of each channel, of images from 0 to 1.
    """

    mean: Tensor  # (3, 1, 1)
    std: Tensor  # (3, 1, 1)

    def __init__(self, model: RefineNet, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        weight = model.classifier.weight
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, dtype=weight.dtype, device=weight.device)[:, None, None])

    def forward(
        self,
        images: Tensor,  # (N, 3, H, W)
    ) -> Tensor:  # (N, num_classes, H, W)
        return self.model((images - self.mean) / self.std)


def export(
    model: RefineNet,
    path: str | Path,
    format: str = "onnx",
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write a network, in eval mode, for programs that know nothing of this package.

    It is traced on the ``reference`` backend, so the file holds PyTorch's (or ONNX's) own operations. Batch and size
    stay open: images (N, 3, H, W) of the model's dtype, N from 1, H and W from 33 pixels, give logits
    (N, num_classes, H, W), or smaller ones where the model's ``upsample`` is False.

    Args:
        model: Left as it is.
        path: The file; an old one is replaced in one step.
        format: ``"onnx"`` (needs the extra ``export``), or ``"torch"``, which ``torch.export.load`` reads.
        mean, std: Three values each, for images from 0 to 1: their normalisation becomes part of the network. Without
            them the network takes images normalised already.
        metadata: What is to be known of the network, as JSON can hold it, kept in the file: ONNX's metadata
            properties, the JSON of one a key; or the extra file ``metadata.json`` of an exported program.

    Returns:
        ``path``.

    Raises:
        TypeError, ValueError: An argument is not of this form; names it, what was expected and what came.
        ImportError: ``"onnx"``, and what it needs is not installed.
        OSError: The file cannot be written.

    Example:
        >>> model = RefineNet(num_classes=21, trunk="resnet50")
        >>> export(model, "refinenet.onnx", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
        PosixPath('refinenet.onnx')
    """
    if not isinstance(model, RefineNet):
        raise TypeError(f"model: expected a RefineNet, got {type(model).__name__}")
    _check.choice(format, "format", FORMATS)
    _check_normalisation(mean, std)
    if format == "onnx":
        _check_installed()
    path, write = Path(path), {"onnx": _write_onnx, "torch": _write_program}[format]
    deployed: nn.Module = copy.deepcopy(model).eval()
    if mean is not None and std is not None:
        deployed = Normalised(deployed, mean, std)  # type: ignore[arg-type]
    write(_program(deployed, model.classifier.weight), path, dict(metadata or {}))
    return path


def _check_normalisation(mean: Any, std: Any) -> None:
    if (mean is None) != (std is None):
        raise ValueError(f"mean, std: expected both or neither, got {mean!r} and {std!r}")
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and len(_check.sequence(values, name)) != 3:
            raise ValueError(f"{name}: expected three values, got {values!r}")


def _check_installed() -> None:
    for package in ("onnx", "onnxscript"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ImportError(f"format: onnx needs {package}: run `pip install 'refinenet_fast[export]'`") from error


def _program(deployed: nn.Module, like: Tensor) -> ExportedProgram:
    """Dynamic in batch, height and width, which raises should the trace take one of them for a constant."""
    images = torch.zeros(2, 3, 70, 102, dtype=like.dtype, device=like.device)
    sizes = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    with use_backend("reference"), torch.no_grad():
        return torch.export.export(deployed, (images,), dynamic_shapes=(sizes,), strict=False)


def _write_program(program: ExportedProgram, path: Path, metadata: dict[str, Any]) -> None:
    extra = {"metadata.json": json.dumps(metadata)}
    with whole(path) as file:
        torch.export.save(program, file, extra_files=extra)


def _write_onnx(program: ExportedProgram, path: Path, metadata: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own parts that are deprecated
        names: dict[str, Any] = {"input_names": [INPUT], "output_names": [OUTPUT]}
        proto = torch.onnx.export(program, dynamo=True, verbose=False, **names).model_proto
    _name_sizes(proto.graph)
    for key, value in metadata.items():
        proto.metadata_props.add(key=key, value=json.dumps(value))
    with whole(path) as file:
        file.write(proto.SerializeToString())


def _name_sizes(graph: Any) -> None:
    """Call the open sizes of an ONNX graph by their names, where the exporter has left symbols such as s34."""
    sizes = [dimension.dim_param for dimension in graph.input[0].type.tensor_type.shape.dim]
    names = {symbol: name for symbol, name in zip(sizes, ("batch", "", "height", "width")) if symbol}
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param in names:
                dimension.dim_param = names[dimension.dim_param]
