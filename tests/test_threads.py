"""Threads, forks and several models in one process, each in a process of its own that may not hang."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
import torch

import dsopt
from dsopt.kernels.cpu.multi_linear import native as linear
from dsopt.models.decoder import Decoder, make_decoder

TIMEOUT = 300
KEYS = 40


def model(preset: str = "v3", **changes) -> Decoder:
    """Most ops are worth two threads. The logits are few enough that torch compares them on one, also after a fork."""
    return make_decoder(
        preset, tiny=True, dtype=torch.float32, layers=2, hidden_size=512, vocab_size=3001, **changes
    )


@torch.inference_mode()
def decode(call: Callable, of: Decoder, seed: int) -> torch.Tensor:
    """Logits of a prompt of four tokens and one more."""
    ids = torch.randint(3, 3000, (2, 5), generator=torch.Generator().manual_seed(seed))
    cache = of.new_cache(2, KEYS)
    prompt = call(ids[:, :4], torch.arange(4), cache)
    return torch.cat((prompt, call(ids[:, 4:], torch.tensor([4]), cache)), 1)


def in_threads(*jobs: Callable[[], None]) -> None:
    """Runs them at once, and raises what one of them raised."""
    errors = []

    def run(job):
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        raise error


def in_child(job: Callable[[], None]) -> None:
    """Runs it in a fork of this process. A child that hangs is ended by a signal."""
    import signal

    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.alarm(TIMEOUT // 4)
            job()
            status = 0
        finally:
            os._exit(status)
    status = os.waitpid(pid, 0)[1]
    assert status == 0, f"the child ended with status {status}"


def a_large_product() -> tuple[Callable[[], torch.Tensor], torch.Tensor]:
    """A kernel's call that is worth many threads, and its result."""
    x, w = torch.randn(4, 512), torch.randn(4096, 512)
    return lambda: linear(x, [w], [None])[0], linear(x, [w], [None])[0]


def os_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def kernels_after_a_fork():
    """By the thread that forked, by a thread that the child starts, in a child of the child, and here again."""
    run, want = a_large_product()
    assert os_threads() >= 2

    def check():
        for _ in range(3):
            assert torch.equal(run(), want)

    def child():
        check()
        assert os_threads() == 1
        in_threads(check, check)
        in_child(check)

    in_child(child)
    check()


def kernels_in_new_threads():
    """A thread of Python's takes as many threads as torch was told to, not one for each core."""
    torch.set_num_threads(1)
    run, want = a_large_product()
    before = os_threads()
    seen = []

    def check():
        assert torch.equal(run(), want)
        seen.append(os_threads())

    in_threads(check)
    assert seen == [before + 1]


def one_team():
    """Torch and kernels in turns: their work is done by the threads that were there after the first call of each."""
    run, want = a_large_product()
    square = torch.randn(400, 400)
    square @ square
    before = os_threads()
    for _ in range(200):
        square @ square
        assert torch.equal(run(), want)
    assert os_threads() == before


def two_models():
    models = model("v2-lite"), model("v3")
    fast = [dsopt.compile(m) for m in models]
    first = [decode(f, m, 0) for f, m in zip(fast, models)]
    for m, got in zip(models, first):
        torch.testing.assert_close(got, decode(m, m, 0), rtol=1e-4, atol=1e-5)
    for seed in (1, 0, 0):
        again = [decode(f, m, seed) for f, m in zip(fast, models)]
    assert all(map(torch.equal, again, first))


def two_threads_and_one_model():
    """Their first calls, which compile, at once, and then calls on different inputs."""
    m = model()
    fast = dsopt.compile(m)
    got = {0: [], 1: []}
    in_threads(*(lambda i=i: got[i].extend(decode(fast, m, i) for _ in range(30)) for i in got))
    for seed, results in got.items():
        torch.testing.assert_close(results[0], decode(m, m, seed), rtol=1e-4, atol=1e-5)
        want = decode(fast, m, seed)
        assert len(results) == 30 and all(torch.equal(x, want) for x in results)
    assert not dsopt.report(fast).fallbacks


def another_number_of_threads():
    """Dynamo compiles anew for a number it has not seen, which gives the same bits."""
    m = model()
    fast = dsopt.compile(m)
    want = decode(fast, m, 0)
    for count in (1, 2, 3, 1, 2):
        torch.set_num_threads(count)
        assert torch.equal(decode(fast, m, 0), want)
    assert not dsopt.report(fast).fallbacks


def a_model_after_a_fork():
    m = model()
    fast = dsopt.compile(m)
    want = decode(fast, m, 0)
    assert os_threads() >= 2

    def check():
        assert torch.equal(decode(fast, m, 0), want)

    in_child(check)
    check()


KERNELS = (kernels_after_a_fork, kernels_in_new_threads, one_team)
MODELS = (two_models, two_threads_and_one_model, another_number_of_threads, a_model_after_a_fork)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc and fork")
@pytest.mark.parametrize(
    "scenario",
    [*KERNELS, *(pytest.param(s, marks=pytest.mark.slow) for s in MODELS)],
    ids=lambda s: s.__name__,
)
def test_threads(scenario):
    command = [sys.executable, __file__, scenario.__name__]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    globals()[sys.argv[1]]()
