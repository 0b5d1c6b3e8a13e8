"""One store at work: the plan it runs under, the table of what it holds, who writes, who reads, and counters."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from ollm.contracts.kv import KVStore
from ollm.contracts.spill import SpillPlan
from ollm.io.ledger import Claim
from ollm.io.scheduler import check_process
from ollm.kv.selection import Select, everything
from ollm.kv.source import BlockSource
from ollm.kv.state import KVCounters
from ollm.kv.table import BlockTable
from ollm.kv.writer import Writer


class KVSession:
    """What the layers of one cache, and of its forks, share."""

    def __init__(
        self,
        store: KVStore,
        plan: SpillPlan,
        *,
        strategy: str,
        layers: Sequence[int],
        lossless: bool = True,
        device: torch.device | None = None,
        directory: Path | None = None,
        claims: Sequence[Claim] = (),
        select: Select = everything,
    ) -> None:
        """A session over a new store.

        Args:
            store: empty.
            plan: what the spill policy decided.
            strategy: the name for messages and `state()`.
            layers: the indices of the stored layers.
            lossless: whether the store gives back what it is given; only then may copies of that stay in memory.
            device: where attention runs; by default the CPU.
            directory: the private folder of the store, for `state()`.
            claims: memory that was claimed for this cache; given back at the end.
            select: which extents a query attends to.

        Raises:
            MemoryLimitError: no memory for the read buffers is free.
        """
        self.store = store
        self.plan = plan
        self.strategy = strategy
        self.directory = directory
        self.select = select
        self.counters = KVCounters()
        self.table = BlockTable()
        self._claims = list(claims)
        self._process = os.getpid()
        self._dropped: dict[int, Callable[[], None]] = {}  # caches, and how they give up what they have
        self.source = BlockSource(
            store, plan, strategy=strategy, layers=layers, lossless=lossless,
            device=device or torch.device("cpu"), counters=self.counters,
        )  # fmt: skip
        self.writer = Writer(
            store, plan, strategy=strategy, lossless=lossless, table=self.table, source=self.source,
            counters=self.counters, give_back=functools.partial(_give_back, self.table, self.source, store),
        )  # fmt: skip

    def check_process(self) -> None:
        """Whether this is the process that the session was made in.

        Raises:
            CacheForkedError: it is a child of that.
        """
        check_process(self._process)

    def join(self) -> int:
        """One cache more; its branch."""
        self.check_process()
        self._tidy()
        return self.table.join()

    def leave(self, branch: int, give_up: Callable[[], None]) -> None:
        """One cache less: `give_up` drops what it has; with the last one everything ends. May be called until it has
        succeeded, and afterwards. In a forked child, whose parent goes on with all of it, it does nothing."""
        if os.getpid() != self._process:
            return
        try:
            if self.table.branches - self._dropped.keys() <= {branch}:
                self.close()
            else:
                give_up()
        finally:
            self.table.leave(branch)

    def leave_soon(self, branch: int, give_up: Callable[[], None]) -> None:
        """The same for a cache that was dropped, perhaps by the garbage collector in the midst of anything: takes place
        when another one goes on. If there is no other, what they shared is garbage as well, and ends by itself."""
        self._dropped[branch] = give_up
        if self.table.branches <= self._dropped.keys():
            self._dropped.clear()  # which kept this alive

    def give_back(self) -> None:
        """Free what no list has any more and nobody reads. The last step of whoever drops something: if it is
        interrupted, the next one does it, or it costs only space."""
        _give_back(self.table, self.source, self.store)

    def raise_failed(self) -> None:
        """Raise what the background failed with since the last call; see `Storage.raise_failed`.

        Raises:
            CacheForkedError: in a forked child.
        """
        self.check_process()
        self._tidy()
        if self.store.storage is not None:
            self.store.storage.raise_failed()

    def close(self) -> None:
        """End all reading, close the store and forget what is resident. May be called until it has succeeded, and
        afterwards."""
        with ExitStack() as steps:  # from the last to the first; the next one is done even if one fails
            for claim in self._claims:
                steps.callback(claim.release)
            steps.callback(self.store.close)
            steps.callback(self.source.close)

    def _tidy(self) -> None:
        while self._dropped:
            branch, give_up = next(iter(self._dropped.items()))
            try:
                self.leave(branch, give_up)
            except Exception:  # who comes next need not meet it again; after an interrupt the next one goes on
                self._dropped.pop(branch, None)
                raise
            self._dropped.pop(branch, None)


def _give_back(table: BlockTable, source: BlockSource, store: KVStore) -> None:
    due = table.due()
    if not due.drops:
        return
    try:
        if due.free:
            source.forget(due.free)
            store.free(due.free)
    except Exception:  # who comes next need not meet it again
        table.settle(due)
        raise
    table.settle(due)  # not after an interrupt: the next one frees them, before anything is written
