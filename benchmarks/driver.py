"""CUDA's driver API through ctypes: cubins, launches in clusters, tensor maps over NumPy arrays.

Needs libcuda (12.4 or newer) and torch; no toolkit and no C compiler. Names are those of cuda.h.
"""

from __future__ import annotations

import ctypes
import math
import sys
import time
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_uint32, c_uint64, c_void_p
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from emulator.tensormap import SIZES, TensorMap

# ---- cuda.h -----------------------------------------------------------------------------------

CUDA_SUCCESS, CUDA_ERROR_NOT_READY = 0, 600
CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION = 4
CU_TENSOR_MAP_INTERLEAVE_NONE = 0
CU_TENSOR_MAP_L2_PROMOTION_NONE = 0
CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA = 0, 1
DATA_TYPES = {  # CUtensorMapDataType of a TensorMap's kinds
    "u8": 0,
    "u16": 1,
    "u32": 2,
    "u64": 4,
    "f16": 6,
    "f32": 7,
    "f64": 8,
    "bf16": 9,
    "tf32": 11,
}
SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}  # CUtensorMapSwizzle of bytes


class CUtensorMap(ctypes.Structure):
    """128 opaque bytes, to be aligned to 64."""

    _fields_ = (("opaque", c_uint64 * 16),)


class ClusterDimension(ctypes.Structure):
    _fields_ = (("x", c_uint), ("y", c_uint), ("z", c_uint))


class CUlaunchAttributeValue(ctypes.Union):
    _fields_ = (("pad", c_uint64 * 8), ("clusterDim", ClusterDimension))


class CUlaunchAttribute(ctypes.Structure):
    _fields_ = (("id", c_int), ("value", CUlaunchAttributeValue))


class CUlaunchConfig(ctypes.Structure):
    _fields_ = (
        ("gridDimX", c_uint),
        ("gridDimY", c_uint),
        ("gridDimZ", c_uint),
        ("blockDimX", c_uint),
        ("blockDimY", c_uint),
        ("blockDimZ", c_uint),
        ("sharedMemBytes", c_uint),
        ("hStream", c_void_p),
        ("attrs", POINTER(CUlaunchAttribute)),
        ("numAttrs", c_uint),
    )


PROTOTYPES = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuCtxSetCurrent": (c_void_p,),
    "cuModuleLoadData": (POINTER(c_void_p), c_char_p),
    "cuModuleGetFunction": (POINTER(c_void_p), c_void_p, c_char_p),
    "cuFuncSetAttribute": (c_void_p, c_int, c_int),
    "cuFuncGetParamInfo": (c_void_p, c_size_t, POINTER(c_size_t), POINTER(c_size_t)),
    "cuTensorMapEncodeTiled": (
        POINTER(CUtensorMap),
        c_int,  # CUtensorMapDataType
        c_uint32,  # rank
        c_void_p,  # globalAddress
        POINTER(c_uint64),  # globalDim
        POINTER(c_uint64),  # globalStrides
        POINTER(c_uint32),  # boxDim
        POINTER(c_uint32),  # elementStrides
        c_int,  # CUtensorMapInterleave
        c_int,  # CUtensorMapSwizzle
        c_int,  # CUtensorMapL2promotion
        c_int,  # CUtensorMapFloatOOBfill
    ),
    "cuLaunchKernelEx": (POINTER(CUlaunchConfig), c_void_p, POINTER(c_void_p), POINTER(c_void_p)),
    "cuStreamQuery": (c_void_p,),
}

# ---- errors -----------------------------------------------------------------------------------


class DriverError(RuntimeError):
    """A call failed: its name, CUDA's name of the error and its description."""


class LaunchError(RuntimeError):
    """A kernel failed or did not end. Nothing more can be done in this process."""


# ---- arguments --------------------------------------------------------------------------------


class Buffers:
    """The device's copies of the arrays of one launch: each array once, wherever it stands among the arguments."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pairs: list[tuple[np.ndarray, torch.Tensor]] = []  # (bytes,) uint8: the caller's memory, its copy

    def address(self, array: np.ndarray) -> int:
        """Of the copy of a C-contiguous array, aligned to 256 bytes.

        Raises:
            ValueError: The array is not contiguous, or shares only part of its memory with another.
        """
        if not array.flags.c_contiguous:
            raise ValueError(f"expected C-contiguous memory, got shape {array.shape} with strides {array.strides}")
        data = array.reshape(-1).view(np.uint8)
        for known, copy in self.pairs:
            if known.ctypes.data == data.ctypes.data and known.size == data.size:
                return copy.data_ptr()
            if np.may_share_memory(known, data):
                raise ValueError(f"an array of {data.size} bytes overlaps another of {known.size}")
        self.pairs.append((data, torch.tensor(data, device=self.device)))
        return self.pairs[-1][1].data_ptr()

    def read_back(self) -> None:
        """Copies every buffer into its array."""
        for data, copy in self.pairs:
            data[...] = copy.cpu().numpy()


def tiled(tensor: TensorMap) -> tuple[list[int], list[int], list[int]]:
    """globalDim and boxDim in elements, globalStrides in bytes (one fewer), as the driver has them: innermost first."""
    dims = list(tensor.array.shape[::-1])
    strides = [SIZES[tensor.kind] * math.prod(dims[:k]) for k in range(1, len(dims))]
    return dims, list(tensor.box[::-1]), strides


def three(sizes: Sequence[int]) -> tuple[int, ...]:
    return (*map(int, sizes), 1, 1)[:3]


# ---- the driver -------------------------------------------------------------------------------


class Driver:
    """The driver, in the primary context of ``device``, which is torch's too.

    Raises:
        OSError: There is no libcuda.
        DriverError: A call failed.
    """

    def __init__(self, device: torch.device, library: str = "libcuda.so.1") -> None:
        self.device = device
        self.cuda = ctypes.CDLL(library)
        for name, types in PROTOTYPES.items():
            function = getattr(self.cuda, name)
            function.argtypes, function.restype = types, c_int
        number, context = c_int(), c_void_p()
        self.call("cuInit", 0)
        self.call("cuDeviceGet", byref(number), device.index or 0)
        self.call("cuDevicePrimaryCtxRetain", byref(context), number.value)
        self.call("cuCtxSetCurrent", context)

    def call(self, name: str, *arguments: object) -> None:
        status = getattr(self.cuda, name)(*arguments)
        if status != CUDA_SUCCESS:
            raise DriverError(f"{name}: {self.describe(status)}")

    def describe(self, status: int) -> str:
        """An error's name and what it means."""
        texts = []
        for function in (self.cuda.cuGetErrorName, self.cuda.cuGetErrorString):
            text = c_char_p()
            function(status, byref(text))
            texts.append((text.value or str(status).encode()).decode())
        return f"{texts[0]} ({texts[1]})"

    def version(self) -> str:
        """The newest CUDA that the driver knows: "13.0"."""
        number = c_int()
        self.call("cuDriverGetVersion", byref(number))
        return f"{number.value // 1000}.{number.value % 1000 // 10}"

    def load(self, cubin: bytes) -> c_void_p:
        """A module, which stays until the process ends."""
        module = c_void_p()
        self.call("cuModuleLoadData", byref(module), cubin)
        return module

    def function(self, module: c_void_p, name: str) -> c_void_p:
        function = c_void_p()
        self.call("cuModuleGetFunction", byref(function), module, name.encode())
        return function

    def parameter_sizes(self, function: c_void_p) -> list[int]:
        """Bytes of each of a kernel's parameters; empty if the driver cannot tell."""
        sizes: list[int] = []
        offset, size = c_size_t(), c_size_t()
        # Past the last one the driver says CUDA_ERROR_INVALID_VALUE.
        while self.cuda.cuFuncGetParamInfo(function, len(sizes), byref(offset), byref(size)) == CUDA_SUCCESS:
            sizes.append(size.value)
        return sizes

    def encode(self, tensor: TensorMap, address: int) -> CUtensorMap:
        """A tensor map of the memory at ``address``; the struct is aligned to 64 bytes."""
        storage = ctypes.create_string_buffer(ctypes.sizeof(CUtensorMap) + 63)
        result = CUtensorMap.from_buffer(storage, -ctypes.addressof(storage) % 64)
        dims, box, strides = tiled(tensor)
        rank, fill = len(dims), CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE
        if tensor.nan_fill:
            fill = CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA
        try:
            self.call(
                "cuTensorMapEncodeTiled",
                byref(result),
                DATA_TYPES[tensor.kind],
                rank,
                address,
                (c_uint64 * rank)(*dims),
                (c_uint64 * rank)(*strides),  # one more than is read: an array of none has no address
                (c_uint32 * rank)(*box),
                (c_uint32 * rank)(*[1] * rank),
                CU_TENSOR_MAP_INTERLEAVE_NONE,
                SWIZZLES[tensor.swizzle],
                CU_TENSOR_MAP_L2_PROMOTION_NONE,
                fill,
            )
        except DriverError as error:
            what = f"{tensor.kind}, sizes {dims}, strides {strides}, box {box}, swizzle {tensor.swizzle}"
            raise DriverError(f"{error}: {what}, fill {fill}") from None
        return result

    def parameter(self, argument: object, buffers: Buffers) -> ctypes._CData:
        """An argument as the kernel's parameter holds it."""
        match argument:
            case TensorMap():
                return self.encode(argument, buffers.address(argument.array))
            case np.ndarray():
                return c_uint64(buffers.address(argument))
            case np.generic():
                return ctypes.create_string_buffer(argument.tobytes(), argument.nbytes)
        raise TypeError(f"expected an array, a NumPy scalar or a TensorMap, got {argument!r}")

    def launch(
        self,
        function: c_void_p,
        grid: Sequence[int],
        block: Sequence[int],
        arguments: Sequence[object],
        *,
        cluster: Sequence[int] = (1,),
        shared: int = 0,
        seconds: float = 20.0,
    ) -> None:
        """Runs a kernel to its end and copies what it left into the arrays among the arguments.

        Args:
            grid: Blocks in x, y, z; trailing ones may be left out. So too block (threads) and cluster (blocks).
            arguments: One for each parameter: C-contiguous arrays, NumPy scalars as wide as the parameter, TensorMap.
            shared: Bytes of dynamic shared memory.
            seconds: How long it may run.

        Raises:
            ValueError, TypeError: The arguments do not fit the kernel.
            DriverError: The driver refuses the launch.
            LaunchError: The kernel failed or is still running.
        """
        buffers = Buffers(self.device)
        values = [self.parameter(argument, buffers) for argument in arguments]
        sizes, given = self.parameter_sizes(function), [ctypes.sizeof(value) for value in values]
        # The driver reads as many bytes as the kernel's parameters have, whatever it is given.
        if sizes and sizes != given:
            raise ValueError(f"the kernel's parameters have {sizes} bytes, the arguments {given}")
        if shared:  # beyond 48 KB, static memory included, it has to be asked for
            self.call("cuFuncSetAttribute", function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared)
        attributes = (CUlaunchAttribute * 1)()
        attributes[0].id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        attributes[0].value.clusterDim = ClusterDimension(*three(cluster))
        clustered = math.prod(cluster) > 1
        # The stream is the default one, which torch's copies are on.
        config = CUlaunchConfig(*three(grid), *three(block), shared, None, attributes, int(clustered))
        pointers = (c_void_p * len(values))(*map(ctypes.addressof, values))
        self.call("cuLaunchKernelEx", byref(config), function, pointers, None)
        self.wait(seconds)
        buffers.read_back()

    def wait(self, seconds: float) -> None:
        """Until the default stream is idle; not by cuStreamSynchronize, which never returns if a kernel hangs."""
        deadline = time.monotonic() + seconds
        while (status := self.cuda.cuStreamQuery(None)) == CUDA_ERROR_NOT_READY:
            if time.monotonic() > deadline:
                raise LaunchError(f"still running after {seconds:g} s")
            time.sleep(1e-4)
        if status != CUDA_SUCCESS:
            raise LaunchError(f"the kernel failed: {self.describe(status)}")
