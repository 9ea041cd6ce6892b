"""An emulator of PTX: runs what nvcc compiled, on NumPy buffers, where there is no GPU."""

from emulator.errors import EmulatorError
from emulator.launch import emulate, nvcc_ptx
from emulator.parser import parse

__all__ = ["EmulatorError", "emulate", "nvcc_ptx", "parse"]
