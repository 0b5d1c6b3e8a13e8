"""Blockwise attention against one softmax over everything in fp64: whatever the shapes, blocks, tiles and masks."""

from __future__ import annotations

import itertools
import weakref

import attrs
import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from ollm.attention import blockwise, masks
from ollm.attention.blockwise import Block, Scores, blockwise_attention
from ollm.attention.masks import TileMask, Visible


@attrs.frozen
class Case:
    """One attention problem; positions before `past` are older than the queries."""

    rows: int = 1
    kv_heads: int = 2
    group: int = 2
    key_size: int = 8
    value_size: int = 8
    past: int = 0
    queries: int = 5
    window: int | None = None
    padding: tuple[int, ...] = ()
    cuts: tuple[float, ...] = ()
    softcap: float | None = None
    sinks: bool = False
    bias: bool = False
    dtype: torch.dtype = torch.float32
    seed: int = 0

    @property
    def keys(self):
        return self.past + self.queries

    def tensors(self):
        generator = torch.Generator().manual_seed(self.seed)

        def random(*shape):
            return torch.randn(*shape, generator=generator).to(self.dtype)

        heads = self.kv_heads * self.group
        return {
            "query": random(self.rows, heads, self.queries, self.key_size),
            "keys": random(self.rows, self.kv_heads, self.keys, self.key_size),
            "values": random(self.rows, self.kv_heads, self.keys, self.value_size),
            "sinks": random(heads) if self.sinks else None,
            "bias": random(1, heads, self.queries, self.keys) if self.bias else None,
        }

    def function(self):
        if self.window is None:
            return None
        return lambda rows, heads, queries, keys: (keys <= queries) & (keys > queries - self.window)

    def padding_mask(self):
        if not self.padding:
            return None
        real = torch.ones(self.rows, self.keys, dtype=torch.bool)
        for row, count in zip(range(self.rows), self.padding * self.rows, strict=False):
            real[row, : min(count, self.keys - 1)] = False
        return real

    def blocks(self, keys, values):
        borders = sorted({0, self.keys, *(int(cut * self.keys) for cut in self.cuts)})
        return [Block(low, keys[:, :, low:high], values[:, :, low:high]) for low, high in itertools.pairwise(borders)]

    def ours(self):
        tensors = self.tensors()
        mask = TileMask(
            rows=self.rows, queries=self.queries, query_offset=self.past, keys=self.keys, key_offset=0,
            function=self.function(), padding=self.padding_mask(), device=torch.device("cpu"),
        )  # fmt: skip
        scores = Scores(scale=0.3, softcap=self.softcap, bias=tensors["bias"], sinks=tensors["sinks"])
        return blockwise_attention(tensors["query"], self.blocks(tensors["keys"], tensors["values"]), mask, scores)

    def truth(self):
        """In fp64, with every score at once."""
        tensors = {name: None if tensor is None else tensor.double() for name, tensor in self.tensors().items()}
        keys, values = (tensors[name].repeat_interleave(self.group, 1) for name in ("keys", "values"))
        scores = tensors["query"] @ keys.transpose(-1, -2) * 0.3
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if tensors["bias"] is not None:
            scores = scores + tensors["bias"]
        position = torch.arange(self.past, self.keys)[:, None]
        visible = torch.arange(self.keys) <= position
        if self.window is not None:
            visible &= torch.arange(self.keys) > position - self.window
        padding = self.padding_mask()
        visible = visible if padding is None else visible & padding[:, None, None, :]
        scores = scores.masked_fill(~visible, float("-inf"))
        if tensors["sinks"] is not None:
            sink = tensors["sinks"][None, :, None, None].expand(*scores.shape[:3], 1)
            return torch.softmax(torch.cat([scores, sink], -1), -1)[..., :-1].nan_to_num(0) @ values
        return torch.softmax(scores, -1).nan_to_num(0) @ values


CASES = st.builds(
    Case,
    rows=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    key_size=st.sampled_from([8, 16]),
    value_size=st.sampled_from([8, 16]),
    past=st.integers(0, 30),
    queries=st.integers(1, 40),
    window=st.none() | st.integers(1, 20),
    padding=st.lists(st.integers(0, 40), max_size=3).map(tuple),
    cuts=st.lists(st.floats(0, 1), max_size=5).map(tuple),
    softcap=st.none() | st.just(5.0),
    sinks=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
TILES = st.sampled_from([1, 3, 8, 16, 4096])


@given(case=CASES, query_tile=TILES, key_tile=TILES)
def test_any_case_equals_one_softmax_over_everything(case, query_tile, key_tile):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "QUERY_TILE", query_tile)
        patch.setattr(blockwise, "KEY_TILE", key_tile)
        patch.setattr(blockwise, "PLAIN_TILE", key_tile)
        torch.testing.assert_close(case.ours().double(), case.truth(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "case", [Case(dtype=torch.bfloat16, past=500, queries=q, cuts=(0.2, 0.5, 0.9)) for q in (1, 70)]
)
def test_bfloat16_loses_no_more_than_its_own_rounding(case):
    """Each tile is rounded once to bfloat16 (2**-9 of its size) and merged in fp32."""
    torch.testing.assert_close(case.ours().double(), case.truth(), rtol=2**-7, atol=2**-8)


def test_a_query_that_sees_nothing_gets_zeros():
    """The fused kernel answers such rows with the log-sum-exp of one key; they must weigh nothing in the merge."""
    case = Case(padding=(6,), past=4, queries=4, cuts=(0.5,))
    assert torch.equal(case.ours()[:, :, :2], torch.zeros(1, 4, 2, 8))
    torch.testing.assert_close(case.ours().double(), case.truth(), rtol=1e-4, atol=1e-4)


def mask_of(**more):
    settings = {
        "rows": 1, "queries": 8, "query_offset": 8, "keys": 16, "key_offset": 0, "function": None, "padding": None,
        "device": torch.device("cpu"),
    }  # fmt: skip
    return TileMask(**{**settings, **more})


def test_tiles_that_need_no_tensor_have_none():
    causal = mask_of()
    assert causal.tile(8, 16, 0, 8) is Visible.ALL
    assert causal.tile(8, 12, 12, 16) is Visible.NONE
    assert causal.tile(8, 16, 8, 16) is Visible.DIAGONAL
    assert causal.tile(15, 16, 8, 16) is Visible.ALL
    padded = mask_of(padding=torch.tensor([[False] * 4 + [True] * 12]))
    assert padded.tile(8, 16, 0, 4) is Visible.NONE
    assert padded.tile(8, 16, 4, 8) is Visible.ALL
    assert padded.tile(8, 16, 2, 6).tolist() == [[[[False, False, True, True]]]]


def test_a_tile_is_evaluated_once_for_all_layers():
    calls = []

    def function(rows, heads, queries, keys):
        calls.append(keys.shape)
        return keys <= queries

    mask = mask_of(function=function)
    assert mask.tile(8, 16, 0, 8) is mask.tile(8, 16, 0, 8) is Visible.ALL
    assert len(calls) == 1


def test_the_answers_of_a_long_prompt_do_not_pile_up(monkeypatch):
    """Only the newest tensors are kept, whatever the number of pieces; what is asked for again is right again."""
    made = []

    def function(rows, heads, queries, keys):
        return (keys <= queries) & (keys > queries - 64)

    real = TileMask._evaluate

    def evaluate(mask, *place):
        answer = real(mask, *place)
        if isinstance(answer, torch.Tensor):
            made.append(weakref.ref(answer))
        return answer

    monkeypatch.setattr(TileMask, "_evaluate", evaluate)
    monkeypatch.setattr(masks, "KEPT_BYTES", 4 * 16 * 16)
    mask = mask_of(function=function, queries=1024, query_offset=0, keys=1024)

    def visible(query, key):
        answer = mask.queries_between(query, query + 16).tile(query, query + 16, key, key + 16)
        if isinstance(answer, Visible):
            return torch.full((16, 16), answer is Visible.ALL)
        return answer.expand(1, 1, 16, 16)[0, 0]

    queries, keys = torch.arange(1024)[:, None], torch.arange(1024)
    truth = function(None, None, queries, keys)
    for _ in range(2):
        for query in range(0, 1024, 16):
            for key in range(0, 1024, 256):
                assert torch.equal(visible(query, key), truth[query : query + 16, key : key + 16])
    for query in range(0, 1024, 16):
        visible(query, query)
    assert len(made) > 50
    assert sum(ref() is not None for ref in made) <= 4


def test_no_block_is_joined_with_another(monkeypatch):
    """Kernels never see more keys than a block has, however long the context; masks are no larger than a tile."""
    seen, masks = [], []
    real = blockwise.attend_tile

    def spy(query, keys, values, visible, **more):
        seen.append(keys.shape[2])
        masks.extend([tuple(visible.shape[-2:])] if isinstance(visible, torch.Tensor) else [])
        return real(query, keys, values, visible, **more)

    monkeypatch.setattr(blockwise, "attend_tile", spy)
    monkeypatch.setattr(blockwise, "KEY_TILE", 16)
    Case(past=200, queries=1, cuts=(0.1, 0.4)).ours()
    assert sorted(seen) == [20, 60, 121]  # a step of generation: its own position needs no tile of its own
    assert masks == []
    Case(past=200, queries=9, cuts=(0.1, 0.4), window=50).ours()
    assert masks
    assert max(keys for _, keys in masks) <= 16


@pytest.mark.gpu
@pytest.mark.parametrize(("past", "queries"), [(300, 1), (0, 300), (200, 100)])
@pytest.mark.parametrize("group", [1, 4])
def test_the_kernel_of_an_accelerator_gives_what_the_plain_path_gives(past, queries, group):
    case = Case(
        past=past, queries=queries, group=group, key_size=64, value_size=64, dtype=torch.bfloat16, cuts=(0.3, 0.7)
    )
    tensors = {name: tensor.to("cuda:0") for name, tensor in case.tensors().items() if tensor is not None}
    blocks = [Block(0, tensors["keys"], tensors["values"])]
    mask = TileMask(
        rows=1, queries=queries, query_offset=past, keys=case.keys, key_offset=0, function=None, padding=None,
        device=torch.device("cuda:0"),
    )  # fmt: skip
    ours = blockwise_attention(tensors["query"], blocks, mask, Scores(scale=0.125)).float().cpu()
    on_host = [Block(0, case.tensors()["keys"].double(), case.tensors()["values"].double())]
    host_mask = TileMask(
        rows=1, queries=queries, query_offset=past, keys=case.keys, key_offset=0, function=None, padding=None,
        device=torch.device("cpu"),
    )  # fmt: skip
    truth = blockwise_attention(case.tensors()["query"].double(), on_host, host_mask, Scores(scale=0.125)).float()
    torch.testing.assert_close(ours, truth, rtol=2e-2, atol=2e-2)
