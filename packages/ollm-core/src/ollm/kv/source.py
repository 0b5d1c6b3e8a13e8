"""`BlockSource`: the stored keys and values of a cache, wherever they are: resident, read ahead, or staged.

Joins residency, reader and staging into one stream of blocks per layer. Knows nothing of rows beyond handing on their
maps, and nothing of when something is stored or dropped.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager

import attrs
import torch
from torch import Tensor

from ollm.contracts.kv import Extent, KVBlock, KVStore
from ollm.contracts.spill import SpillPlan
from ollm.errors import StoreContractError
from ollm.io.buffers import BufferPool
from ollm.io.scheduler import scheduler_of
from ollm.kv.pins import Pins
from ollm.kv.reader import READ_BYTES, BlockReader, check_raw
from ollm.kv.residency import Residency
from ollm.kv.rows import RowMap
from ollm.kv.staging import CudaStreams, Staging
from ollm.kv.state import KVCounters
from ollm.storage.tensors import LayerLayout

_LEAST_SLICE_BYTES = 8 * 2**20

Stored = tuple[Extent, RowMap]
Outputs = Callable[[Extent], KVBlock | None]


@attrs.frozen
class Loaded:
    """A block of one extent or several neighbours, with the rows that it was written with."""

    start: int
    """Position of its first token."""
    row_map: RowMap
    block: KVBlock


class BlockSource:
    """For one cache and one thread."""

    def __init__(
        self,
        store: KVStore,
        plan: SpillPlan,
        *,
        strategy: str,
        layers: Sequence[int],
        lossless: bool,
        device: torch.device,
        pins: Pins,
        counters: KVCounters,
    ) -> None:
        """Nothing is resident or read yet; arguments as of `KVSession`."""
        self._store = store
        self._strategy = strategy
        self._device = device
        staged = device.type == "cuda"
        keep = lossless and not store.in_memory
        host = Residency(plan.resident_bytes * keep, len(layers), device=torch.device("cpu"), staged=staged)
        on_device = Residency(plan.resident_bytes_device * keep, len(layers), device=device)
        self._tiers = (on_device, host) if staged else (host,)
        self._undo = ExitStack()
        self._reader: BlockReader | None = None
        self._staging: Staging | None = None
        with ExitStack() as undo:  # until all is made
            if staged:
                self._staging = Staging(device, READ_BYTES, CudaStreams(device))
                undo.callback(self._staging.close)
            if not store.in_memory:
                buffers = BufferPool("Read buffers", plan.read_buffers, READ_BYTES, pinned=staged)
                undo.callback(buffers.close)
                scheduler = store.storage.scheduler if store.storage else scheduler_of(None)
                if store.storage is None:
                    undo.callback(scheduler.release)
                self._reader = BlockReader(
                    store, strategy=strategy, layers=layers, is_cold=functools.partial(_is_cold, self._tiers),
                    pins=pins, buffers=buffers, scheduler=scheduler, counters=counters,
                )  # fmt: skip
                undo.callback(self._reader.cancel)
            self._undo = undo.pop_all()

    @property
    def resident_bytes(self) -> int:
        """Bytes of resident copies, on the host and on the device."""
        return sum(tier.nbytes for tier in self._tiers)

    @property
    def extent_bytes(self) -> int:
        """The largest extent that should be cut."""
        return self._tiers[-1].extent_bytes

    @property
    def buffer_bytes(self) -> int:
        """Memory of the read buffers."""
        return 0 if self._reader is None else self._reader.buffer_bytes

    @property
    def reads_in_flight(self) -> int:
        """Reads that were asked for and whose bytes were not used yet."""
        return 0 if self._reader is None else self._reader.in_flight

    def keep(self, extent: Extent, block: KVBlock) -> None:
        """Keep a copy of what was just stored, where there is room."""
        any(tier.offer(extent, block) for tier in self._tiers)

    def forget(self, extents: Sequence[Extent]) -> None:
        """These were dropped: they are not resident any more."""
        for extent in extents:
            for tier in self._tiers:
                tier.drop(extent)

    def forget_reads(self, extents: Iterable[Extent]) -> None:
        """These were dropped: what is read ahead of them is given up."""
        if self._reader is not None:
            self._reader.forget(extents)

    def cancel_reads(self) -> None:
        """Give up what is read ahead; afterwards nothing is being read."""
        if self._reader is not None:
            self._reader.cancel()

    def blocks(
        self, past: Sequence[Stored], layout: LayerLayout, out: Outputs | None = None
    ) -> Generator[Loaded, None, None]:
        """The keys and values of pinned extents of one layer, each valid until the next is asked for.

        Not in order of position: what is resident comes between what must be read, so that the disk is busy meanwhile.

        Args:
            past: the extents, in order, with their row maps.
            layout: what they must have.
            out: where a decoder that computes may put the result for an extent.
        """
        resident, cold = self._sort(past)
        if cold:
            resident = [piece for part in resident for piece in _slices(part, resident, len(cold))]
        done = 0
        with closing(self._load_cold(cold, layout, out)) as read:
            for index in range(1, len(cold) + 2):  # once more than there are, for `read` to come to its end
                due = index * len(resident) // (len(cold) + 1)
                for part in resident[done:due]:
                    yield from self._on_device(part)
                done = due
                loaded = next(read, None)
                if loaded is not None:
                    yield loaded

    def close(self) -> None:
        """End all reading and forget what is resident. May be called twice."""
        self._undo.close()
        for tier in self._tiers:
            tier.clear()

    def _tier_of(self, extent: Extent) -> Residency | None:
        return next((tier for tier in self._tiers if tier.holds(extent)), None)

    def _sort(self, past: Sequence[Stored]) -> tuple[list[Loaded], list[Stored]]:
        """What is resident, neighbours joined, and what must be read."""
        resident, cold, at = [], [], 0
        while at < len(past):
            extent, row_map = past[at]
            tier = self._tier_of(extent)
            if tier is None:
                cold.append(past[at])
                at += 1
                continue
            # rows are picked out of one extent at a time, for that makes a copy
            same = (
                list(itertools.takewhile(lambda part: part[1] is None, past[at:]))
                if row_map is None
                else past[at : at + 1]
            )
            count, block = tier.run([part[0] for part in same])
            resident.append(Loaded(extent.start, row_map, block))
            at += count
        return resident, cold

    def _load_cold(
        self, cold: Sequence[Stored], layout: LayerLayout, out: Outputs | None
    ) -> Generator[Loaded, None, None]:
        row_maps = dict(cold)
        extents = [extent for extent, _ in cold]
        raws = self._look_up(extents) if self._reader is None else self._reader.read(extents)
        with closing(raws):
            for extent, raw in raws:
                with self._staged([raw], of_reader=True) as (staged,):
                    block = self._store.decode(extent, staged, out(extent) if out else None)
                    self._check_block(extent, layout, block)
                    yield Loaded(extent.start, row_maps[extent], block)

    def _look_up(self, extents: Sequence[Extent]) -> Generator[tuple[Extent, Tensor], None, None]:
        """What a store has in memory."""
        for extent in extents:
            raw = self._store.read(extent)
            check_raw(self._strategy, extent, raw)
            yield extent, raw

    def _on_device(self, part: Loaded) -> Iterator[Loaded]:
        """A resident block where attention can use it."""
        with self._staged([part.block.keys, part.block.values]) as (keys, values):
            yield attrs.evolve(part, block=KVBlock(keys, values))

    @contextmanager
    def _staged(self, tensors: Sequence[Tensor], *, of_reader: bool = False) -> Iterator[Sequence[Tensor]]:
        """Tensors on the device: they themselves, unless they are somewhere else."""
        if self._staging is None or tensors[0].device == self._device:
            yield tensors
            return
        with self._staging.on_device(tensors) as (staged, wait_until_copied):
            if of_reader and self._reader is not None:
                self._reader.in_use_until(wait_until_copied)
            yield staged

    def _check_block(self, extent: Extent, layout: LayerLayout, block: KVBlock) -> None:
        shape = (extent.rows, layout.kv_heads, extent.tokens)
        for name, tensor, size in (("keys", block.keys, layout.key_size), ("values", block.values, layout.value_size)):
            if tensor.shape != (*shape, size) or tensor.dtype != layout.dtype:
                raise StoreContractError(
                    f"KV store '{self._strategy}': decode() of {extent} gave {name} {tuple(tensor.shape)} "
                    f"{tensor.dtype}, expected {(*shape, size)} {layout.dtype}."
                )


def _is_cold(tiers: Sequence[Residency], extent: Extent) -> bool:
    return not any(tier.holds(extent) for tier in tiers)


def _slices(part: Loaded, resident: Sequence[Loaded], gaps: int) -> Iterator[Loaded]:
    """A resident part as several, so that there is about one for every gap between reads: while attention computes
    with a large one, all buffers would fill up and the disk would stand still."""
    tokens = part.block.keys.shape[2]
    in_all = sum(other.block.keys.shape[2] for other in resident)
    per_token = (part.block.keys.nbytes + part.block.values.nbytes) // tokens
    size = max(-(-in_all // (gaps + 1)), _LEAST_SLICE_BYTES // per_token, 1)
    for start in range(0, tokens, size):
        span = slice(start, min(start + size, tokens))
        yield Loaded(
            part.start + start, part.row_map, KVBlock(part.block.keys[:, :, span], part.block.values[:, :, span])
        )
