"""The ids of what a cache holds: they follow what is done to it, and what is unknown is equal to anything."""

from __future__ import annotations

import torch

from ollm.kv.ids import UNKNOWN, TokenIds


def numbers(rows, tokens, start=0):
    return torch.arange(start, start + rows * tokens).reshape(rows, tokens)


def test_they_follow_appends_crops_and_rows():
    ids = TokenIds()
    text = numbers(2, 900)
    for part in text.split([1, 299, 600], dim=1):
        ids.append(part)
    assert torch.equal(ids.ids, text)
    fork = ids.fork()
    ids.crop(7)
    ids.select_rows(torch.tensor([1, 0, 1]))
    assert torch.equal(ids.ids, text[[1, 0, 1], :7])
    ids.append(numbers(3, 5, start=7000))
    assert torch.equal(ids.ids[:, 7:], numbers(3, 5, start=7000))
    assert torch.equal(fork.ids, text)
    ids.crop(0)
    ids.select_rows(torch.tensor([0]))
    ids.append(text[:1])  # another batch
    assert torch.equal(ids.ids, text[:1])


def test_the_first_difference_is_told_by_position_then_row():
    ids = TokenIds()
    assert ids.first_difference(numbers(2, 9)) is None
    ids.append(numbers(2, 9))
    assert ids.first_difference(numbers(2, 9)[:, :4]) is None
    other = torch.cat([numbers(2, 9), numbers(2, 3)], dim=1)
    assert ids.first_difference(other) is None
    other[0, 8] = other[1, 5] = 77
    assert ids.first_difference(other) == (5, 1)


def test_what_nobody_said_is_unknown():
    ids = TokenIds()
    ids.fill(2, 3, torch.device("cpu"))
    ids.append(numbers(2, 2))
    ids.fill(2, 5, torch.device("cpu"))
    assert torch.equal(ids.ids, torch.cat([torch.full((2, 3), UNKNOWN), numbers(2, 2)], dim=1))
    assert ids.first_difference(torch.cat([numbers(2, 3, start=50), numbers(2, 2)], dim=1)) is None
    assert ids.first_difference(torch.cat([numbers(2, 3, start=50), numbers(2, 2) + 1], dim=1)) == (3, 0)


def test_they_go_on_outside_of_inference_mode():
    ids = TokenIds()
    with torch.inference_mode():
        ids.append(numbers(1, 3))
        ids.select_rows(torch.tensor([0]))
    ids.append(numbers(1, 3))
    assert torch.equal(ids.ids, torch.cat([numbers(1, 3), numbers(1, 3)], dim=1))
