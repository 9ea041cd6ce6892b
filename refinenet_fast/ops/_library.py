"""Registration with PyTorch, the same for every hot path.

A hot path ``<op>`` has three entries under ``torch.ops.refinenet_fast``. All take their tensors as one flat list (None
where an optional one is missing), then their options, then the backend's name:

- ``<op>``: inference; keeps nothing. Its Autograd key decides whether gradients are wanted.
- ``<op>_train``: the result and a list of what backward needs beyond the inputs.
- ``<op>_backward``: the gradients that ``needs`` asks for, in the order of the inputs.

The Autograd key is an ``autograd.Function``: on the eager path ``register_autograd`` costs several times as much.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from refinenet_fast import backends
from refinenet_fast.layout import empty_nhwc, nhwc

NAMESPACE = "refinenet_fast"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")

Tensors = list[Tensor | None]


class HotPath:
    """One hot path, written once over any backend's kernels, and its registration.

    Args:
        name: The op's name.
        options: Schema of what follows the tensors, such as ``"str order"``.
        forward: ``forward(kernels, tensors, *options, keep)`` -> (result, saved); saved is [] unless ``keep``.
        backward: ``backward(kernels, gy, tensors, saved, needs, *options)`` -> a gradient or None for each tensor;
            ``needs`` says which are wanted, and others may be None. ``gy`` is in NHWC memory.
        fake: ``fake(tensors, *options)`` -> (result, saved), uninitialised, of the right shapes, dtypes and strides.
        images: How many of ``tensors``, the first ones, are (N, C, H, W) activations; the rest are parameters.
        unread: Those of ``tensors``, by number, that backward does not read and that are of the result's shape: they
            are not kept, and ``gy`` stands in their places.
    """

    def __init__(
        self,
        name: str,
        options: str,
        *,
        forward: Callable[..., tuple[Tensor, list[Tensor]]],
        backward: Callable[..., Tensors],
        fake: Callable[..., tuple[Tensor, list[Tensor]]],
        images: Callable[[Tensors], int],
        unread: Callable[[Tensors], Sequence[int]] = lambda tensors: (),
    ) -> None:
        self.forward, self.backward, self.fake, self.images = forward, backward, fake, images
        arguments = f"Tensor?[] tensors, {options}, str backend"
        upstream = f"Tensor gy, Tensor?[] tensors, Tensor[] saved, bool[] needs, {options}, str backend"
        self._infer_op = _define(f"{name}({arguments}) -> Tensor", self._infer, self._fake_infer)
        self._train_op = _define(f"{name}_train({arguments}) -> (Tensor, Tensor[])", self._train, self._fake_train)
        self._grads_op = _define(f"{name}_backward({upstream}) -> Tensor[]", self._grads, self._fake_grads)
        self._function = _autograd_function(self._train_op, self._grads_op, unread)
        _LIBRARY.impl(name, self._autograd, "Autograd")

    def __call__(self, backend: str, tensors: Tensors, *options: Any) -> Tensor:
        """The op; or, where ``reference`` is forced in an export, the plain operations it is made of."""
        if torch.compiler.is_exporting() and backends.forces_reference():
            return self.forward(backends.get("reference"), tensors, *options, keep=False)[0]
        return self._infer_op(tensors, *options, backend)

    def _infer(self, tensors: Tensors, *options: Any) -> Tensor:
        *given, backend = options
        return self.forward(backends.get(backend), tensors, *given, keep=False)[0]

    def _train(self, tensors: Tensors, *options: Any) -> tuple[Tensor, list[Tensor]]:
        *given, backend = options
        return self.forward(backends.get(backend), tensors, *given, keep=True)

    def _grads(
        self, gy: Tensor, tensors: Tensors, saved: list[Tensor], needs: list[bool], *options: Any
    ) -> list[Tensor]:
        *given, backend = options
        grads = self.backward(backends.get(backend), nhwc(gy), tensors, saved, needs, *given)
        return [grad for grad, need in zip(grads, needs, strict=True) if need and grad is not None]

    def _autograd(self, tensors: Tensors, *options: Any) -> Tensor:
        wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        # Within forward-mode differentiation, too: it raises there, where the op below would drop the tangents.
        if wanted or forward_ad._current_level >= 0:
            return self._function.apply(len(tensors), *tensors, *options)
        with torch._C._AutoDispatchBelowAutograd():
            return self._infer_op(tensors, *options)

    def _fake_infer(self, tensors: Tensors, *options: Any) -> Tensor:
        return self.fake(tensors, *options[:-1])[0]

    def _fake_train(self, tensors: Tensors, *options: Any) -> tuple[Tensor, list[Tensor]]:
        return self.fake(tensors, *options[:-1])

    def _fake_grads(
        self, gy: Tensor, tensors: Tensors, saved: list[Tensor], needs: list[bool], *options: Any
    ) -> list[Tensor]:
        images = self.images(tensors)
        return [
            empty_nhwc(t, t.shape) if i < images else torch.empty_like(t)
            for i, (t, need) in enumerate(zip(tensors, needs, strict=True))
            if need and t is not None
        ]


def _define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define one op for every device, with its fake."""
    name = schema.split("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _autograd_function(
    train_op: Any, grads_op: Any, unread: Callable[[Tensors], Sequence[int]]
) -> type[torch.autograd.Function]:
    """The bridge to autograd: tensors are separate arguments, since in a list they would get no gradient."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, count: int, *arguments: Any) -> Tensor:
            tensors, options = list(arguments[:count]), arguments[count:]
            with torch._C._AutoDispatchBelowAutograd():
                y, saved = train_op(tensors, *options)
            ctx.unread = {i for i in unread(tensors) if tensors[i] is not None}
            ctx.save_for_backward(*(None if i in ctx.unread else t for i, t in enumerate(tensors)), *saved)
            ctx.count, ctx.options = count, options
            return y

        @staticmethod
        def backward(ctx: Any, gy: Tensor) -> tuple[Any, ...]:
            held = ctx.saved_tensors
            tensors = [gy if i in ctx.unread else t for i, t in enumerate(held[: ctx.count])]
            saved = list(held[ctx.count :])
            needs = list(ctx.needs_input_grad[1 : 1 + ctx.count])
            with torch.no_grad():
                results = grads_op(gy, tensors, saved, needs, *ctx.options)
            grads = iter(_differentiable_once(results) if torch.is_grad_enabled() else results)
            return None, *(next(grads) if need else None for need in needs), *(None for _ in ctx.options)

    return Function


def _differentiable_once(grads: list[Tensor]) -> list[Tensor]:
    """Gradients whose own backward raises: under ``create_graph`` they would pass for constants otherwise.

    ``once_differentiable`` does this only where the upstream gradient requires one itself.
    """
    message = "refinenet_fast: gradients of gradients are not implemented"
    raises = torch._C._functions.DelayedError(message, len(grads))
    marked: Any = raises(*(grad.detach().requires_grad_() for grad in grads))
    return [marked] if len(grads) == 1 else list(marked)
