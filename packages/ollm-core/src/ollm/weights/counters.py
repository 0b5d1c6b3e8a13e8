"""What reading weights cost so far."""

from __future__ import annotations

import attrs


@attrs.define
class WeightCounters:
    """Counters of one loaded model. Written by one thread at a time."""

    read_bytes: int = 0
    """Read from the model's files after it was loaded, for streamed layers and for those that became resident. Whole
    sectors of the disk, so a little more than the weights are."""
    wait_seconds: float = 0.0
    """Time for which layers waited to be read."""
    layers_entered: int = 0
    """Decoder layers that a forward pass entered, resident ones too."""
    layers_streamed: int = 0
    """Those of them that were read for it."""
