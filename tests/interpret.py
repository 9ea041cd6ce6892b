"""Launches a Triton probe: python interpret.py NAME DEVICE OUT.npz; on the CPU, in Triton's interpreter."""

from __future__ import annotations

import os
import sys


def main() -> None:
    name, device, out = sys.argv[1:]
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    import numpy as np
    import torch
    from triton.tools.tensor_descriptor import TensorDescriptor

    from emulator.tensormap import TensorMap
    from probes.triton_probes import PROBES

    probe = next(p for p in PROBES if p.name == name)
    tensors: dict[int, torch.Tensor] = {}  # by the array's identity: it may stand in several places

    def tensor(array: np.ndarray) -> torch.Tensor:
        if id(array) not in tensors:
            bits = torch.from_numpy(array.view(np.int16) if array.dtype == np.uint16 else array).to(device)
            tensors[id(array)] = bits.view(torch.bfloat16) if array.dtype == np.uint16 else bits
        return tensors[id(array)]

    def launched(argument: object) -> object:
        if isinstance(argument, TensorMap):
            padding = "nan" if argument.nan_fill else "zero"
            return TensorDescriptor.from_tensor(tensor(argument.array), list(argument.box), padding)
        return tensor(argument) if isinstance(argument, np.ndarray) else argument.item()  # type: ignore[attr-defined]

    arguments = probe.arguments(np.random.default_rng(0))
    probe.function[probe.grid](*map(launched, arguments), **probe.constexprs, **probe.options)
    found = []
    for position in probe.outputs:
        argument = arguments[position]
        array = argument.array if isinstance(argument, TensorMap) else argument
        result = tensor(array).cpu()
        found.append(result.view(torch.int16).numpy().view(np.uint16) if array.dtype == np.uint16 else result.numpy())
    np.savez(out, *found)


if __name__ == "__main__":
    main()
