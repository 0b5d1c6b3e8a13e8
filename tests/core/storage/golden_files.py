"""The files of a store as text that can be kept and compared: what is not zero, with its place."""

from __future__ import annotations

from pathlib import Path

import torch


def small_block(tokens, start, *, rows=1):
    """Keys and values of whole numbers, of two heads of four and two elements."""
    keys = torch.arange(start, start + rows * 2 * tokens * 4, dtype=torch.float32).reshape(rows, 2, tokens, 4)
    return keys, -keys[..., :2]


def listing(folder: Path) -> str:
    """Every segment: its length, and 32 bytes in a line where they are not all zero."""
    lines = []
    for path in sorted(folder.glob("segment-*")):
        content = path.read_bytes()
        lines.append(f"{path.name} {len(content)}")
        for at in range(0, len(content), 32):
            piece = content[at : at + 32]
            if any(piece):
                lines.append(f"{at:08x} {piece.hex()}")
    return "\n".join(lines) + "\n"


def check_golden(store, golden: Path) -> None:
    """What the store has on disk is what was written down once."""
    store.storage.flush()
    ours = listing(store.storage.path)
    store.close()
    assert ours == golden.read_text(encoding="ascii")


def fix_store_id(monkeypatch) -> None:
    """The only bytes of a record that are drawn at random."""
    monkeypatch.setattr("ollm.storage.segments.secrets.token_bytes", lambda count: bytes(range(count)))
