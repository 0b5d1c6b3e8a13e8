"""Profiles of Hypothesis: `make test` is quick, `make nightly` looks longer. Tests marked `gpu` need one."""

import contextlib
import os
import threading

# before torch is imported, here and in children: tiny tensors gain nothing from threads, and several processes whose
# threads wait for each other cost much
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import Phase, settings

settings.register_profile("quick", max_examples=50, stateful_step_count=15, deadline=None)
settings.register_profile("nightly", max_examples=2000, stateful_step_count=40, deadline=None)
# for planted bugs, which must be found; how small the case can be made nobody asks
settings.register_profile(
    "unshrunk", settings.get_profile("quick"), max_examples=80, phases=[Phase.explicit, Phase.generate]
)
settings.load_profile("quick")


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


@pytest.fixture
def workers(monkeypatch):
    """`workers()`: the threads that were started for disks since the test began; what other tests left in this process
    is not counted, nor used."""
    from ollm.io import scheduler

    monkeypatch.setattr(scheduler, "_schedulers", {})
    before = set(threading.enumerate())
    return lambda: [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("ollm-io")]


@pytest.fixture
def no_new_threads(monkeypatch):
    """`with no_new_threads():` the system starts no thread."""

    @contextlib.contextmanager
    def refusing():
        def start(self):
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            yield

    return refusing


@pytest.fixture
def claims():
    """`claims()`: what was claimed of memory since the test began; what other tests left in this process, and the
    garbage collector gives back at any time, is not counted."""
    from ollm.io.ledger import ledger

    before = list(ledger._claims)
    return lambda: [claim for claim in ledger._claims if claim not in before]
