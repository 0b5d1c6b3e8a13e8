"""A store with a file format of its own, and two that keep everything in memory: sound, and easily broken.

One file per layer; each record is a header, with a hash of what follows, and raw keys and values.
"""

from __future__ import annotations

import itertools
import os
import struct
from contextlib import suppress

import attrs
import torch
import xxhash

from ollm.plugin import CorruptDataError, Extent, KVBlock, KVStore, LayerLayout, StorageError, StoreStats, unpack

HEADER = struct.Struct("<QQQQQQ")
BLOCK = 4096


class ListingStore(KVStore):
    """Keeps the lists; a subclass keeps the bytes under the number in `offset`, and gives them back."""

    def __init__(self):
        self.listed, self.layouts, self.serial = {}, {}, itertools.count()

    def append(self, layer, keys, values):
        layout = LayerLayout.of(keys, values)
        raw = torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for tensor in (keys, values)])
        before = self.extents(layer)
        start = before[-1].stop if before else 0
        extent = Extent(layer, start, keys.shape[2], keys.shape[0], raw.numel(), offset=self.number(raw.numel()))
        self.keep(extent, raw)
        self.layouts[layer] = layout
        self.listed[layer] = (*before, extent)

    def number(self, nbytes):
        return next(self.serial)

    def extents(self, layer):
        return self.listed.get(layer, ())

    def decode(self, extent, raw, out):
        return unpack(self.layouts[extent.layer], extent, raw)

    def truncate(self, layer, length):
        self.listed[layer] = tuple(extent for extent in self.extents(layer) if extent.stop <= length)

    def evict(self, layer, extents):
        self.listed[layer] = tuple(extent for extent in self.extents(layer) if extent not in extents)


class MemoryStore(ListingStore):
    """Bytes in a dict."""

    in_memory = True

    def __init__(self, window=None):
        super().__init__()
        self.raw, self.window = {}, window

    def keep(self, extent, raw):
        self.raw[extent] = raw

    def read(self, extent):
        return self.raw[extent]

    def release(self, extents):
        for extent in extents:
            self.raw.pop(extent, None)

    def stats(self):
        return StoreStats(memory_bytes=sum(raw.numel() for raw in self.raw.values()))


class RoundingStore(MemoryStore):
    """Lossy: keys and values in bfloat16, with a scale each, so that numbers are small."""

    def append(self, layer, keys, values):
        layout = LayerLayout.of(keys, values)
        if not (keys.isfinite().all() and values.isfinite().all()):
            raise StorageError("not finite")
        scales = [float(tensor.abs().max()) or 1.0 for tensor in (keys, values)]
        small = [
            (tensor.double() / scale).to(torch.bfloat16) for tensor, scale in zip((keys, values), scales, strict=True)
        ]
        super().append(layer, *small)
        self.layouts[layer] = layout
        self.scales = {**getattr(self, "scales", {}), self.listed[layer][-1]: scales}

    def decode(self, extent, raw, out):
        layout = self.layouts[extent.layer]
        block = unpack(attrs.evolve(layout, dtype=torch.bfloat16), extent, raw)
        keys, values = (tensor.to(layout.dtype) for tensor in (block.keys, block.values))
        return KVBlock(keys, values, *self.scales[extent])


class FileStore(ListingStore):
    """Records in files of the store's own. Space is used again once it was released."""

    def __init__(self, folder):
        super().__init__()
        self.folder, self.files, self.free, self.end = folder, {}, [], 0
        self.serials = {}

    def size(self, nbytes):
        return -(-(HEADER.size + nbytes) // BLOCK) * BLOCK

    def number(self, nbytes):
        """Where the record goes."""
        size = self.size(nbytes)
        place = next((place for place, room in self.free if room == size), None)
        return self.end if place is None else place

    def keep(self, extent, raw):
        payload = raw.numpy().tobytes()
        record = self.header(extent, payload) + payload
        record += bytes(self.size(len(payload)) - len(record))
        try:
            self.write(self.file(), record, extent.offset)
        except OSError as error:
            raise StorageError(f"cannot write {extent}: {error}") from error
        size = len(record)
        if (extent.offset, size) in self.free:
            self.free.remove((extent.offset, size))
        self.end = max(self.end, extent.offset + size)

    def header(self, extent, payload):
        return HEADER.pack(extent.layer, extent.start, extent.tokens, extent.rows, extent.nbytes, self.hash(payload))

    def hash(self, payload):
        return xxhash.xxh3_64_intdigest(payload)

    def file(self):
        if "all" not in self.files:
            self.files["all"] = self.folder.new_file("store-all.bin")
        return self.files["all"]

    def write(self, fd, record, offset):
        done = 0
        while done < len(record):
            done += os.pwrite(fd, record[done:], offset + done)

    def read(self, extent):
        try:
            content = self.pread(self.file(), HEADER.size + extent.nbytes, extent.offset)
        except OSError as error:
            raise StorageError(f"cannot read {extent}: {error}") from error
        header, payload = content[: HEADER.size], content[HEADER.size :]
        self.check(extent, header, payload)
        return torch.frombuffer(bytearray(payload), dtype=torch.uint8)

    def pread(self, fd, size, offset):
        content = os.pread(fd, size, offset)
        if len(content) < size:
            raise CorruptDataError("cut off")
        return content

    def check(self, extent, header, payload):
        if header != self.header(extent, payload):
            raise CorruptDataError(f"{extent} was damaged")

    def release(self, extents):
        self.free += [(extent.offset, self.size(extent.nbytes)) for extent in extents]

    def close(self):
        for fd in self.files.values():
            with suppress(OSError):
                os.close(fd)
        self.files = {}
        self.folder.remove()

    def stats(self):
        return StoreStats(disk_bytes=self.end)
