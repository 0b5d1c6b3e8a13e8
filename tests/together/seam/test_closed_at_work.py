"""`close()` while another thread is in a forward pass with the cache: that thread is told so, whatever it was at."""

from __future__ import annotations

import sys
import threading

import pytest
import torch

from ollm import disk_cache
from ollm.errors import CacheClosedError
from ollm.testing.case import depth
from together.comparison import STRATEGIES, stock_cache, tokens

pytestmark = pytest.mark.timeout(120)


class Closing:
    """In the thread that it traces, closes a cache from another thread when ollm's functions were called `at` times."""

    def __init__(self, cache, at):
        self.cache, self.left, self.where, self.failed = cache, at, None, []

    def __call__(self, frame, event, argument):
        if event == "call" and "/ollm/" in frame.f_code.co_filename and self.where is None:
            self.left -= 1
            if self.left < 0:
                self.where = f"{frame.f_code.co_filename.rpartition('/ollm/')[2]}: {frame.f_code.co_qualname}"
                self.closing = threading.Thread(target=self.close)
                self.closing.start()
                self.closing.join(0.2)  # it may have to wait for the step that is under way
        return None

    def close(self):
        try:
            self.cache.close()
        except BaseException as error:
            self.failed.append(error)


@pytest.mark.parametrize("strategy", ["chunked, nothing resident", "chunked, tensor mode", "paged", "resident"])
def test_wherever_a_step_is_when_the_cache_is_closed_it_is_told_so(model, tmp_path, strategy):
    """At every call of a function of ollm's, or some of them, evenly."""
    prompt, more = tokens(1, 40), tokens(1, 1, seed=1)
    truth = stock_cache(model)
    model(prompt, past_key_values=truth)
    expected = model(more, past_key_values=truth).logits
    at, refused = 0, 0
    while True:
        cache = disk_cache(model, cache_dir=tmp_path, spill_policy="tiny", **STRATEGIES[strategy])
        model(prompt, past_key_values=cache)
        closing, results = Closing(cache, at), []

        @torch.inference_mode()
        def step(cache=cache, closing=closing, results=results):
            sys.settrace(closing)
            try:
                results.append(model(more, past_key_values=cache).logits)
            except BaseException as error:
                results.append(error)
            finally:
                sys.settrace(None)

        thread = threading.Thread(target=step)
        thread.start()
        thread.join(60)
        if closing.where is None:  # there are no more places
            cache.close()
            break
        closing.closing.join(60)
        assert not closing.failed, f"closing itself failed at {closing.where}: {closing.failed[0]!r}"
        (result,) = results
        if isinstance(result, BaseException):
            assert isinstance(result, CacheClosedError), f"{closing.where}: {result!r}"
            refused += 1
        else:
            assert torch.allclose(result, expected, atol=1e-5), closing.where
        at += max(2400 // depth(100), 1)
    assert refused > 3
    assert list(tmp_path.iterdir()) == []
