"""Steps of a plan by threads that wait for each other between them: the numbers of one, however many there are."""

import threading

import pytest
import torch

from kernelpress.ops.calls.steps import Before, native_steps
from kernelpress.runtime import native
from kernelpress.runtime.clock import threads_set_to

pytestmark = pytest.mark.skipif(native.cpu() is None, reason="no native kernels: build them with `make build`")


def steps(count, x, weights):
    """Depthwise layers, each of which reads rows that other threads wrote; no division changes the order of a sum."""
    return native_steps(
        [
            ("depthwise_conv2d", (Before(0) if i else x, weights[i % len(weights)] / 9), {"padding": (1, 1)})
            for i in range(count)
        ]
    )


@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize("size", [(2, 3), (5, 9)])
def test_threads_compute_what_one_does(threads, size):
    x = torch.randn(1, 20, *size).contiguous(memory_format=torch.channels_last)
    run = steps(30, x, torch.randn(3, 20, 1, 3, 3).unbind())
    with threads_set_to(1):
        expected = run().clone()
    with threads_set_to(threads):
        for _ in range(20):
            assert torch.equal(run(), expected)


def test_threads_of_python_lead_teams_of_their_own():
    x, weights = torch.randn(4, 1, 16, 9, 9), torch.randn(2, 16, 1, 3, 3).unbind()
    runs = [steps(40, image.contiguous(memory_format=torch.channels_last), weights) for image in x]
    expected = [run().clone() for run in runs]
    wrong = []

    def work(i):
        wrong.extend(i for _ in range(30) if not torch.equal(runs[i](), expected[i]))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(runs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
