"""benchmarks/golden_probe.py, as far as it goes without a GPU: against cuda.h, and a driver that only takes notes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import golden
from emulator import parse
from emulator.tensormap import TensorMap
from probes import triton_probes
from probes.layouts import bf16

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
RECORDED = Path(__file__).resolve().parent / "probes" / "triton-3.6"
sys.path.append(str(BENCHMARKS))
golden_probe = pytest.importorskip("golden_probe", reason="needs the checkout's benchmarks/")
driver = pytest.importorskip("driver")

NVCC = golden_probe.find_nvcc()
needs_cuda_h = pytest.mark.skipif(not (NVCC and shutil.which("gcc")), reason="needs nvcc, for cuda.h, and gcc")

# ---- cuda.h ----------------------------------------------------------------------------------------------------------

TYPES = {
    "u8": "UINT8",
    "u16": "UINT16",
    "u32": "UINT32",
    "u64": "UINT64",
    "f16": "FLOAT16",
    "f32": "FLOAT32",
    "f64": "FLOAT64",
    "bf16": "BFLOAT16",
    "tf32": "TFLOAT32",
}
CONSTANTS = [name for name in dir(driver) if name.startswith(("CU_", "CUDA_"))]
# Of each expression of C, what the ctypes declarations say it is.
EXPRESSIONS = {
    **{name: getattr(driver, name) for name in CONSTANTS},
    **{f"CU_TENSOR_MAP_DATA_TYPE_{TYPES[kind]}": value for kind, value in driver.DATA_TYPES.items()},
    **{f"CU_TENSOR_MAP_SWIZZLE_{f'{k}B' if k else 'NONE'}": value for k, value in driver.SWIZZLES.items()},
    **{
        f"sizeof({struct.__name__})": driver.ctypes.sizeof(struct)
        for struct in (driver.CUtensorMap, driver.CUlaunchConfig, driver.CUlaunchAttribute)
    },
    **{
        f"offsetof({struct.__name__}, {field[0]})": getattr(struct, field[0]).offset
        for struct in (driver.CUlaunchConfig, driver.CUlaunchAttribute)
        for field in struct._fields_
    },
    **{f"offsetof(CUlaunchAttributeValue, clusterDim.{axis})": 4 * k for k, axis in enumerate("xyz")},
    "sizeof(CUlaunchAttributeValue)": driver.ctypes.sizeof(driver.CUlaunchAttributeValue),
    "sizeof(CUresult)": 4,
}

# A libcuda whose one kernel, k(u32* p, u32 n, CUtensorMap map), adds n to *p and prints what it was launched with. That
# it compiles says that these are the prototypes of cuda.h.
STUB = r"""
#include <cuda.h>
#include <stdio.h>
#include <string.h>
static const size_t sizes[] = {8, 4, 128};
static int busy, failing;
CUresult cuInit(unsigned flags) { return flags; }
CUresult cuDriverGetVersion(int* version) { *version = 13010; return 0; }
CUresult cuGetErrorName(CUresult error, const char** text) { *text = error == 719 ? "FAILED" : 0; return error != 719; }
CUresult cuGetErrorString(CUresult error, const char** text) { *text = "in words"; return 0; }
CUresult cuDeviceGet(CUdevice* device, int ordinal) { *device = ordinal; return 0; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  *context = (CUcontext)0x7fff12345678;
  return 0;
}
CUresult cuCtxSetCurrent(CUcontext context) { return context == (CUcontext)0x7fff12345678 ? 0 : 201; }
CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  *module = (CUmodule)0x7fff00000001;
  return memcmp(image, "\x7f" "ELF\0x", 6) ? 200 : 0;
}
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  *function = (CUfunction)0x7fff00000002;
  failing = !strcmp(name, "failing"), busy = !strcmp(name, "endless") ? -1 : 3;
  return module == (CUmodule)0x7fff00000001 ? 0 : 400;
}
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute attribute, int value) {
  printf("attribute %d = %d\n", attribute, value);
  return 0;
}
CUresult cuFuncGetParamInfo(CUfunction f, size_t index, size_t* offset, size_t* size) {
  if (f != (CUfunction)0x7fff00000002 || index >= 3) return CUDA_ERROR_INVALID_VALUE;
  *size = sizes[index];
  return 0;
}
CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* dims, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  if ((size_t)map % 64 || interleave || promotion) return CUDA_ERROR_INVALID_VALUE;
  printf("map %d %u: ", type, rank);
  for (unsigned k = 0; k < rank; ++k) printf("%lu/%u/%u ", (unsigned long)dims[k], box[k], steps[k]);
  for (unsigned k = 0; k + 1 < rank; ++k) printf("%lu ", (unsigned long)strides[k]);
  printf("%d %d\n", swizzle, fill);
  map->opaque[0] = (cuuint64_t)address, map->opaque[15] = 77;
  return 0;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction f, void** params, void** extra) {
  if (f != (CUfunction)0x7fff00000002 || extra || c->hStream) return CUDA_ERROR_INVALID_VALUE;
  unsigned* p = *(unsigned**)params[0];
  const CUtensorMap* map = params[2];
  *p += *(unsigned*)params[1];
  printf("launch %u,%u,%u %u,%u,%u %u %d %d", c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY,
         c->blockDimZ, c->sharedMemBytes, map->opaque[0] == (cuuint64_t)p, (int)map->opaque[15]);
  for (unsigned k = 0; k < c->numAttrs; ++k) {
    const CUlaunchAttribute* a = c->attrs + k;
    printf(" %d=%u,%u,%u", a->id, a->value.clusterDim.x, a->value.clusterDim.y, a->value.clusterDim.z);
  }
  printf("\n");
  fflush(stdout);
  return 0;
}
CUresult cuStreamQuery(CUstream stream) {
  if (stream) return CUDA_ERROR_INVALID_HANDLE;
  if (busy) { busy -= busy > 0; return CUDA_ERROR_NOT_READY; }
  return failing ? 719 : 0;
}
"""


def compiled(folder: Path, code: str, out: str, *flags: str) -> Path:
    include = Path(NVCC).resolve().parent.parent / "include"
    if not (include / "cuda.h").exists():  # nvcc may be a script that calls the real one
        said = subprocess.run([NVCC, "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
        top = next(line.split("=", 1)[1] for line in said.splitlines() if line.startswith("#$ TOP="))
        include = Path(top.strip()) / "include"
    if not (include / "cuda.h").exists():
        pytest.skip("no cuda.h beside nvcc")
    source = folder / f"{out}.c"
    source.write_text(code)
    subprocess.run(["gcc", "-Wall", *flags, f"-I{include}", str(source), "-o", str(folder / out)], check=True)
    return folder / out


@needs_cuda_h
def test_structs_and_constants_are_those_of_cuda_h(tmp_path):
    lines = "".join(f'printf("%lld\\n", (long long)({expression}));' for expression in EXPRESSIONS)
    code = f"#include <cuda.h>\n#include <stddef.h>\n#include <stdio.h>\nint main(void) {{{lines} return 0;}}\n"
    printed = subprocess.run([compiled(tmp_path, code, "print")], capture_output=True, text=True, check=True).stdout
    assert dict(zip(EXPRESSIONS, map(int, printed.split()), strict=True)) == EXPRESSIONS


@pytest.fixture
def cuda(tmp_path):
    library = compiled(tmp_path, STUB, "libstub.so", "-shared", "-fPIC", "-Wno-unused")
    return driver.Driver(torch.device("cpu"), str(library))


@needs_cuda_h
def test_a_launch_hands_over_what_was_meant(cuda, capfd):
    array = np.arange(2 * 3 * 8, dtype=np.uint32).reshape(2, 3, 8)
    argument = TensorMap(array.view(np.float32), (1, 2, 8), "f32", 32, nan_fill=True)
    function = cuda.function(cuda.load(b"\x7fELF\0x"), "k")
    arguments = [array, np.uint32(40), argument]
    cuda.launch(function, (4, 2), (64,), arguments, cluster=(2, 1), shared=50_000)
    assert capfd.readouterr().out.splitlines() == [
        "map 7 3: 8/8/1 3/2/1 2/1/1 32 96 1 1",
        "attribute 8 = 50000",
        "launch 4,2,1 64,1,1 50000 1 77 4=2,1,1",
    ]
    assert array.ravel().tolist() == [40, *range(1, 48)]
    cuda.launch(function, (1,), (32, 2, 2), arguments)
    assert capfd.readouterr().out.splitlines()[1:] == ["launch 1,1,1 32,2,2 0 1 77"]
    assert cuda.version() == "13.1"


@needs_cuda_h
def test_launches_that_fail_say_why(cuda):
    module = cuda.load(b"\x7fELF\0x")
    arguments = [np.zeros(64, np.uint32), np.uint32(1), TensorMap(np.zeros((4, 8), np.float32), (2, 4), "f32")]
    with pytest.raises(ValueError, match=r"parameters have \[8, 4, 128\] bytes, the arguments \[8, 8, 128\]"):
        cuda.launch(cuda.function(module, "k"), (1,), (1,), [arguments[0], np.uint64(1), arguments[2]])
    with pytest.raises(driver.LaunchError, match=r"the kernel failed: FAILED \(in words\)"):
        cuda.launch(cuda.function(module, "failing"), (1,), (1,), arguments)
    with pytest.raises(driver.LaunchError, match=r"still running after 0\.01 s"):
        cuda.launch(cuda.function(module, "endless"), (1,), (1,), arguments, seconds=0.01)
    with pytest.raises(driver.DriverError, match=r"cuModuleLoadData: 200 \(in words\)"):
        cuda.load(b"no cubin")
    with pytest.raises(ValueError, match="an array of 4 bytes overlaps another of 256"):
        cuda.launch(cuda.function(module, "k"), (1,), (1,), [arguments[0], arguments[0][1:2], arguments[2]])
    with pytest.raises(ValueError, match="expected C-contiguous memory"):
        cuda.launch(cuda.function(module, "k"), (1,), (1,), [arguments[0][::2], *arguments[1:]])
    with pytest.raises(TypeError, match="got 3"):
        cuda.launch(cuda.function(module, "k"), (1,), (1,), [arguments[0], 3, arguments[2]])


# ---- the probes ------------------------------------------------------------------------------------------------------


def test_the_probes_can_be_dumped():
    """Names tell them apart, also as files; outputs are whole arrays in contiguous memory, and few megabytes."""
    probes = golden_probe.known()
    lists = [golden_probe.all_probes.PROBES, golden_probe.conv_probes.PROBES, triton_probes.PROBES]
    assert len(probes) == sum(map(len, lists))
    size = 0
    for name, probe in probes.items():
        assert name.replace("_", "").isalnum(), name
        arguments = probe.arguments(np.random.default_rng(0))
        buffers = driver.Buffers(torch.device("cpu"))
        for argument in arguments:
            array = argument.array if isinstance(argument, TensorMap) else argument
            assert not isinstance(array, np.ndarray) or buffers.address(array), name
            if isinstance(argument, TensorMap):
                dims, _, strides = driver.tiled(argument)
                expected = [s for s, size in zip(array.strides[-2::-1], array.shape[-2::-1]) if size > 1]
                assert [s for s, size in zip(strides, dims[1:]) if size > 1] == expected, name
                assert argument.kind in driver.DATA_TYPES and argument.swizzle in driver.SWIZZLES, name
        outputs = golden.outputs(name, probe.outputs, arguments)
        assert len(outputs) == len(probe.outputs), name
        size += sum(array.nbytes for array in outputs.values())
    assert size < 5e6


@pytest.mark.parametrize(
    "name", ["matmul_descriptors_tf32_b_nk", "conv3x3_descriptors_tile_bf16", "matmul_pointers_f16"]
)
def test_arguments_of_triton_fit_its_kernels(name):
    """Of what Triton 3.6 compiled: the parameters' bytes, the maps' types as Triton's own launcher has them."""
    metadata = json.loads((RECORDED / "metadata.json").read_text())[f"{name}-sm90"]
    kernel = parse((RECORDED / f"{name}-sm90.ptx").read_text())[metadata["name"]]
    probe = golden_probe.known()[name]
    parameters = triton_probes.launch_arguments(probe, metadata, probe.arguments(np.random.default_rng(0)))
    sizes = [128 if isinstance(p, TensorMap) else 8 if isinstance(p, np.ndarray) else p.nbytes for p in parameters]
    assert sizes == [size for _, size in kernel.parameters.values()]
    maps = [p for p in parameters if isinstance(p, TensorMap)]
    for tensor, meta in zip(maps, metadata["tensordesc_meta"], strict=True):
        host = {8: 10, 9: 8, 10: 9}.get(meta["elem_type"], meta["elem_type"])  # TMA_DTYPE_DEVICE_TO_HOST
        assert (driver.DATA_TYPES[tensor.kind], driver.SWIZZLES[tensor.swizzle]) == (host, meta["swizzle"])


def test_what_a_device_can_run():
    probes = golden_probe.known()
    hopper = {name for name in probes if golden_probe.cannot_run(probes[name], (9, 0)) is None}
    ampere = {name for name in probes if golden_probe.cannot_run(probes[name], (8, 0)) is None}
    blackwell = {name for name in probes if golden_probe.cannot_run(probes[name], (10, 0)) is None}
    late = {p.name for p in triton_probes.PROBES if not triton_probes.runs_with(p, golden_probe.triton.__version__)}
    assert hopper == set(probes) - late
    assert ampere < hopper and "tma_multicast" not in ampere | blackwell and "matmul_pointers_f16" in ampere & blackwell
    assert [golden_probe.target(c) for c in ((8, 6), (9, 0), (10, 0))] == ["sm_86", "sm_90a", "sm_100a"]


# ---- workers that end early ------------------------------------------------------------------------------------------


class Worker:
    """Instead of a process: finishes `done` probes, fails `failed` ones, and ends with a code, or hangs (None)."""

    def __init__(self, folder: Path, done: list[str], failed: list[str], code: int | None) -> None:
        for name in done:
            np.savez(folder / f"{name}.npz", **{golden.key(name, 0): np.ones(2)})
        for name in failed:
            golden_probe.fail(folder, name, "wrong")
        self.exitcode = code

    def is_alive(self) -> bool:
        return self.exitcode is None

    def join(self, timeout: float | None = None) -> None:
        pass

    def kill(self) -> None:
        self.exitcode = -9


def test_a_worker_that_ends_early_costs_the_others_nothing(tmp_path):
    plan = [
        (["a"], ["b"], golden_probe.LOST),  # b's kernel failed, and said so
        (["c"], [], -11),  # d ended the process
        (["e"], [], None),  # f hangs
        (["g"], [], 0),
    ]
    asked = []

    def start(names):
        asked.append("".join(names))
        return Worker(tmp_path, *plan[len(asked) - 1])

    golden_probe.run_all(start, list("abcdefg"), tmp_path, stall=0.01)
    assert asked == ["abcdefg", "cdefg", "efg", "g"]
    outputs, errors = zip(*(golden_probe.gather(name, tmp_path) for name in "abcdefg"))
    assert [name for name, found in zip("abcdefg", outputs) if found] == list("aceg")
    assert [errors[k] for k in (1, 3, 5)] == [
        "wrong",
        "the process ended with exit code -11",
        "no result after 0.01 s",
    ]


def test_workers_that_get_nowhere_are_not_started_for_ever(tmp_path):
    asked = []

    def start(names):
        asked.append(names)
        return Worker(tmp_path, [], [], 1)

    golden_probe.run_all(start, list("abcdefg"), tmp_path)
    assert len(asked) == golden_probe.BARREN
    assert {golden_probe.gather(name, tmp_path) for name in "abcdefg"} == {(None, "the process ended with exit code 1")}


# ---- dumps and verdicts ----------------------------------------------------------------------------------------------


def test_a_dump_comes_back(tmp_path):
    assert golden.load("sm_90", tmp_path / "no") is None
    arrays = {golden.key("p", 1): np.arange(6, dtype=np.uint16).reshape(2, 3), golden.key("q", 0): np.float32([1, 2])}
    path = golden.save("sm_90", arrays, {"device_name": "GPU"}, tmp_path / "no")
    assert [path] == list((tmp_path / "no").iterdir())
    back = golden.load("sm_90", tmp_path / "no")
    assert back.keys() == arrays.keys() == {"p/1", "q/0"}
    assert all(back[k].dtype == a.dtype and np.array_equal(back[k], a) for k, a in arrays.items())
    assert golden.load_meta("sm_90", tmp_path / "no") == {"device_name": "GPU"}


def test_verdicts():
    one = np.float32([1, np.nan, 0])
    other_nan = np.uint32([0x3F800000, 0x7FFFFFFF, 0]).view(np.float32)
    assert golden.compare(one, one.copy(), 0) == (True, "same bits")
    assert golden.compare(one, other_nan, 0) == (True, "equal")
    assert golden.compare(np.float32([0.0]), np.float32([-0.0]), 0)[0] is False
    assert golden.compare(np.float32([0.0]), np.float64([-0.0]), 0)[0] is True
    assert golden.compare(bf16(np.float32([1.5, 2])), np.float64([1.5, 2]), 0) == (True, "equal")
    assert golden.compare(np.uint32([1, 255]), np.uint32([1, 254]), 0) == (
        False,
        "1 of 2 elements differ, first [1]: 0xff, expected 0xfe",
    )
    assert golden.compare(np.float32([1, 1.001]), np.float64([1, 1]), 1e-3) == (True, "error 0.00071, limit 0.001")
    assert golden.compare(np.float32([1, np.nan]), np.float64([1, 1]), 1e-3)[0] is False
    assert golden.compare(np.zeros((2, 1)), np.zeros(2), 0) == (False, "shape (2, 1), expected (2,)")


def test_judging_a_probe():
    probe = golden_probe.known()["mma_m16n8k16_bf16"]
    (want,) = probe.expected(probe.arguments(np.random.default_rng(0)))
    right = golden_probe.judge(probe, {golden.key(probe.name, 3): want}, "")
    wrong = golden_probe.judge(probe, {golden.key(probe.name, 3): want + 1}, "")
    assert (right.verdict, right.words) == ("agrees", "same bits")
    assert wrong.verdict == "differs" and wrong.words.startswith("128 of 128 elements differ")
    assert golden_probe.judge(probe, None, "it hung") == golden_probe.Result(probe.name, "failed", "it hung")


# ---- command line ----------------------------------------------------------------------------------------------------


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "golden_probe.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_list_needs_no_gpu():
    done = run("--list", "--match", "multicast")
    assert (done.returncode, done.stdout.split()) == (0, ["tma_multicast", "tma.cu", "multicast_2d", "sm_90a"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_a_line():
    done = run()
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == "golden_probe.py: this machine has no GPU that PyTorch can use; --list lists the probes\n"


def test_triton_leaves_machine_code(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    cubin, metadata = golden_probe.triton_cubin(golden_probe.known()["transpose_f32"], 90)
    assert cubin.startswith(b"\x7fELF") and metadata["name"].encode() in cubin
    assert not list(tmp_path.iterdir())
