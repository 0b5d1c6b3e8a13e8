"""Results whose gradient is not known here: they go on as they are, and whoever asks for a gradient gets an error."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Refused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, result: Tensor, source: Tensor, error: Exception) -> Tensor:
        ctx.error = error
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise ctx.error


def refuse_gradient(result: Tensor, source: Tensor, error: Exception) -> Tensor:
    """The result, of which a gradient that goes back to `source` is an error instead of being left out."""
    if not (torch.is_grad_enabled() and source.requires_grad):
        return result
    refused: Tensor = _Refused.apply(result, source, error)  # type: ignore[no-untyped-call]
    return refused
