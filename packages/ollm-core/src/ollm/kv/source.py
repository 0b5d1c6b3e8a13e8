"""`BlockSource`: the stored keys and values of a cache, wherever they are: resident, read ahead, or on their way to a
device.

Joins residency, reader and device ring into one stream of blocks per layer. Knows nothing of rows beyond handing on
their maps, and nothing of when something is stored or dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager

import torch
from torch import Tensor

from ollm.attention.blockwise import Block
from ollm.contracts.blocks import Extent, KVBlock, Location
from ollm.contracts.kv import KVStore
from ollm.contracts.spill import SpillPlan
from ollm.errors import StoreContractError
from ollm.io.buffers import BufferPool
from ollm.io.device_ring import DeviceRing
from ollm.io.devices import is_accelerator
from ollm.io.scheduler import scheduler_of
from ollm.io.streams import CudaStreams
from ollm.kv.encoded import EncodedResidency, Scratch
from ollm.kv.parts import Part, PartReader
from ollm.kv.reader import BlockReader, Found, Run, check_raw
from ollm.kv.residency import Residency
from ollm.kv.route import Route, RoutePlanner
from ollm.kv.state import KVCounters
from ollm.kv.table import Entries, Entry, take
from ollm.storage.options import BUFFER_BYTES, DEVICE_BUFFERS

Following = Callable[[], Iterable[Entries]]
"""What will be wanted next, layer by layer, as far as one can tell; finite."""
Outputs = Callable[[Entry], KVBlock | None]
"""Where a decoder that computes may put an extent; `None` where a buffer must do."""


class BlockSource:
    """For one cache and its forks, and one thread."""

    def __init__(
        self,
        store: KVStore,
        plan: SpillPlan,
        *,
        strategy: str,
        layers: Sequence[int],
        lossless: bool,
        device: torch.device,
        counters: KVCounters,
    ) -> None:
        """Nothing is resident or read yet; arguments as of `KVSession`."""
        self._store = store
        self._strategy = strategy
        self._device = device
        self._counters = counters
        staged = is_accelerator(device)

        def share(budget: int) -> int:
            return budget // len(layers) if layers else 0

        keep = lossless and not store.in_memory
        host = Residency(share(plan.resident_bytes * keep), device=torch.device("cpu"), staged=staged)
        on_device = Residency(share(plan.resident_bytes_device * keep), device=device)
        self._tiers = (on_device, host) if staged else (host,)
        self._encoded = EncodedResidency(
            share(0 if lossless or store.in_memory else plan.resident_bytes), pinned=staged
        )
        self._routes = RoutePlanner(self._tiers, self._encoded, in_files=store.storage is not None)
        self._decoded = Scratch(device)
        self._reader: BlockReader | None = None
        self._ring: DeviceRing | None = None
        self._parts: PartReader | None = None
        ends = [self._routes.clear, *(tier.clear for tier in (*self._tiers, self._encoded)), self._decoded.close]
        self._ends: list[Callable[[], None]] = ends  # each may be called again; the last first
        with ExitStack() as undo:
            undo.callback(self.close)
            if staged:
                streams = CudaStreams(device)
                self._ring = DeviceRing("Staging buffers", device, BUFFER_BYTES, streams, count=DEVICE_BUFFERS)
                self._ends.append(self._ring.close)
            if not store.in_memory:
                buffers = BufferPool("Read buffers", plan.read_buffers, BUFFER_BYTES, pinned=staged)
                self._ends.append(buffers.close)
                if store.storage is None:
                    scheduler = scheduler_of(None)
                    self._ends.append(scheduler.release)
                submit = scheduler.submit if store.storage is None else store.storage.submit
                decoded = None
                if store.decodes_ahead and not staged:
                    decoded = BufferPool("Decoded blocks", plan.read_buffers, BUFFER_BYTES)
                    self._ends.append(decoded.close)
                self._reader = BlockReader(
                    store, submit, strategy=strategy, buffers=buffers, counters=counters, decoded=decoded
                )
                self._ends.append(self._reader.cancel)
            undo.pop_all()

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
        return sum(part.buffer_bytes for part in (self._reader, self._parts) if part) + self._decoded.nbytes

    def keep(self, extent: Extent, block: KVBlock) -> None:
        """Keep a copy of what was just stored, where there is room."""
        any(tier.offer(extent, block) for tier in self._tiers)

    def forget(self, locations: Sequence[Location]) -> None:
        """These are about to be freed: they are not resident any more, and nobody reads there."""
        for location in locations:
            for tier in (*self._tiers, self._encoded):
                tier.drop(location)
        if self._reader is not None:
            self._reader.forget(locations)

    def cancel_reads(self) -> None:
        """Give up what is read ahead; afterwards nothing is being read."""
        if self._reader is not None:
            self._reader.cancel()

    def blocks(
        self, entries: Entries, following: Following, out: Outputs = lambda entry: None
    ) -> Generator[Block, None, None]:
        """The keys and values of pinned entries of one layer, each block valid until the next is asked for.

        Not in order of position: what is resident comes between what must be read, so that the disk is busy meanwhile.

        Args:
            entries: what is wanted.
            following: what will be asked for next.
            out: where the result for an entry should be.
        """
        route = self._routes.route(entries)
        ready = [*map(self._on_device, route.resident), *(self._decode_resident(entry, out) for entry in route.encoded)]
        gaps, done = len(route.cold) + len(route.cut), 0
        with closing(self._cold(route, following, out)) as read:
            for index in range(1, gaps + 2):  # once more than there are, for `read` to come to its end
                due = index * len(ready) // (gaps + 1)
                for parts in ready[done:due]:
                    yield from parts
                done = due
                yield from next(read, ())

    def copy(self, entries: Entries, following: Following, keys: Tensor, values: Tensor) -> None:
        """Copy pinned entries, as the rows of today, to their positions in `keys` and `values`
        `[rows, kv_heads, tokens, size]`. What must be decoded is decoded there."""

        def out(entry: Entry) -> KVBlock | None:
            whole = entry.row_map is None and entry.extent.visible == entry.extent.key.tokens
            whole = whole and entry.extent.layout.dtype == keys.dtype
            span = slice(entry.start, entry.stop)
            return KVBlock(keys[:, :, span], values[:, :, span]) if whole else None

        for block in self.blocks(entries, following, out):
            span = slice(block.start, block.stop)
            for whole, part, scale in (
                (keys, block.keys, block.key_scale),
                (values, block.values, block.value_scale),
            ):
                target = whole[:, :, span]
                if target.data_ptr() != part.data_ptr():
                    target.copy_(take(part, block.row_map))
                if scale != 1.0:
                    target.mul_(scale)

    def tensors(self, entry: Entry, device: torch.device) -> tuple[Tensor, Tensor]:
        """Keys and values of a pinned entry, as the rows of today, as tensors of their own."""
        whole = KVBlock.empty(entry.extent.layout, entry.rows, entry.extent.visible, device=device)
        for block in self.blocks(Entries((entry,)), lambda: ()):
            span = slice(block.start - entry.start, block.stop - entry.start)
            whole.keys[:, :, span] = take(block.keys, block.row_map) * block.key_scale
            whole.values[:, :, span] = take(block.values, block.row_map) * block.value_scale
        return whole.keys, whole.values

    def close(self) -> None:
        """End all reading and forget what is resident. May be called until it has succeeded, and afterwards."""
        with ExitStack() as steps:  # from the last to the first; the next one is done even if one fails
            for end in self._ends:
                steps.callback(end)

    def _cold(self, route: Route, following: Following, out: Outputs) -> Generator[Iterator[Block], None, None]:
        """What must be read: for each run, or entry that is cut, its blocks."""

        def coming() -> Iterator[Run]:
            return (run for entries in following() for run in self._routes.route(entries).runs)

        for entry in route.cut:
            yield self._read_part(entry)
        raws = map(self._looked_up, route.runs) if self._reader is None else self._reader.read(route.runs, coming)
        try:
            for run, found in zip(route.cold, raws, strict=True):
                yield self._decoded_run(run, found, out)
        finally:
            if isinstance(raws, Generator):
                raws.close()

    def _decoded_run(self, run: Sequence[Entry], found: Sequence[Found], out: Outputs) -> Iterator[Block]:
        for entry, (raw, block) in zip(run, found, strict=True):
            self._encoded.offer(entry.extent, raw)
            yield from self._decode(entry, raw, out, of_reader=True) if block is None else self._seen(entry, block)

    def _decode_resident(self, entry: Entry, out: Outputs) -> Iterator[Block]:
        """What is resident as it is stored."""
        yield from self._decode(entry, self._encoded.raw(entry.extent), out)

    def _decode(self, entry: Entry, raw: Tensor, out: Outputs, *, of_reader: bool = False) -> Iterator[Block]:
        extent = entry.extent
        with self._staged([raw], of_reader=of_reader) as (staged,):
            place = out(entry)
            scratch = self._decoded.block(extent) if place is None else None
            block = self._store.decode(extent, staged, place or scratch)
            if scratch is not None:
                self._decoded.used(block)
            yield from self._seen(entry, block)

    def _seen(self, entry: Entry, block: KVBlock) -> Iterator[Block]:
        """What is visible of what a store made of an extent."""
        extent = entry.extent
        self._check_block(extent, block)
        seen = slice(0, extent.visible)
        whole = extent.visible == extent.key.tokens
        yield Block(
            entry.start,
            block.keys if whole else block.keys[:, :, seen],
            block.values if whole else block.values[:, :, seen],
            entry.row_map,
            block.key_scale,
            block.value_scale,
        )

    def _read_part(self, entry: Entry) -> Iterator[Block]:
        """Only what is visible of an extent."""
        if self._parts is None:
            assert self._store.storage is not None
            self._parts = PartReader(self._store.storage)
            self._ends.append(self._parts.close)
        extent = entry.extent
        (block,) = self._parts.read([Part(extent, range(extent.layout.kv_heads), range(extent.visible))])
        self._counters.loaded_bytes += block.keys.nbytes + block.values.nbytes
        yield from self._on_device(Block(entry.start, block.keys, block.values, entry.row_map))

    def _looked_up(self, run: Run) -> list[Found]:
        """What a store has in memory."""
        raws = [self._store.read(extent) for extent in run]
        for extent, raw in zip(run, raws, strict=True):
            check_raw(self._strategy, extent, raw)
        return [(raw, None) for raw in raws]

    def _on_device(self, block: Block) -> Iterator[Block]:
        """A block in memory where attention can use it."""
        with self._staged([block.keys, block.values]) as (keys, values):
            yield Block(block.start, keys, values, block.row_map)

    @contextmanager
    def _staged(self, tensors: Sequence[Tensor], *, of_reader: bool = False) -> Iterator[Sequence[Tensor]]:
        """Tensors on the device: they themselves, unless they are somewhere else."""
        if self._ring is None or tensors[0].device == self._device:
            yield tensors
            return
        with self._ring.copy(tensors) as copied:
            if of_reader and self._reader is not None:
                self._reader.in_use_until(copied.wait_until_copied)
            yield copied.tensors

    def _check_block(self, extent: Extent, block: KVBlock) -> None:
        layout, shape = extent.layout, (extent.key.rows, extent.layout.kv_heads, extent.key.tokens)
        for name, tensor, size in (("keys", block.keys, layout.key_size), ("values", block.values, layout.value_size)):
            if tensor.shape != (*shape, size) or tensor.dtype != layout.dtype:
                raise StoreContractError(
                    f"KV store '{self._strategy}': decode() of {extent} gave {name} {tuple(tensor.shape)} "
                    f"{tensor.dtype}, expected {(*shape, size)} {layout.dtype}."
                )
