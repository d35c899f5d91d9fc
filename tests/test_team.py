"""Steps of a plan by threads that wait for each other between them: the numbers of one, however many there are."""

import subprocess
import sys
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


WITHOUT_MEMORY = """
import resource, torch
from kernelpress.ops.calls.steps import Before, native_steps
torch.set_num_threads(3)
x = torch.randn(1, 32, 4, 200).contiguous(memory_format=torch.channels_last)
few, many = torch.randn(32, 1, 3, 3), torch.randn(64, 1, 3, 3)
# A ring of 4001 rows, 205 MB, which no step before asks for.
run = native_steps([
    ("depthwise_conv2d", (x, few), {"padding": (1, 1)}),
    ("depthwise_conv2d", (Before(0), many), {"padding": (2000, 1), "dilation": (2000, 1)}),
])
used = 4096 * int(open("/proc/self/statm").read().split()[0])
limits = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + (100 << 20), limits[1]))
try:
    run()
except MemoryError:
    resource.setrlimit(resource.RLIMIT_AS, limits)
    first = run().clone()
    torch.set_num_threads(1)
    print(torch.equal(first, run()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_want_of_memory_on_any_thread_is_an_error_and_the_plan_runs_again():
    done = subprocess.run([sys.executable, "-c", WITHOUT_MEMORY], capture_output=True, text=True, timeout=120)
    assert done.stdout == "True\n", done.stderr
