"""Python threads beside each other, the number of threads a kernel may use, and whose they are."""

from __future__ import annotations

import threading

import pytest
import torch

from common import PLACES, Place, assert_same_bits, run_python
from refinenet_fast.testing import Call, crp_call, fuse_call, rcu_call

ON_THE_CPU = [p for p in PLACES if p.device == "cpu" and p.name in ("float32", "bfloat16")]


def outcomes(call: Call, backend: str) -> list[torch.Tensor]:
    """The results of inference and of training, what is saved and all gradients."""
    y, saved = call.train(backend)
    return [call.infer(backend), y, *saved, *call.gradients(torch.ones_like(y), saved, backend)]


def some(place: Place, seed: int) -> list[Call]:
    data = place.data(seed=seed)
    shape = (1, 24 + 16 * seed, 20 + 9 * seed, 31)
    return [
        crp_call(shape, data),
        fuse_call([shape, (1, 9, 10, 7 + seed)], data, [3, 1], 20),
        fuse_call([(1, 40, 16, 9), (1, 40, 33, 21)], data, [None, None], 40),
        rcu_call(shape, data),
    ]


@pytest.mark.parametrize("place", ON_THE_CPU, ids=str)
def test_python_threads_do_not_disturb_each_other(place):
    jobs = [some(place, seed) for seed in range(3)]
    want = [[outcomes(call, place.backend) for call in calls] for calls in jobs]
    failures, start = [], threading.Barrier(len(jobs))

    def work(calls: list[Call], expected: list[list[torch.Tensor]]) -> None:
        try:
            start.wait()
            for _ in range(4):
                for call, wanted in zip(calls, expected, strict=True):
                    assert_same_bits(outcomes(call, place.backend), wanted)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(jobs, want, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def kernels_alone(place: Place) -> list[torch.Tensor]:
    """The pool and the resizing, forward and backward."""
    x, gy = place.data()(1, 40, 29, 31), place.data()(1, 40, 29, 31, salt=1)
    value, argmax = place.kernels.maxpool5(x, relu=True, argmax=True)
    gx = place.kernels.maxpool5_backward(gy, argmax, x)
    y = place.kernels.bilinear(x, (47, 90), True, None)
    return [value, argmax, gx, y, place.kernels.bilinear_backward(y, (29, 31), True)]


def hot_paths(place: Place) -> list[torch.Tensor]:
    return [t for call in some(place, 1) for t in outcomes(call, place.backend)]


@pytest.mark.parametrize("function", ["kernels_alone", "hot_paths", "few_channels"])
@pytest.mark.parametrize("place", ON_THE_CPU, ids=str)
def test_the_same_bits_on_one_thread_and_on_several(place, function):
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            results.append(globals()[function](place))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_same_bits(other, results[0])


def few_channels(place: Place) -> list[torch.Tensor]:
    """Where oneDNN by itself splits sums between threads: few channels, several images."""
    data = place.data()
    calls = [crp_call((n, c, 33, 41), data) for n in (1, 3) for c in (1, 3, 4, 8, 9, 16, 32)]
    calls += [fuse_call([(2, c, 40, 33), (2, 20, 11, 9)], data, [3, 3], k) for c, k in ((3, 64), (17, 8))]
    calls += [rcu_call((2, 1, 200, 199), data, biases="12")]  # one sum of many pixels
    return [t for call in calls for t in outcomes(call, place.backend)]


ONE_THREAD = """
import time, torch
from refinenet_fast.backends import get

torch.set_num_threads(1)
kernels, x = get("cpu"), torch.randn(1, 64, 96, 96).contiguous(memory_format=torch.channels_last)
weight = torch.randn(64, 64, 3, 3)
assert kernels.is_winograd(x, weight)

def work():
    kernels.conv3x3(x, weight, pack=True)
    kernels.conv3x3_input_grad(x, weight)
    value, argmax = kernels.maxpool5(x, argmax=True)
    kernels.maxpool5_backward(value, argmax)
    kernels.bilinear_backward(kernels.bilinear(x, (96, 192), True), (96, 96), True)

work()
wall, cpu = time.perf_counter(), time.process_time()
while time.perf_counter() - wall < 1:
    work()
print((time.process_time() - cpu) / (time.perf_counter() - wall))
"""


@pytest.mark.skipif("cpu" not in {p.backend for p in PLACES}, reason="needs the compiled core")
def test_one_thread_means_one_threads_worth_of_cpu_time():
    done = run_python(ONE_THREAD)
    assert float(done.stdout) <= 1.1, done.stderr


LIBRARIES = """
import re, torch, refinenet_fast
from refinenet_fast.backends import get

torch.set_num_threads(2)
x = torch.randn(1, 64, 32, 32)
torch.nn.functional.conv2d(x, torch.randn(64, 64, 3, 3))
get("cpu").maxpool5(x)
paths = {line.split()[-1] for line in open("/proc/self/maps") if "/" in line}
print(*(p for p in paths if re.search(r"/lib(g|i)?omp\\d*[-.][^/]*$", p)), sep="\\n")
"""


@pytest.mark.skipif("cpu" not in {p.backend for p in PLACES}, reason="needs the compiled core")
def test_there_is_one_openmp_runtime():
    """A second pool of threads would spin against PyTorch's on the same cores."""
    done = run_python(LIBRARIES)
    assert len(done.stdout.split()) == 1, done.stdout + done.stderr
