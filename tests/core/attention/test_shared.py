"""Rows that ride in the query dimension against keys that were copied for each row."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from ollm.attention.blockwise import Block, Scores, blockwise_attention
from ollm.attention.kernels import attend_tile
from ollm.attention.masks import TileMask, Visible
from ollm.attention.shared import attend_shared


def inputs(rows, stored, heads, kv_heads, queries, keys, seed):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(rows, heads, queries, 16, generator=generator)
    k, v = (torch.randn(stored, kv_heads, keys, 16, generator=generator) for _ in range(2))
    row_map = torch.randint(stored, (rows,), generator=generator)
    return query, k, v, row_map, generator


@given(
    rows=st.integers(1, 6), stored=st.integers(1, 4), group=st.sampled_from([1, 3]), kv_heads=st.integers(1, 2),
    queries=st.integers(1, 5), keys=st.integers(1, 7), seed=st.integers(0, 999),
    kind=st.sampled_from(["all", "diagonal", "by row", "by position", "flat"]),
    more=st.sampled_from([{}, {"softcap": 5.0}, {"bias": True}]),
)  # fmt: skip
def test_as_if_every_row_had_its_own_copy(rows, stored, group, kv_heads, queries, keys, seed, kind, more):
    keys = queries if kind == "diagonal" else keys
    heads = group * kv_heads
    query, k, v, row_map, generator = inputs(rows, stored, heads, kv_heads, queries, keys, seed)
    shapes = {"by row": (rows, 1, 1, keys), "by position": (1, 1, queries, keys), "flat": (queries, keys)}
    visible = {"all": Visible.ALL, "diagonal": Visible.DIAGONAL}.get(kind)
    if visible is None:
        visible = torch.rand(shapes[kind], generator=generator) > 0.3
    bias = torch.randn(1, heads, queries, keys, generator=generator) if more.get("bias") else None
    settings = {"scale": 0.3, "softcap": more.get("softcap"), "bias": bias}
    out, lse = attend_shared(query, k, v, visible, row_map, **settings)
    truth, truth_lse = attend_tile(query, k[row_map], v[row_map], visible, **settings)
    torch.testing.assert_close(lse, truth_lse)
    seen = truth_lse.isfinite()
    torch.testing.assert_close(out[seen], truth.float()[seen])


@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.25, 3.0)])
def test_scales_are_applied_to_scores_and_output(scales):
    query, k, v, _, _ = inputs(2, 2, 4, 2, 1, 24, 0)
    key_scale, value_scale = scales
    mask = TileMask(
        rows=2, queries=1, query_offset=24, keys=25, key_offset=0, function=None, padding=None,
        device=torch.device("cpu"),
    )  # fmt: skip
    parts = [Block(0, k[:, :, :10], v[:, :, :10], None, key_scale, value_scale), Block(10, k[:, :, 10:], v[:, :, 10:])]
    factor = torch.ones(24).index_fill(0, torch.arange(10), 1.0)[None, None, :, None]
    keys, values = k * factor, v * factor
    keys, values = keys.clone(), values.clone()
    keys[:, :, :10] *= key_scale
    values[:, :, :10] *= value_scale
    ours = blockwise_attention(query, parts, mask, Scores(scale=0.25))
    truth = blockwise_attention(query, [Block(0, keys, values)], mask, Scores(scale=0.25))
    torch.testing.assert_close(ours, truth)
