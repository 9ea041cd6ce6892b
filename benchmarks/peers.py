"""Libraries that infer on a CPU, each as one more contender: ONNX Runtime and OpenVINO (`--peers`).

A peer runs the eager function of the case, exported to ONNX: shapes static, weights constants in the file,
batch norm folded by the exporter. Its inputs lie in the layout it takes before the clock starts, as PyTorch's lie in
channels_last, and its result is left in memory that it writes at every call.
"""

import functools
import importlib.util
import tempfile
import warnings
from pathlib import Path

import torch

from contenders import Block, Built, Contender
from timing import interleave

PACKAGES = {  # what each imports
    "onnxruntime": ("onnxruntime", "onnx", "onnxscript"),
    "openvino": ("openvino", "onnx", "onnxscript"),
}
# Loose: a wrong export is off by far more, and no one is to be kept out for his order of summation.
ALLOWED = {torch.float32: 1e-3, torch.bfloat16: 1e-1}
LAYOUTS = ("NCHW", "NHWC")


def choose(names, device, dtype, warn):
    """The peers asked for, less those that cannot run, whose reason is handed to `warn`.

    Raises:
        ValueError: One is not installed.
    """
    chosen = []
    for name in names:
        missing = [package for package in PACKAGES[name] if importlib.util.find_spec(package) is None]
        if missing:
            needs = ", ".join(missing)
            raise ValueError(f"--peers {name} needs {needs}: python -m pip install 'refinenet_fast[bench]'")
        reason = cannot_run(name, device, dtype)
        if reason:
            warn(f"without {name}: {reason}")
        else:
            chosen.append(Contender(name, BUILD[name], allowed=ALLOWED, own_threads=True))
    return chosen


def cannot_run(name, device, dtype):
    """Why a peer that is installed cannot run here, or None."""
    if device.type != "cpu":
        return "peers are compared on a CPU only"
    if dtype == torch.float32:
        return None
    kind = str(dtype).removeprefix("torch.")
    if name == "onnxruntime":
        return f"ONNX Runtime has no convolution in {kind} on a CPU"
    if dtype == torch.float16:
        return "OpenVINO is compared in float32 and bfloat16 only"
    import openvino

    native = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return None if native else "OpenVINO has no bfloat16 arithmetic on this processor"


# ---- the model ------------------------------------------------------------------------------


class Exported:
    """A case as an ONNX file in float32, and its inputs: xs, each (N, C, H, W) and channels_last."""

    def __init__(self, case, inputs):
        self.folder = tempfile.TemporaryDirectory()  # deleted with this object
        self.path = str(Path(self.folder.name, "model.onnx"))
        self.xs = [x.detach().float() for x in inputs.xs]
        self.shape = tuple(inputs.gy.shape)
        block = Block(case.eager, [w.detach().float() for w in inputs.ws]).eval()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter's own parts that are deprecated
            block(*self.xs)  # what a case builds at its first call cannot be traced
            program = torch.onnx.export(block, tuple(self.xs), dynamo=True, verbose=False)
        program.save(self.path, external_data=True)  # one file cannot be larger than 2 GB


@functools.lru_cache(maxsize=1)
def exported(case, inputs):
    """Exported, made once for the peers that follow one another."""
    return Exported(case, inputs)


def _forward_only(build):
    """A Contender's build out of build(exported, timed, dtype)."""

    @functools.wraps(build)
    def built(case, inputs, forward, timed):
        if not forward:
            raise NotImplementedError("peers compute no gradients")
        return build(exported(case, inputs), timed, inputs.gy.dtype)

    return built


# ---- ONNX Runtime ---------------------------------------------------------------------------


class Session:
    """ONNX Runtime's, with inputs and result bound to memory, so that a call copies nothing.

    It takes NCHW only; its optimiser puts its own blocked layout (NCHWc) between the convolutions.
    """

    def __init__(self, model):
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.intra_op_num_threads = torch.get_num_threads()
        # Threads spin inside a call, as by default, but no longer after it. By default they spin on for as
        # long as a whole call of the next contender, which then takes twice as long (timing.interleave has more);
        # its own calls take as long with this as without.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self.session = ort.InferenceSession(model.path, options, providers=["CPUExecutionProvider"])
        self.binding = self.session.io_binding()
        self.xs = [ort.OrtValue.ortvalue_from_numpy(x.contiguous().numpy()) for x in model.xs]
        for node, x in zip(self.session.get_inputs(), self.xs):
            self.binding.bind_ortvalue_input(node.name, x)
        self.y = torch.empty(model.shape)
        (node,) = self.session.get_outputs()
        self.binding.bind_output(node.name, "cpu", 0, self.y.numpy().dtype, list(model.shape), self.y.data_ptr())

    def __call__(self, xs, ws):
        self.session.run_with_iobinding(self.binding)
        return self.y


@_forward_only
def _onnxruntime(model, timed, dtype):
    return Built(Session(model), keeps_memory=True)


# ---- OpenVINO -------------------------------------------------------------------------------


class Request:
    """OpenVINO's, whose inputs and result lie in `layout`.

    Raises:
        RuntimeError: It takes other threads or another precision than it is asked to.
    """

    def __init__(self, model, dtype, layout):
        import openvino as ov

        core = ov.Core()
        network = core.read_model(model.path)
        if layout == "NHWC":
            network = _nhwc(network, len(model.xs))
        compiled = core.compile_model(network, "CPU", _properties(dtype))
        _check(compiled, dtype)
        self.request, self.layout = compiled.create_infer_request(), layout
        xs = [x.permute(0, 2, 3, 1) if layout == "NHWC" else x for x in model.xs]
        self.xs = [x.contiguous().numpy() for x in xs]  # a shared ov.Tensor does not keep them alive
        for i, x in enumerate(self.xs):
            self.request.set_input_tensor(i, ov.Tensor(x, shared_memory=True))

    def __call__(self, xs, ws):
        self.request.infer(share_outputs=True)
        y = torch.from_numpy(self.request.get_output_tensor(0).data)
        return y.permute(0, 3, 1, 2) if self.layout == "NHWC" else y


def _nhwc(network, inputs):
    """The network with all that goes in and comes out in NHWC."""
    from openvino import Layout
    from openvino.preprocess import PrePostProcessor

    steps = PrePostProcessor(network)
    for end in (*(steps.input(i) for i in range(inputs)), steps.output(0)):
        end.tensor().set_layout(Layout("NHWC"))
        end.model().set_layout(Layout("NCHW"))
    return steps.build()


def _properties(dtype):
    return {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "ENABLE_HYPER_THREADING": True,  # else it may take one thread of each core and no more
        "ENABLE_CPU_PINNING": False,  # no slower than with it, and leaves this process's threads alone
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32",
    }


def _check(compiled, dtype):
    """A hint is no order: OpenVINO takes other values without a word."""
    threads = compiled.get_property("INFERENCE_NUM_THREADS")
    precision = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    if threads != torch.get_num_threads():
        raise RuntimeError(f"asked for {torch.get_num_threads()} threads, OpenVINO takes {threads}")
    if precision != ("bf16" if dtype == torch.bfloat16 else "f32"):
        raise RuntimeError(f"asked for {dtype}, OpenVINO computes in {precision}")


@_forward_only
def _openvino(model, timed, dtype):
    """The faster of the two layouts."""
    built = [Built(Request(model, dtype, layout), f"layout={layout}", keeps_memory=True) for layout in LAYOUTS]
    runs = [timed(b.function) for b in built]
    for run in runs:
        run()
    times = interleave(runs, model.xs[0].device, seconds=0.2, at_least=3, apart=True)
    return min(zip(built, times), key=lambda pair: pair[1].median_ms)[0]


BUILD = {"onnxruntime": _onnxruntime, "openvino": _openvino}
