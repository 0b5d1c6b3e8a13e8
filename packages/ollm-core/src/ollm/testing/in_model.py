"""The store in a real model, tiny and random, in fp32: tokens and logits are those of transformers' own caches.

transformers is imported where a model is made: whoever runs other tests of the kit need not wait for it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import attrs
import pytest
import torch
from torch import Tensor

from ollm.contracts.spill import KVGeometry, MemorySnapshot, SpillPlan, SpillPolicy
from ollm.contracts.strategy import KVFacts, Strategy
from ollm.kv.state import CacheState
from ollm.registry import Kind, Offer, PluginReport, Status, catalog, registry
from ollm.testing.case import DIRECTORY, StoreCase, assert_nothing_left, files_of

NAME = "under-test"
_SHAPE: dict[str, Any] = {
    "vocab_size": 199, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
    "initializer_range": 0.25, "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip
_ROUNDING = 1e-4
_LOSS = 20
"""How many times a lossy store's tolerance the logits of the tiny model may be off: its layers add up what is lost."""


class _FlushOften(SpillPolicy):
    """Seven tokens fill a tail, so that short texts use the store."""

    def plan(self, geometry: KVGeometry, memory: MemorySnapshot, budget: int | None) -> SpillPlan:
        return SpillPlan(flush_tokens=7, flush_bytes=2**40, hot_tokens=2, resident_bytes=budget or 0)


class ModelTests(StoreCase):
    """Generation as users run it, through `disk_cache`."""

    @pytest.mark.parametrize("mode", ["block", "tensor"])
    @pytest.mark.parametrize("rows", [1, 3])
    def test_greedy_generation(self, mode: str, rows: int, tmp_path: Path) -> None:
        ids = _tokens(rows, 40)
        with self.offered(), torch.inference_mode():
            if mode == "tensor" and self.window_tokens:
                pytest.skip("windows need block mode")
            with self._cache(tmp_path, mode=mode) as cache:
                self._compare(_generate(_model(), ids, cache), _generate(self._truth(), ids, _stock(self._truth())))
                self._was_used(cache.state(), tmp_path)

    def test_prompts_in_pieces(self, tmp_path: Path) -> None:
        """A prompt that layers take in pieces, a second one behind it, then single tokens."""
        ids = _tokens(2, 70)
        with self.offered(), torch.inference_mode(), self._cache(tmp_path, dense_projection_chunk_rows=11) as cache:
            stock = _stock(self._truth())
            for part in torch.split(ids, [33, 20, 1, 16], dim=1):
                ours = _model()(part, past_key_values=cache).logits
                self._close(ours, self._truth()(part, past_key_values=stock).logits)

    def test_beams(self, tmp_path: Path) -> None:
        """Rows change places at every step."""
        if self.tolerance:
            pytest.skip("beams of a lossy store may part ways")
        ids, settings = _tokens(1, 20), {"num_beams": 3, "output_scores": True}
        with self.offered(), torch.inference_mode(), self._cache(tmp_path) as cache:
            ours = _generate(_model(), ids, cache, **settings)
            stock = _generate(self._truth(), ids, _stock(self._truth()), **settings)
            assert torch.equal(ours.sequences, stock.sequences)

    def test_left_padding(self, tmp_path: Path) -> None:
        ids = _tokens(2, 30)
        mask = torch.ones_like(ids)
        mask[0, :11] = 0
        with self.offered(), torch.inference_mode(), self._cache(tmp_path) as cache:
            settings = {"attention_mask": mask}
            stock = _generate(self._truth(), ids, _stock(self._truth()), **settings)
            self._compare(_generate(_model(), ids, cache, **settings), stock)

    def test_crop_and_go_on(self, tmp_path: Path) -> None:
        """What was cropped is gone, and what stays is right."""
        if self.window_tokens:
            pytest.skip("a window cannot be cropped once tokens have left it")
        ids = _tokens(1, 50)
        with self.offered(), torch.inference_mode(), self._cache(tmp_path) as cache:
            _generate(_model(), ids, cache)
            cache.crop(23 - cache.get_seq_length())
            stock = _generate(self._truth(), ids, _stock(self._truth()))
            self._compare(_generate(_model(), ids, cache), stock)

    def test_forks(self, tmp_path: Path) -> None:
        """Continuations of one text, each as if it were alone."""
        ids, branches = _tokens(1, 40), _tokens(3, 6, seed=5)
        with self.offered(), torch.inference_mode(), self._cache(tmp_path) as cache:
            _model()(ids, past_key_values=cache)
            with cache.fork(3) as fork:
                ours = _model()(branches, past_key_values=fork).logits
            for row in range(3):
                stock = _stock(self._truth())
                self._truth()(ids, past_key_values=stock)
                self._close(ours[row : row + 1], self._truth()(branches[row : row + 1], past_key_values=stock).logits)

    def test_nothing_is_left(self, tmp_path: Path) -> None:
        """Neither of a cache that was closed, nor of one that was reset."""
        ids = _tokens(1, 40)
        with self.offered(), torch.inference_mode():
            with self._cache(tmp_path) as cache:
                _generate(_model(), ids, cache)
                cache.reset()
                stock = _generate(self._truth(), ids, _stock(self._truth()))
                self._compare(_generate(_model(), ids, cache), stock)
            assert_nothing_left(tmp_path, "after the cache was closed")

    @contextmanager
    def offered(self) -> Iterator[None]:
        """The store as the strategy `under-test`, and a policy that flushes often, as if a plugin offered them."""

        def build(context: Any) -> Any:
            return self.open(attrs.evolve(context, options=self.options) if self.options is not None else context)

        facts = KVFacts(
            lossless=not self.tolerance, full_history=self.window_tokens is None, directory=DIRECTORY, spill_policy=NAME
        )
        store: Any = Strategy(name=NAME, summary="Under test.", build=build, facts=facts)
        policy: Any = Strategy(name=NAME, summary="Flushes often.", build=lambda _: _FlushOften())
        offers = tuple(
            Offer(kind=kind, strategy=strategy, distribution=NAME)
            for kind, strategy in ((Kind.KV_STORE, store), (Kind.SPILL_POLICY, policy))
        )
        report = PluginReport(
            name=NAME, module=NAME, distribution=NAME, version="0", status=Status.LOADED, offers=offers
        )
        reports = (*registry().reports, report)
        registry.cache_clear()
        try:
            with mock.patch.object(catalog, "discover", lambda: reports):
                yield
        finally:
            registry.cache_clear()

    def _cache(self, folder: Path, **more: Any) -> Any:
        from ollm import disk_cache

        arguments = {"cache_dir": folder, "cache_strategy": NAME, "cache_window_tokens": self.window_tokens, **more}
        return disk_cache(_model(), **arguments)

    def _truth(self) -> Any:
        """The same weights in stock transformers, with a sliding window where the store has a window."""
        return _model() if self.window_tokens is None else _sliding_twin(self.window_tokens)

    def _compare(self, ours: Any, stock: Any) -> None:
        if not self.tolerance:
            assert torch.equal(ours.sequences, stock.sequences), "other tokens than transformers' own cache"
            self._close(torch.stack(ours.logits), torch.stack(stock.logits))
        else:  # as long as the tokens are the same
            same = (ours.sequences == stock.sequences).all(dim=0)
            count = int(same.cumprod(dim=0).sum()) - (ours.sequences.shape[1] - len(ours.logits)) + 1
            assert count >= 1
            count = min(count, len(ours.logits))
            self._close(torch.stack(ours.logits[:count]), torch.stack(stock.logits[:count]))

    def _close(self, ours: Tensor, stock: Tensor) -> None:
        scale = stock[stock.isfinite()].abs().max()
        allowed = max(_ROUNDING, _LOSS * self.tolerance) * scale
        error = (ours - stock).abs().max()
        assert error <= allowed, f"logits are off by {error:.3g} of {scale:.3g}"

    def _was_used(self, state: CacheState, folder: Path) -> None:
        assert state.persisted_tokens > 0, "the store was never used"
        if state.disk_bytes:
            assert state.directory is not None, "state() does not know the folder of the store"
            assert files_of(folder) == files_of(state.directory), "files outside its folder"


@functools.cache
def _model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(), torch.inference_mode(False):
        torch.manual_seed(3)
        return LlamaForCausalLM(LlamaConfig(**_SHAPE)).eval()


@functools.cache
def _sliding_twin(window: int) -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    with torch.random.fork_rng(), torch.inference_mode(False):
        twin = MistralForCausalLM(MistralConfig(**_SHAPE, sliding_window=window)).eval()
        twin.load_state_dict(_model().state_dict())
        return twin


def _stock(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def _tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 199, shape, generator=torch.Generator().manual_seed(seed))


def _generate(model: Any, ids: Tensor, cache: Any, **settings: Any) -> Any:
    return model.generate(
        ids, past_key_values=cache, max_new_tokens=12, do_sample=False, return_dict_in_generate=True,
        output_logits=True, **settings,
    )  # fmt: skip
