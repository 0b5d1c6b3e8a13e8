"""The KV contract, for the two stores of core."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from core.golden_files import check_golden, fix_store_id, small_block
from core.storage_fixtures import open_storage
from core.store_contract import StoreContract, machine, read
from ollm.builtin.chunked import ChunkedStore
from ollm.builtin.resident import ResidentStore
from ollm.errors import StorageError

GOLDEN = Path(__file__).parent / "golden"


def make_chunked(folder):
    return ChunkedStore(open_storage(folder))


def make_resident(folder):
    return ResidentStore()


class TestChunked(StoreContract):
    def make(self, folder):
        return make_chunked(folder)


class TestResident(StoreContract):
    def make(self, folder):
        return make_resident(folder)


TestChunkedMachine = machine(make_chunked)
TestResidentMachine = machine(make_resident)


@pytest.mark.parametrize("make", [make_chunked, make_resident])
def test_every_bit_pattern_survives(make, tmp_path):
    """Infinities, NaNs and negative zeros included: nothing is computed on the way."""
    store = make(tmp_path)
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).reshape(1, 1, -1, 64)
    store.append(0, bits, bits.flip(2))
    keys, values = read(store, store.extents(0)[0])
    assert torch.equal(keys.contiguous().view(torch.int16), bits.view(torch.int16))
    assert torch.equal(values.contiguous().view(torch.int16), bits.flip(2).contiguous().view(torch.int16))
    store.close()


def test_a_dtype_that_the_format_does_not_have_is_refused(tmp_path):
    store = make_chunked(tmp_path)
    keys = torch.zeros(1, 1, 1, 1, dtype=torch.complex64)
    with pytest.raises(StorageError, match=r"complex64 cannot be stored.*bfloat16"):
        store.append(0, keys, keys)
    assert store.extents(0) == ()
    store.close()


def test_the_files_of_chunked_have_the_bytes_that_were_written_down(tmp_path, monkeypatch):
    fix_store_id(monkeypatch)
    store = make_chunked(tmp_path)
    for layer in range(2):
        for number in range(2):
            store.append(layer, *small_block(2 + number, 100 * layer + 10 * number, rows=1 + layer))
    check_golden(store, GOLDEN / "chunked.txt")
