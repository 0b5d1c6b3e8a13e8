"""Each codec against arithmetic in fp64: error bounds, sizes, extremes, and what is refused."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from ollm.errors import ConfigurationError, NonFiniteError
from ollm_kv_quant import REPRESENTATIONS
from ollm_kv_quant.codecs import codec

UNITS = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 2**-23}
"""What rounding to a dtype costs at most, relatively; scales are fp32 even for fp64."""


def through(chosen, tensor):
    """Encoded to bytes and decoded; scale applied in fp64."""
    raw = torch.cat([part.contiguous().reshape(-1).view(torch.uint8) for part in chosen.encode(tensor)])
    assert raw.numel() == chosen.nbytes(tensor.shape)
    out = torch.full_like(tensor.contiguous(), 7)
    scale = chosen.decode(raw, out)
    return out.double() * scale


def largest(name, tensor):
    """The largest magnitude in what shares a scale with each element."""
    magnitudes = tensor.double().abs()
    if name == "int8-symmetric-per-tensor":
        return magnitudes.max().expand(tensor.shape)
    if name == "int8-per-token":
        return magnitudes.amax(-1, keepdim=True).expand(tensor.shape)
    groups = magnitudes.unflatten(-1, (-1, 32 if tensor.shape[-1] % 32 == 0 else 2))
    return groups.amax(-1, keepdim=True).expand(groups.shape).flatten(-2)


def check(name, tensor):
    ours, amax = through(codec(name), tensor), largest(name, tensor)
    bound = amax * (codec(name).error_bound + 2 * UNITS[tensor.dtype]) + 1e-36
    assert bool(((ours - tensor.double()).abs() <= bound).all())


@pytest.mark.parametrize("name", REPRESENTATIONS)
@pytest.mark.parametrize("dtype", UNITS, ids=str)
@given(
    seed=st.integers(0, 2**20), rows=st.integers(1, 2), heads=st.integers(1, 3), tokens=st.integers(1, 9),
    size=st.sampled_from([2, 6, 32, 64]), exponent=st.integers(-12, 4), outlier=st.sampled_from([1, 1000]),
)  # fmt: skip
def test_the_error_is_within_the_bound(name, dtype, seed, rows, heads, tokens, size, exponent, outlier):
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(rows, heads, tokens, size, generator=generator) * 2.0**exponent
    tensor.view(-1)[seed % tensor.numel()] *= outlier
    check(name, tensor.to(dtype))


@pytest.mark.parametrize("name", REPRESENTATIONS)
@pytest.mark.parametrize("dtype", UNITS, ids=str)
def test_extremes(name, dtype):
    info = torch.finfo(dtype)
    top = min(info.max, 1e38)
    for values in ([0.0, 0.0], [top, -top], [1e-20, 0.0], [-1.0, 1.0], [0.0, -0.0], [1e-30, 1.0]):
        check(name, torch.tensor(values, dtype=dtype).repeat(64).reshape(1, 2, 1, 64))


@pytest.mark.parametrize("name", REPRESENTATIONS)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_that_are_none_are_refused(name, wrong, dtype):
    tensor = torch.randn(1, 2, 5, 64).to(dtype)
    tensor[0, 1, 3, 17] = wrong
    with pytest.raises(NonFiniteError, match=r"NaN or infinite and cannot be quantised.*'chunked'"):
        codec(name).encode(tensor)


def test_bytes_against_bfloat16():
    """At most 0.55 of the bytes; with the default, half of them and two scales."""
    shape = (1, 8, 1024, 128)
    exact = 2 * 8 * 1024 * 128
    assert {name: codec(name).nbytes(shape) / exact for name in REPRESENTATIONS} == {
        "int8-symmetric-per-tensor": pytest.approx(0.5, abs=1e-5),
        "int8-per-token": pytest.approx(0.5156, abs=1e-4),
        "int4-per-token-group": pytest.approx(0.28125),
    }


def test_heads_of_odd_size_are_refused_where_two_elements_share_a_byte():
    codec("int8-per-token").check(7)
    codec("int4-per-token-group").check(8)
    with pytest.raises(ConfigurationError, match=r"heads of 7 elements.*'int8-per-token'"):
        codec("int4-per-token-group").check(7)
