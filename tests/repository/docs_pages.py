"""Reading the pages of `docs/`: code blocks, and what the comment before each says is to be done with it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import attrs

_BLOCK = re.compile(
    r"(?P<comment>^<!--(?P<said>[^\n]*)-->\n)?^(?P<fence>`{3,}|:{3,})(?P<info>[^\n]*)\n(?P<code>.*?)^(?P=fence)\s*$",
    re.MULTILINE | re.DOTALL,
)
_SAID = re.compile(r"\s*(?P<verb>not run|file):\s*(?P<rest>\S.*?)\s*")
_PYTHON = re.compile(r"(\{code(-block)?\}\s*)?(python|py|python3|pycon)\b|\{(code|code-block|code-cell|doctest)\}\s*$")


@attrs.frozen
class Block:
    """One fenced block of a page."""

    page: Path
    line: int
    language: str
    code: str
    not_run: str | None
    """Why it is not run, if the page says so."""
    file: str | None
    """Where it is to be written, if the page says so."""

    @property
    def is_python(self) -> bool:
        return _PYTHON.match(self.language) is not None


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    for match in _BLOCK.finditer(text):
        said = _SAID.fullmatch(match["said"] or "")
        verb, rest = (said["verb"], said["rest"]) if said else (None, None)
        yield Block(
            page=page,
            line=text.count("\n", 0, match.start("code")),
            language=match["info"].strip(),
            code=match["code"],
            not_run=rest if verb == "not run" else None,
            file=rest if verb == "file" else None,
        )


def pages(docs: Path) -> list[Path]:
    """Every page, without what was built."""
    return sorted(path for path in docs.rglob("*.md") if "_build" not in path.parts)
