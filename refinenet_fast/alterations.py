"""What has become of an accelerated block: whether something has been changed since, or is at work around it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad

MARK = "refinenet_fast_adapter"  # the attribute by which the class of an accelerated block is known
REPLACED = "refinenet_fast_replaced"  # its attribute with the block's own class and that one's forward
SETTINGS = "_refinenet_fast_settings"  # that of the block itself with what it was when it was accelerated
_OF_EVERY_MODULE = frozenset({*dir(nn.Module()), SETTINGS})
_CONTAINERS, _SIMPLE = (list, tuple, dict), (bool, int, float, str)
# Name and class of each module, the names of all its attributes, and those that are compared.
Settings = tuple[tuple[str, type | None, frozenset[str], tuple[tuple[str, Any], ...]], ...]


def is_patched(kind: Any) -> bool:
    """Whether a class that we accelerated had another forward then."""
    replaced = getattr(kind, REPLACED, None)
    return replaced is not None and replaced[0].forward is not replaced[1]


def attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Those of its own that can decide what it computes, with their contents."""
    for name, value in vars(module).items():
        if name not in _OF_EVERY_MODULE and not name.startswith("__"):
            yield name, _contents(value)


def _contents(value: Any) -> Any:
    """``value``, or what it consists of: a list changes and stays the same one; partial functions have no equality, and
    under Dynamo no identity."""
    if isinstance(value, functools.partial):
        return value.func, value.args, tuple(value.keywords.items())
    if isinstance(value, _CONTAINERS):
        entries = list(value.items()) if isinstance(value, dict) else value
        return tuple([_contents(entry) for entry in entries])
    return value


def _is_other(value: Any, then: Any) -> bool:
    """Whether ``value`` has other contents; of what has no equality to rely on, whether it is another."""
    if value is then:
        return False
    now = _contents(value)
    if type(now) is not type(then):
        return True
    if isinstance(now, tuple):
        return len(now) != len(then) or any(_is_other(a, b) for a, b in zip(now, then, strict=True))
    return now is not then and (not (isinstance(now, _SIMPLE) or callable(now)) or now != then)


def change(block: nn.Module) -> str | None:
    """What is no longer as it was when the block was accelerated, if anything is."""
    settings = getattr(block, SETTINGS, ())
    modules = dict(block.named_modules(remove_duplicate=False)) if settings else {}
    for name, kind, known, compared in settings:
        module = modules.get(name)
        if module is None or (kind is not None and type(module) is not kind):
            return f"{name!r} has been replaced since; restore and accelerate again"
        own = vars(module)
        changed = [attribute for attribute, then in compared if _is_other(own.get(attribute, ...), then)]
        if not own.keys() <= known:
            changed += [attribute for attribute, _ in attributes(module) if attribute not in known]
        for attribute in changed:
            if attribute in known or not attribute.startswith("_") or hasattr(type(module), attribute):
                which = f"{name}.{attribute}" if name else attribute  # else a mark of some library's, read by itself
                return f"{which!r} has been changed since; restore and accelerate again"
    return None


def is_transformed() -> bool:
    """Whether torch.func, forward-mode derivatives or torch.jit.trace, which the ops do not know, are at work."""
    if _is_in_functorch() or forward_ad._current_level >= 0:
        return True
    return not torch.compiler.is_dynamo_compiling() and torch.jit.is_tracing()


def _is_in_functorch() -> bool:
    return torch._C._functorch.maybe_current_level() is not None


# Dynamo cannot trace the call, but is within torch.func as well, and guards on that. torch.compiler's decorator, which
# does this, would import Dynamo with this module.
_is_in_functorch._dynamo_marked_constant = True  # type: ignore[attr-defined]
