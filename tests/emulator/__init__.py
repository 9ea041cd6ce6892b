"""An emulator of PTX: runs what nvcc and Triton compiled, on NumPy buffers, where there is no GPU."""

from emulator.errors import EmulatorError
from emulator.launch import Struct, emulate
from emulator.parser import parse
from emulator.tensormap import TensorMap
from emulator.unit import LOCKSTEP, Schedule

__all__ = ["LOCKSTEP", "EmulatorError", "Schedule", "Struct", "TensorMap", "emulate", "parse"]
