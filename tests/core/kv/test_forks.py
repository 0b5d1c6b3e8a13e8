"""Forks in the engine: shared extents are read once for all rows, and what is freed is one's own."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from core.kv.engine_fixtures import ANY, EXTENT_BYTES, TOKENS, extents_of, make_session, tokens
from ollm.kv.table import take

pytestmark = pytest.mark.timeout(60)

LAYERS, EXTENTS, FORKS = 3, 6, 5


def fork_of(session, layers, rows):
    """What `KVCache.fork` does: the same histories again, with rows that ride on the first."""
    branch = session.join()
    forks = [layer.fork(branch) for layer in layers]
    for fork, following in zip(forks, forks[1:] + forks[:1], strict=True):
        fork.next = weakref.ref(following)
        fork.select_rows(torch.zeros(rows, dtype=torch.int64))
    return branch, forks


def step(layers, rows, seed=0):
    """A decode step: all keys of each layer, as attention meets them."""
    result = []
    for number, layer in enumerate(layers):
        new = tokens(1, seed=seed + number, rows=rows)
        blocks = [(block.start, take(block.keys, block.row_map).clone()) for block in layer.handle(*new).blocks(ANY)]
        layer.append(*new)
        result.append(torch.cat([keys for _, keys in sorted(blocks, key=lambda pair: pair[0])], dim=2))
    return result


@pytest.fixture
def started(tmp_path):
    session, layers = make_session(tmp_path, layers=LAYERS, extents=EXTENTS)
    user = session.join()
    yield session, layers, user
    session.close()
    assert list(tmp_path.iterdir()) == []


def test_a_step_of_many_rows_reads_each_shared_extent_once(started):
    session, layers, _ = started
    _, forks = fork_of(session, layers, FORKS)
    for number in range(1, 4):
        keys = step(forks, FORKS, seed=number)
        assert all(tensor.shape[0] == FORKS for tensor in keys)
        assert session.counters.loaded_bytes == number * LAYERS * EXTENTS * EXTENT_BYTES
    truth = step(layers, 1)
    assert all(torch.equal(ours[row, :, : EXTENTS * TOKENS], true[0, :, : EXTENTS * TOKENS])
               for ours, true in zip(keys, truth, strict=True) for row in range(FORKS))  # fmt: skip


def test_forks_and_their_origin_go_their_own_ways(started):
    session, layers, _ = started
    _, one = fork_of(session, layers, 2)
    _, two = fork_of(session, layers, 3)
    for number in range(2 * TOKENS):  # long enough for extents of their own
        step(layers, 1, seed=1000 + number)
        step(one, 2, seed=2000 + number)
        step(two, 3, seed=3000 + number)
    for histories, rows, seed in ((layers, 1, 1000), (one, 2, 2000), (two, 3, 3000)):
        for number, history in enumerate(histories):
            keys, _ = history.gather(*tokens(0, rows=rows))
            own = torch.cat([tokens(1, seed=seed + n + number, rows=rows)[0] for n in range(2 * TOKENS)], dim=2)
            assert torch.equal(keys[:, :, EXTENTS * TOKENS :], own)
            shared = torch.cat([tokens(TOKENS, seed=100 * number + n)[0] for n in range(EXTENTS)], dim=2)
            assert torch.equal(keys[:, :, : EXTENTS * TOKENS], shared.expand(rows, -1, -1, -1))


def test_closing_a_fork_frees_its_own_bytes_and_nothing_else(started):
    session, layers, _ = started
    before = session.store.stats().disk_bytes
    user, forks = fork_of(session, layers, FORKS)
    for number in range(TOKENS):
        step(forks, FORKS, seed=number)
    session.store.storage.flush()
    assert session.store.stats().disk_bytes > before
    session.leave(user, lambda: [fork.close() for fork in forks])
    assert session.store.stats().disk_bytes == before
    assert session.table.branches == {0}
    step(layers, 1)


def test_what_a_fork_still_needs_outlives_its_origin(started):
    session, layers, user = started
    _, forks = fork_of(session, layers, 2)
    truth = step(forks, 2)
    session.leave(user, lambda: [layer.close() for layer in layers])
    assert [extents_of(layer) for layer in layers] == [[]] * LAYERS
    again = step(forks, 2)
    for before, after in zip(truth, again, strict=True):
        assert torch.equal(before[:, :, :-1], after[:, :, : before.shape[2] - 1])


def test_a_fork_that_was_cropped_into_what_it_shares_keeps_the_rest(started):
    session, layers, _ = started
    _, forks = fork_of(session, layers, 2)
    middle = 2 * TOKENS + 5
    for fork in forks:
        fork.crop(middle)
        assert (fork.tokens, fork.tail.tokens, fork.table.shared_tokens) == (middle, 0, middle)
    for number, (ours, whole) in enumerate(zip(step(forks, 2), step(layers, 1), strict=True)):
        assert torch.equal(ours[:, :, :middle], whole[:, :, :middle].expand(2, -1, -1, -1)), number
    for fork in forks:
        fork.crop(0)
        assert (fork.tokens, extents_of(fork)) == (0, [])
    assert len(extents_of(layers[0])) == EXTENTS


def test_a_fork_of_a_fork_shares_what_both_had(started):
    session, layers, _ = started
    first_user, first = fork_of(session, layers, 2)
    for number in range(TOKENS + 3):
        step(first, 2, seed=number)
    branch = session.join()
    second = [layer.fork(branch) for layer in first]
    for ours, theirs in zip(second, first, strict=True):
        assert all(map(torch.equal, ours.gather(*tokens(0, rows=2)), theirs.gather(*tokens(0, rows=2))))
    session.leave(first_user, lambda: [layer.close() for layer in first])
    assert second[0].gather(*tokens(0, rows=2))[0].shape[2] == EXTENTS * TOKENS + TOKENS + 3
    shared = second[0].table.shared_tokens
    third = session.join()
    assert shared == second[0].table.tokens == EXTENTS * TOKENS + TOKENS
    assert second[0].fork(third).table.shared_tokens == shared, "not what a cache wrote that had its number before"


def test_reading_ahead_knows_what_a_fork_reads_next(started):
    """After its first step nothing is read twice, nor for nothing."""
    session, layers, _ = started
    _, forks = fork_of(session, layers, 2)
    step(layers, 1)
    step(forks, 2)
    before = session.store.stats().bytes_read
    for number in range(3):
        step(forks, 2, seed=number)
    run = EXTENTS * session.store.storage.record_bytes(EXTENT_BYTES)  # all neighbours at once
    assert session.store.stats().bytes_read - before <= (3 * LAYERS + session.plan.read_buffers) * run


def test_a_dropped_fork_is_tidied_up_when_another_one_goes_on(started):
    session, layers, _ = started
    user, forks = fork_of(session, layers, 2)
    for number in range(TOKENS):
        step(forks, 2, seed=number)
    session.leave_soon(user, lambda forks=forks: [fork.close() for fork in forks])
    del forks
    gc.collect()
    assert len(session.table.branches) == 2
    step(layers, 1)
    assert len(session.table.branches) == 1
