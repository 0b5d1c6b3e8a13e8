"""Profiles of Hypothesis: `make test` is quick, `make nightly` looks longer. Tests marked `gpu` need one."""

import os

import pytest
from hypothesis import settings

if "PYTEST_XDIST_WORKER" in os.environ:  # there is a process for every processor
    os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("quick", max_examples=80, stateful_step_count=15, deadline=None)
settings.register_profile("nightly", max_examples=2000, stateful_step_count=40, deadline=None)
settings.load_profile("quick")


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))
