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
from ollm.io.device_ring import DeviceRing
from ollm.io.scheduler import scheduler_of
from ollm.io.streams import CudaStreams
from ollm.kv.encoded import EncodedResidency, Scratch
from ollm.kv.pins import Pins
from ollm.kv.reader import READ_BYTES, BlockReader, check_raw
from ollm.kv.residency import Residency, Share
from ollm.kv.rows import RowMap, Stored
from ollm.kv.state import KVCounters
from ollm.storage.tensors import LayerLayout

_LEAST_SLICE_BYTES = 8 * 2**20
_DEVICE_BUFFERS = 3
"""One is being computed with, one is filled, one waits."""

Following = Callable[[], Iterable[Sequence[Stored]]]
"""The extents that will be wanted next, layer by layer, as far as one can tell; finite."""
Outputs = Callable[[Stored], KVBlock | None]
"""Where a decoder that computes may put an extent; `None` where a buffer must do."""


@attrs.frozen(eq=False)
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
        host = Residency(Share.even(plan.resident_bytes * keep, layers), device=torch.device("cpu"), staged=staged)
        on_device = Residency(Share.even(plan.resident_bytes_device * keep, layers), device=device)
        self._tiers = (on_device, host) if staged else (host,)
        encoded = 0 if lossless or store.in_memory else plan.resident_bytes
        self._encoded = EncodedResidency(Share.even(encoded, layers), pinned=staged)
        self._decoded = Scratch(device)
        self._undo = ExitStack()
        self._reader: BlockReader | None = None
        self._staging: DeviceRing | None = None
        with ExitStack() as undo:  # until all is made
            if staged:
                self._staging = DeviceRing(
                    "Staging buffers", device, READ_BYTES, CudaStreams(device), count=_DEVICE_BUFFERS
                )
                undo.callback(self._staging.close)
            if not store.in_memory:
                buffers = BufferPool("Read buffers", plan.read_buffers, READ_BYTES, pinned=staged)
                undo.callback(buffers.close)
                scheduler = store.storage.scheduler if store.storage else scheduler_of(None)
                if store.storage is None:
                    undo.callback(scheduler.release)
                self._reader = BlockReader(
                    store, strategy=strategy, is_cold=functools.partial(_is_cold, (*self._tiers, self._encoded)),
                    pins=pins, buffers=buffers, scheduler=scheduler, counters=counters,
                )  # fmt: skip
                undo.callback(self._reader.cancel)
            self._undo = undo.pop_all()

    @property
    def resident_bytes(self) -> int:
        """Bytes of resident copies, on the host and on the device."""
        return sum(tier.nbytes for tier in (*self._tiers, self._encoded))

    @property
    def extent_bytes(self) -> int:
        """The largest extent that should be cut."""
        return self._tiers[-1].extent_bytes

    @property
    def buffer_bytes(self) -> int:
        """Memory of the buffers for reading and decoding."""
        return self._decoded.nbytes + (0 if self._reader is None else self._reader.buffer_bytes)

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
            for tier in (*self._tiers, self._encoded):
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
        self, past: Sequence[Stored], layout: LayerLayout, following: Following, out: Outputs = lambda part: None
    ) -> Generator[Loaded, None, None]:
        """The keys and values of pinned extents of one layer, each valid until the next is asked for.

        Not in order of position: what is resident comes between what must be read, so that the disk is busy meanwhile.

        Args:
            past: the extents, in order.
            layout: what they must have.
            following: what will be asked for next.
            out: where the result for an extent should be.
        """
        resident, encoded, cold = self._sort(past)
        if cold:
            resident = [piece for part in resident for piece in _slices(part, resident, len(cold))]
        ready = [*map(self._on_device, resident), *(self._decode_resident(part, layout, out) for part in encoded)]
        done = 0
        with closing(self._load_cold(cold, layout, following, out)) as read:
            for index in range(1, len(cold) + 2):  # once more than there are, for `read` to come to its end
                due = index * len(ready) // (len(cold) + 1)
                for parts in ready[done:due]:
                    yield from parts
                done = due
                loaded = next(read, None)
                if loaded is not None:
                    yield loaded

    def close(self) -> None:
        """End all reading and forget what is resident. May be called twice."""
        self._undo.close()
        for tier in (*self._tiers, self._encoded):
            tier.clear()
        self._decoded.close()

    def _tier_of(self, extent: Extent) -> Residency | None:
        return next((tier for tier in self._tiers if tier.holds(extent)), None)

    def _sort(self, past: Sequence[Stored]) -> tuple[list[Loaded], list[Stored], list[Stored]]:
        """What is resident, neighbours joined; what is resident as it is stored; and what must be read."""
        resident: list[Loaded] = []
        encoded: list[Stored] = []
        cold: list[Stored] = []
        at = 0
        while at < len(past):
            part = past[at]
            tier = self._tier_of(part.extent)
            if tier is None:
                (encoded if self._encoded.holds(part.extent) else cold).append(part)
                at += 1
                continue
            same = itertools.takewhile(functools.partial(_has_same_rows, part), itertools.islice(past, at, None))
            count, block = tier.run([neighbour.extent for neighbour in same])
            resident.append(Loaded(part.start, part.row_map, block))
            at += count
        return resident, encoded, cold

    def _load_cold(
        self, cold: Sequence[Stored], layout: LayerLayout, following: Following, out: Outputs
    ) -> Generator[Loaded, None, None]:
        extents = [part.extent for part in cold]

        def next_layers() -> Iterator[Sequence[Extent]]:
            return ([part.extent for part in layer] for layer in following())

        raws = self._look_up(extents) if self._reader is None else self._reader.read(extents, next_layers)
        with closing(raws):
            for (extent, raw), part in zip(raws, cold, strict=True):
                self._encoded.offer(extent, raw)
                yield from self._decode(part, raw, layout, out, of_reader=True)

    def _decode_resident(self, part: Stored, layout: LayerLayout, out: Outputs) -> Iterator[Loaded]:
        """What is resident as it is stored."""
        yield from self._decode(part, self._encoded.raw(part.extent), layout, out)

    def _decode(
        self, part: Stored, raw: Tensor, layout: LayerLayout, out: Outputs, *, of_reader: bool = False
    ) -> Iterator[Loaded]:
        extent = part.extent
        with self._staged([raw], of_reader=of_reader) as (staged,):
            place = out(part)
            scratch = self._decoded.block(extent, layout) if place is None else None
            block = self._store.decode(extent, staged, place or scratch)
            self._check_block(extent, layout, block)
            if scratch is not None:
                self._decoded.used(block)
            yield Loaded(part.start, part.row_map, block)

    def _look_up(self, extents: Sequence[Extent]) -> Generator[tuple[Extent, Tensor], None, None]:
        """What a store has in memory."""
        for extent in extents:
            raw = self._store.read(extent)
            check_raw(self._strategy, extent, raw)
            yield extent, raw

    def _on_device(self, part: Loaded) -> Iterator[Loaded]:
        """A resident block where attention can use it."""
        with self._staged([part.block.keys, part.block.values]) as (keys, values):
            yield Loaded(part.start, part.row_map, KVBlock(keys, values))

    @contextmanager
    def _staged(self, tensors: Sequence[Tensor], *, of_reader: bool = False) -> Iterator[Sequence[Tensor]]:
        """Tensors on the device: they themselves, unless they are somewhere else."""
        if self._staging is None or tensors[0].device == self._device:
            yield tensors
            return
        with self._staging.copy(tensors) as staged:
            if of_reader and self._reader is not None:
                self._reader.in_use_until(staged.wait_until_copied)
            yield staged.tensors

    def _check_block(self, extent: Extent, layout: LayerLayout, block: KVBlock) -> None:
        shape = (extent.rows, layout.kv_heads, extent.tokens)
        for name, tensor, size in (("keys", block.keys, layout.key_size), ("values", block.values, layout.value_size)):
            if tensor.shape != (*shape, size) or tensor.dtype != layout.dtype:
                raise StoreContractError(
                    f"KV store '{self._strategy}': decode() of {extent} gave {name} {tuple(tensor.shape)} "
                    f"{tensor.dtype}, expected {(*shape, size)} {layout.dtype}."
                )


def _is_cold(tiers: Sequence[Residency | EncodedResidency], extent: Extent) -> bool:
    return not any(tier.holds(extent) for tier in tiers)


def _has_same_rows(part: Stored, other: Stored) -> bool:
    return part.row_map is other.row_map


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
