"""What stays in memory: within the budget, evenly, in large pieces, and between the reads."""

from __future__ import annotations

import pytest
import torch

from core.kv.engine_fixtures import ANY, EXTENT_BYTES, TOKENS, expected, extents_of, joined, make_session, tokens, walk
from ollm.contracts.blocks import BlockKey, Extent, KVBlock, Location
from ollm.errors import MemoryLimitError
from ollm.io.ledger import MemoryLedger
from ollm.kv import residency as module
from ollm.kv import route
from ollm.kv.table import take

LAYERS, EXTENTS = 3, 8


def resident(session, layer):
    (tier,) = session.source._tiers
    return [tier.home(extent) is not None for extent in extents_of(layer)]


def test_neighbours_are_one_block_when_all_is_resident(tmp_path):
    session, layers = make_session(tmp_path, layers=LAYERS, extents=EXTENTS, resident_bytes=2**30)
    for index, layer in enumerate(layers):
        blocks = walk(layer)
        assert sorted(blocks) == [0, EXTENTS * TOKENS], "one block, and the newest token"
        assert torch.equal(joined(blocks, EXTENTS * TOKENS), expected(index, EXTENTS))
    assert session.store.stats().bytes_read == 0
    assert session.source.resident_bytes == LAYERS * EXTENTS * EXTENT_BYTES
    session.close()
    assert session.source.resident_bytes == 0


def test_every_layer_keeps_the_same_share_and_a_step_reads_the_rest(tmp_path):
    session, layers = make_session(
        tmp_path, layers=LAYERS, extents=EXTENTS, resident_bytes=LAYERS * 3 * EXTENT_BYTES + 100
    )
    for index, layer in enumerate(layers):
        assert resident(session, layer) == [True] * 3 + [False] * 5
        assert torch.equal(joined(walk(layer), EXTENTS * TOKENS), expected(index, EXTENTS))
    assert session.counters.loaded_bytes == LAYERS * 5 * EXTENT_BYTES
    session.close()


def test_resident_parts_come_between_the_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(route, "_LEAST_SLICE_BYTES", EXTENT_BYTES)
    monkeypatch.setattr(route, "BUFFER_BYTES", EXTENT_BYTES)  # else they are read together
    session, (layer,) = make_session(tmp_path, layers=1, extents=EXTENTS, resident_bytes=4 * EXTENT_BYTES)
    order = [block.start // TOKENS for block in layer.handle(*tokens(1)).blocks(ANY)]
    assert sorted(order) == list(range(EXTENTS + 1))
    kinds = ["".join("r" if number < 4 else "d" for number in order[:-1])][0]
    assert "rrr" not in kinds and "ddd" not in kinds
    assert order[-1] == EXTENTS
    session.close()


def test_pieces_double_so_that_little_is_set_aside_for_what_may_never_come(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LEAST_PIECE_BYTES", EXTENT_BYTES)
    monkeypatch.setattr(module, "MOST_PIECE_BYTES", 4 * EXTENT_BYTES)
    session, (layer,) = make_session(tmp_path, layers=1, extents=13, resident_bytes=2**30)
    (tier,) = session.source._tiers
    assert [piece.claim.nbytes // EXTENT_BYTES for piece in tier._pieces[0, 0]] == [4, 4, 4, 1]
    assert torch.equal(joined(walk(layer), 13 * TOKENS), expected(0, 13))
    session.close()


@pytest.mark.parametrize(
    ("share", "largest"),
    [
        (0, 8.0),
        (0.5, 8.0),
        (3.0, 3.0),
        (8.0, 8.0),
        (9.0, 4.5),
        (12.0, 6.0),
        (128.0, 8.0),
        (130.0, 8.0),
        (133.0, 133 / 17),
    ],
)
def test_extents_fill_a_share_and_are_as_large_as_that_allows(share, largest):
    mib = 2**20
    tier = module.Residency(int(share * mib), device=torch.device("cpu"))
    assert tier.extent_bytes == int(largest * mib)


def test_what_was_cropped_gives_its_room_back(tmp_path):
    session, (layer,) = make_session(tmp_path, layers=1, extents=EXTENTS, resident_bytes=4 * EXTENT_BYTES)
    layer.crop(2 * TOKENS)
    assert session.source.resident_bytes == 2 * EXTENT_BYTES
    for number in range(2, EXTENTS):
        layer.append(*tokens(TOKENS, seed=number))
    assert resident(session, layer) == [True] * 4 + [False] * 4
    assert torch.equal(joined(walk(layer), EXTENTS * TOKENS), expected(0, EXTENTS))
    layer.crop(0)
    assert session.source.resident_bytes == 0
    session.close()


def test_another_batch_gets_pieces_of_its_own_shape(tmp_path):
    session, (layer,) = make_session(tmp_path, layers=1, extents=2, resident_bytes=2**24)
    layer.crop(0)
    layer.append(*tokens(TOKENS, seed=5, rows=3))
    assert torch.equal(joined(walk_rows(layer, 3), TOKENS), tokens(TOKENS, seed=5, rows=3)[0])
    session.close()


def walk_rows(layer, rows):
    blocks = layer.handle(*tokens(1, rows=rows)).blocks(ANY)
    return {block.start: take(block.keys, block.row_map).clone() for block in blocks}


def test_resident_extents_whose_rows_were_picked_together_are_one_block(tmp_path):
    session, (layer,) = make_session(tmp_path, layers=1, extents=3, resident_bytes=2**24)
    layer.select_rows(torch.tensor([0, 0]))
    layer.append(*tokens(TOKENS, seed=3, rows=2))  # another piece, for it has other rows
    blocks = walk_rows(layer, 2)
    assert sorted(blocks) == [0, 3 * TOKENS, 4 * TOKENS]
    assert torch.equal(joined(blocks, 3 * TOKENS), expected(0, 3).repeat(2, 1, 1, 1))
    session.close()


def test_less_stays_where_less_memory_is_free_and_no_byte_is_wrong(tmp_path, monkeypatch):
    class Full(MemoryLedger):
        claims = 0

        def try_claim(self, purpose, nbytes, device):
            self.claims += 1
            return super().try_claim(purpose, nbytes, device) if self.claims == 1 else None

    monkeypatch.setattr(module, "ledger", Full())
    monkeypatch.setattr(module, "LEAST_PIECE_BYTES", 2 * EXTENT_BYTES)
    session, (layer,) = make_session(tmp_path, layers=1, extents=EXTENTS, resident_bytes=2**30)
    assert resident(session, layer) == [True] * 2 + [False] * 6
    assert torch.equal(joined(walk(layer), EXTENTS * TOKENS), expected(0, EXTENTS))
    session.close()


def test_a_piece_that_may_not_grow_is_followed_by_another(tmp_path, monkeypatch):
    class Tight(MemoryLedger):
        def try_claim(self, purpose, nbytes, device):
            return super().try_claim(purpose, nbytes, device) if nbytes <= 2 * EXTENT_BYTES else None

    monkeypatch.setattr(module, "ledger", Tight())
    monkeypatch.setattr(module, "LEAST_PIECE_BYTES", EXTENT_BYTES)
    session, (layer,) = make_session(tmp_path, layers=1, extents=EXTENTS, resident_bytes=2**30)
    (tier,) = session.source._tiers
    assert [piece.claim.nbytes // EXTENT_BYTES for piece in tier._pieces[0, 0]] == [2, 2, 2, 2]
    assert torch.equal(joined(walk(layer), EXTENTS * TOKENS), expected(0, EXTENTS))
    session.close()


def test_what_is_left_of_a_piece_moves_into_a_larger_one(monkeypatch):
    ledger = MemoryLedger()
    monkeypatch.setattr(module, "ledger", ledger)
    monkeypatch.setattr(module, "LEAST_PIECE_BYTES", 3 * EXTENT_BYTES)
    tier = module.Residency(5 * EXTENT_BYTES, device=torch.device("cpu"))
    blocks = [KVBlock(*tokens(TOKENS, seed=number)) for number in range(7)]
    extents = [
        Extent.of(BlockKey(0, 0, TOKENS * number, TOKENS, 1), block.layout, Location(EXTENT_BYTES, 0, number))
        for number, block in enumerate(blocks)
    ]
    assert all(map(tier.offer, extents[:3], blocks[:3]))
    tier.drop(extents[0].location)
    assert list(map(tier.offer, extents[3:], blocks[3:])) == [True, True, True, False], "five fit into the share"
    (piece,) = {tier.home(extent) for extent in extents[1:6]}
    block = piece.view(TOKENS, 6 * TOKENS)
    assert tier.nbytes == 5 * EXTENT_BYTES
    assert torch.equal(block.keys, torch.cat([one.keys for one in blocks[1:6]], dim=2))
    assert torch.equal(block.values, torch.cat([one.values for one in blocks[1:6]], dim=2))
    tier.clear()
    assert (tier.nbytes, ledger._claims) == (0, [])


def test_a_piece_that_cannot_be_made_gives_its_claim_back(tmp_path, monkeypatch):
    ledger = MemoryLedger()
    monkeypatch.setattr(module, "ledger", ledger)

    def no_memory(nbytes, *, pinned):
        raise MemoryError

    monkeypatch.setattr(module, "aligned_buffer", no_memory)
    with pytest.raises(MemoryError):
        make_session(tmp_path, layers=1, extents=1, resident_bytes=2**24)
    assert ledger._claims == []


def test_what_finds_no_memory_after_all_is_read_instead(tmp_path, monkeypatch):
    """Copies are kept where there is room: that there is none is no error."""

    def refuses(nbytes, **more):
        raise MemoryLimitError("no more")

    monkeypatch.setattr(module, "aligned_buffer", refuses)
    session, layers = make_session(tmp_path, layers=LAYERS, extents=EXTENTS, resident_bytes=2**30)
    assert session.source.resident_bytes == 0
    for index, layer in enumerate(layers):
        assert torch.equal(joined(walk(layer), EXTENTS * TOKENS), expected(index, EXTENTS))
    session.close()
