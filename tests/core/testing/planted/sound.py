"""A store with a file format of its own, one over a storage, and two that keep everything in memory: sound, and easily
broken.

One file for all layers; each record is a header, with hashes of what it is and of what follows, and raw keys and
values.
"""

from __future__ import annotations

import itertools
import os
import struct
from contextlib import suppress

import attrs
import torch
import xxhash

from ollm.plugin import (
    CorruptDataError,
    Extent,
    KVBlock,
    KVStore,
    Location,
    SegmentedStore,
    StorageError,
    StoreStats,
    pack,
    unpack,
)

HEADER = struct.Struct("<QQ")
BLOCK = 4096


class MemoryStore(KVStore):
    """Bytes in a dict."""

    in_memory = True

    def __init__(self, window=None):
        self.raw, self.window, self.serial = {}, window, itertools.count()

    def write(self, block, key):
        raw = pack(block)
        location = Location(raw.numel(), offset=next(self.serial))
        self.raw[location] = raw
        return location

    def read(self, extent):
        return self.raw[extent.location]

    def decode(self, extent, raw, out):
        return unpack(extent, raw)

    def free(self, locations):
        for location in locations:
            del self.raw[location]

    def stats(self):
        return StoreStats(memory_bytes=sum(raw.numel() for raw in self.raw.values()))


class RoundingStore(MemoryStore):
    """Lossy: keys and values in bfloat16, with a scale each, so that numbers are small."""

    def __init__(self, window=None):
        super().__init__(window)
        self.scales = {}

    def write(self, block, key):
        _ = block.layout  # whether they belong together
        if not (block.keys.isfinite().all() and block.values.isfinite().all()):
            raise StorageError("not finite")
        scales = [float(tensor.abs().max()) or 1.0 for tensor in (block.keys, block.values)]
        small = [
            (tensor.double() / scale).to(torch.bfloat16)
            for tensor, scale in zip((block.keys, block.values), scales, strict=True)
        ]
        location = super().write(KVBlock(*small), key)
        self.scales[location] = scales
        return location

    def decode(self, extent, raw, out):
        small = unpack(attrs.evolve(extent, layout=attrs.evolve(extent.layout, dtype=torch.bfloat16)), raw)
        keys, values = (tensor.to(extent.layout.dtype) for tensor in (small.keys, small.values))
        return KVBlock(keys, values, *self.scales[extent.location])


class PlainStore(SegmentedStore):
    """Over a storage of ollm's."""


class FileStore(KVStore):
    """Records in a file of the store's own, each where there is room first. Whoever comes next goes on with it."""

    def __init__(self, folder):
        self.folder, self.files, self.used = folder, {}, {}

    def write(self, block, key):
        payload = pack(block).numpy().tobytes()
        location = Location(len(payload), offset=self.place(key, self.size(len(payload))))
        self.keep(Extent.of(key, block.layout, location), payload)
        self.take(location)
        return location

    def place(self, key, size):
        """Where a record goes: into the first gap that is large enough, or behind all others."""
        at = 0
        for start, taken in sorted(self.used.items()):
            if start - at >= size:
                break
            at = start + taken
        return at

    def take(self, location):
        self.used[location.offset] = self.size(location.nbytes)

    def size(self, nbytes):
        return -(-(HEADER.size + nbytes) // BLOCK) * BLOCK

    def keep(self, extent, payload):
        record = self.header(extent, payload) + payload
        record += bytes(self.size(len(payload)) - len(record))
        try:
            self.pwrite(self.file(), record, extent.location.offset)
        except OSError as error:
            raise StorageError(f"cannot write {extent}: {error}") from error

    def header(self, extent, payload):
        return HEADER.pack(self.hash(self.identity(extent)), self.hash(payload))

    def identity(self, extent):
        return repr((extent.key, extent.layout)).encode()

    def hash(self, content):
        return xxhash.xxh3_64_intdigest(content)

    def file(self):
        if "all" not in self.files:
            self.files["all"] = self.folder.open_file("store-all.bin")
        return self.files["all"]

    def pwrite(self, fd, record, offset):
        done = 0
        while done < len(record):
            done += os.pwrite(fd, record[done:], offset + done)

    def read(self, extent):
        try:
            content = self.pread(self.file(), HEADER.size + extent.location.nbytes, extent.location.offset)
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

    def decode(self, extent, raw, out):
        return unpack(extent, raw)

    def free(self, locations):
        for location in locations:
            del self.used[location.offset]

    def adopt(self, extents):
        for extent in extents:
            self.take(extent.location)

    def close(self):
        for fd in self.files.values():
            with suppress(OSError):
                os.close(fd)
        self.files = {}
        try:
            self.folder.close()
        except OSError as error:
            raise StorageError(f"cannot close {self.folder.path}: {error}") from error

    def stats(self):
        return StoreStats(disk_bytes=max((start + size for start, size in self.used.items()), default=0))
