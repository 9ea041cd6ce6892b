"""``tune(model, example)``: measure what runs each convolution of a model fastest here, and keep it in a table."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from refinenet_fast import backends
from refinenet_fast.backends import table
from refinenet_fast.backends.table import Question

WARM_UP, ROUNDS, IN_A_ROW = 2, 7, 10


def tune(
    model: nn.Module,
    example: Any,  # images (N, 3, H, W), or whatever the model takes as its one argument
    *,
    progress: Callable[[str], None] | None = None,
) -> Path | None:
    """Measure the candidates for every convolution that ``model`` runs on ``example``, and write a user table.

    In training mode backward is run too (of the sum of the results; gradients stay as they were). Candidates are timed
    in turn, each by the median of 7 rounds; the fastest enters the table (:mod:`refinenet_fast.backends.table`), which
    every later process on this machine reads. Run it alone on the machine. A backend that ``auto`` does not pick is
    tuned where it is forced: ``with refinenet_fast.use_backend("triton"): tune(model, images)``.

    Args:
        progress: Called with one line for each convolution that was measured.

    Returns:
        The table's file; None where nothing that is in a table ran, as on the reference backend.

    Raises:
        TypeError: ``example`` holds no tensor.
        OSError: The table cannot be written.
    """
    tensors = _tensors(example)
    if not tensors:
        raise TypeError(f"example: expected a tensor, or a dict, list or tuple of some, got {type(example).__name__}")
    device = tensors[0].device
    rows: dict[str, list[dict[str, Any]]] = {}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for question in dict.fromkeys(_questions(model, example)):
            row = measure(question, device)
            if row is None:
                continue
            rows.setdefault(question.family, []).append(row)
            if progress is not None:
                progress(_line(question, row))
    path = None
    for family, found in rows.items():
        path = table.write(family, found, _made(device))
    return path


def _line(question: Question, row: dict[str, Any]) -> str:
    fastest = sorted(row["ms"].items(), key=lambda item: item[1])[:3]
    times = ", ".join(f"{name} {ms:.3g} ms" for name, ms in fastest)
    return f"{question.kernel} {question.dtype} {list(question.shape)}: {times}"


def _questions(model: nn.Module, example: Any) -> list[Question]:
    with table.recorded() as questions:
        if not model.training:
            with torch.no_grad():
                model(example)
            return questions
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}  # batch norm's statistics
        try:
            with torch.enable_grad():
                results = [t for t in _tensors(model(example)) if t.requires_grad]
                parameters = [p for p in model.parameters() if p.requires_grad]
                if parameters and results:
                    torch.autograd.grad([r.float().sum() for r in results], parameters, allow_unused=True)
        finally:
            for name, buffer in model.named_buffers():
                buffer.data.copy_(buffers[name])
    return questions


def _tensors(value: Any) -> list[Tensor]:
    """All in a nest of dicts, lists and tuples."""
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
    return [tensor for member in values for tensor in _tensors(member)]


def measure(question: Question, device: torch.device) -> dict[str, Any] | None:
    """A table's row for one question, medians in ``ms``; None where there is nothing to choose from."""
    name, kernel = question.kernel.split(" ", 1)
    trials = [t for t in backends.get(name).trials(kernel, question.dtype, question.shape, device) if _works(t[1])]
    if len(trials) < 2:
        return None
    times: list[list[float]] = [[] for _ in trials]
    for round in range(WARM_UP + ROUNDS):
        for k, (_, run) in enumerate(trials):
            ms = _time(run, device)
            if round >= WARM_UP:
                times[k].append(ms)
    medians = [sorted(t)[len(t) // 2] for t in times]
    best = min(range(len(trials)), key=medians.__getitem__)
    named = {str(choice): ms for (choice, _), ms in zip(trials, medians, strict=True)}
    return {
        "kernel": question.kernel,
        "dtype": question.dtype,
        "shape": list(question.shape),
        "choice": trials[best][0],
        "ms": named,
    }


def _works(run: Callable[[], object]) -> bool:
    """Whether a candidate runs at all: a compiler may find that it needs too much."""
    try:
        run()
    except Exception as error:  # whatever a compiler raises
        warnings.warn(f"a candidate is left out: {error}", stacklevel=4)
        return False
    return True


def _time(run: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call; on a GPU of several in a row, so that launching them is not what is measured."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    torch.cuda._sleep(1_000_000)  # the first ones are enqueued while the GPU waits
    begin.record()
    for _ in range(IN_A_ROW):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / IN_A_ROW


def _made(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    threads = torch.get_num_threads() if device.type == "cpu" else None
    return {"device": name, "threads": threads, "torch": torch.__version__, "by": "refinenet_fast.tune"}
