"""Multi-resolution fusion (Lin et al., CVPR 2017, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from refinenet_fast.backends import Backend, WayOut, resolve
from refinenet_fast.layout import empty_nhwc, nhwc
from refinenet_fast.ops import _check
from refinenet_fast.ops._autocast import activations
from refinenet_fast.ops._library import HotPath, Tensors


def fuse(
    xs: Sequence[Tensor],  # each (N, C_i, H_i, W_i)
    weights: Sequence[Tensor | None],  # each (K, C_i, 3, 3) or (K, C_i, 1, 1)
    biases: Sequence[Tensor | None] | None = None,  # each (K,)
    size: tuple[int, int] | None = None,  # (H, W)
    align_corners: bool = True,
) -> Tensor:  # (N, K, H, W)
    """Multi-resolution fusion: each path convolved at its own resolution, resized bilinearly to ``size``, all summed.

    Args:
        xs: One or more paths, of any sizes and any floating dtype. ``channels_last`` memory is used as it is, another
            layout costs one copy.
        weights: One entry a path; None for a path without a convolution. Float32 weights may stand beside float16 or
            bfloat16 activations.
        biases: One entry a path, None where it has no bias; None for no biases at all.
        size: (H, W) in pixels; the largest path's height and width where None.
        align_corners: As in ``torch.nn.functional.interpolate``.

    Returns:
        In ``channels_last`` memory, of the dtype of ``xs`` (of autocast's where autocast is on).

    Raises:
        TypeError, ValueError: An argument is not of this form; names it, what was expected and what came.
        RuntimeError: A forced backend cannot run this; says why.
    """
    xs = [activations(_check.image(x, f"xs[{i}]")) for i, x in enumerate(_check.sequence(xs, "xs"))]
    weights = _check.as_many(weights, "weights", len(xs), of="xs")
    biases = _check.as_many(biases, "biases", len(xs), of="xs")
    _check.flag(align_corners, "align_corners")
    _check_paths(xs, weights, biases)
    if size is None:
        size = max(x.shape[2] for x in xs), max(x.shape[3] for x in xs)
    size = _check.size(size, "size")
    return _FUSE(resolve("fuse", xs[0]), [*xs, *weights, *biases], size, align_corners)


def _check_paths(xs: list[Tensor], weights: Tensors, biases: Tensors) -> None:
    channels = None
    for i, (x, w, b) in enumerate(zip(xs, weights, biases, strict=True)):
        _check.same_device_and_dtype(x, f"xs[{i}]", xs[0], "xs[0]")
        if x.shape[0] != xs[0].shape[0]:
            raise ValueError(f"xs[{i}]: expected batch {xs[0].shape[0]}, that of xs[0], got {x.shape[0]}")
        if w is not None:
            _check.weight(w, f"weights[{i}]", x)
            _check.bias(b, f"biases[{i}]", w, x)
        elif b is not None:
            raise ValueError(f"biases[{i}]: expected None beside weights[{i}] = None, got a bias")
        out = x.shape[1] if w is None else w.shape[0]
        channels = out if channels is None else channels
        if out != channels:
            source = f"xs[{i}]" if w is None else f"weights[{i}]"
            raise ValueError(f"{source}: expected {channels} output channels, those of path 0, got {out}")


def _unpack(tensors: Tensors) -> tuple[list[Tensor], Tensors, Tensors]:
    paths = len(tensors) // 3
    return tensors[:paths], tensors[paths : 2 * paths], tensors[2 * paths :]


def _forward(
    kernels: Backend, tensors: Tensors, size: Sequence[int], align_corners: bool, keep: bool
) -> tuple[Tensor, list[Tensor]]:
    """The small paths first, at their own resolution; the last full-size convolution adds up what it can."""
    full = (size[0], size[1])
    plain, convolved, resized = [], [], []
    for x, w, b in zip(*_unpack(tensors), strict=True):
        if (x.shape[2], x.shape[3]) == full:
            plain.append(x) if w is None else convolved.append((x, w, b))
        else:
            resized.append(x if w is None else kernels.conv3x3(x, w, way_out=WayOut(bias=b), pack=not keep))
    y: Tensor | None = None
    if convolved:
        sums = tuple(plain)
        for k, (x, w, b) in enumerate(convolved):
            upsample = resized.pop() if resized and k == len(convolved) - 1 else None
            way_out = WayOut(b, add=sums, upsample=upsample, align_corners=align_corners)
            y = kernels.conv3x3(x, w, way_out=way_out, pack=not keep)
            sums = (y,)
    elif len(plain) == 1 and resized:
        y = kernels.bilinear(resized.pop(), full, align_corners, add=plain[0])
    elif plain:
        y = kernels.way_out(nhwc(plain[0].clone()), WayOut(add=tuple(plain[1:])))
    for t in resized:
        y = kernels.bilinear(t, full, align_corners, add=y, overwrite_add=True)
    return y, []


def _backward(
    kernels: Backend,
    gy: Tensor,  # (N, K, H, W)
    tensors: Tensors,
    saved: list[Tensor],
    needs: list[bool],
    size: Sequence[int],
    align_corners: bool,
) -> Tensors:
    """Every path sees ``gy`` at its own resolution; paths of one size share its resized copy."""
    paths = len(tensors) // 3
    at_size = {(size[0], size[1]): gy}
    grads: Tensors = [None] * len(tensors)
    for i, (x, w, b) in enumerate(zip(*_unpack(tensors), strict=True)):
        need_x, need_w, need_b = needs[i], needs[paths + i], needs[2 * paths + i]
        if not (need_x or need_w or need_b):
            continue
        own = (x.shape[2], x.shape[3])
        if own not in at_size:
            at_size[own] = kernels.bilinear_backward(gy, own, align_corners)
        g = at_size[own]
        if need_x:
            grads[i] = nhwc(g.clone()) if w is None else kernels.conv3x3_input_grad(g, w)
        wanted = w if need_w else None, b if need_b else None
        grads[paths + i], grads[2 * paths + i] = kernels.parameter_grads(x, g, *wanted)
    return grads


def _fake(tensors: Tensors, size: Sequence[int], align_corners: bool) -> tuple[Tensor, list[Tensor]]:
    xs, weights, _ = _unpack(tensors)
    channels = xs[0].shape[1] if weights[0] is None else weights[0].shape[0]
    return empty_nhwc(xs[0], (xs[0].shape[0], channels, size[0], size[1])), []


_FUSE = HotPath(
    "fuse",
    "SymInt[2] size, bool align_corners",
    forward=_forward,
    backward=_backward,
    fake=_fake,
    images=lambda tensors: len(tensors) // 3,
)
