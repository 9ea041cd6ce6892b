"""Triton kernels, imported as ``refinenet_fast.kernels``.

One file a kernel, named like its reference, test and benchmark. Nothing here registers ops at import: from the
repository root a bare ``import kernels`` would otherwise register them twice.
"""
