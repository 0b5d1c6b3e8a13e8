"""A fake model whose layers are streamed, for tests of the streamer alone."""

from __future__ import annotations

import torch
from torch import nn

from core.weights.weight_files import write_shard
from ollm.contracts.offload import Tier
from ollm.weights.binding import LayerWeights
from ollm.weights.checkpoint import SINGLE, Checkpoint
from ollm.weights.layout import Parameter, Source
from ollm.weights.streamer import WeightStreamer

CPU = torch.device("cpu")
LAYERS, SIZE = 6, 40
X = torch.randn(3, SIZE, generator=torch.Generator().manual_seed(1))


class Decoder(nn.Module):
    """Layers one after the other; `between` is called before each."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(SIZE, SIZE) for _ in range(LAYERS))
        self.between = lambda index: None

    def forward(self, x, only=range(LAYERS)):
        for index in only:
            self.between(index)
            x = self.layers[index](x).tanh()
        return x


def make_truth():
    """The same weights in memory."""
    torch.manual_seed(0)
    return Decoder().requires_grad_(False)


def make_streamed(folder, truth):
    """A decoder without weights, and its streamer."""
    write_shard(folder / SINGLE, truth.state_dict())
    decoder = Decoder()
    checkpoint = Checkpoint.open(folder)
    layers = []
    for index, layer in enumerate(decoder.layers):
        stored = [checkpoint.tensors[f"layers.{index}.{name}"] for name in ("weight", "bias")]
        parameters = tuple(Parameter(one.name, one.dtype, one.shape, (Source(one),)) for one in stored)
        layers.append(LayerWeights(layer, parameters, (((layer, "weight"),), ((layer, "bias"),))))
    return decoder, WeightStreamer(decoder, layers, checkpoint, CPU, folder)


def tiers(*resident):
    return [Tier.DEVICE if index in resident else Tier.DISK for index in range(LAYERS)]
