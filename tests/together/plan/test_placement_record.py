"""What a placement says of itself."""

from __future__ import annotations

import pytest

from ollm.contracts.offload import Tier
from ollm.plan.placement import PlacementPlan, PlacementRecord

GIB = 2**30


@pytest.mark.parametrize(
    ("policy", "resident", "expected"),
    [
        (
            ("auto", "interleaved"), (0, 1, 2, 5),
            "6 layers, placed by auto (here interleaved): 4 in host memory, 2 read from disk; in memory: 0 to 2, 5. "
            "4.0 GiB stay in memory, 2.0 GiB are read for every forward pass.",
        ),
        (
            ("prefix", "prefix"), (),
            "6 layers, placed by prefix: 6 read from disk. "
            "0 B stay in memory, 6.0 GiB are read for every forward pass.",
        ),
        (
            ("fit", "fit"), tuple(range(6)),
            "6 layers, placed by fit: 6 in host memory. 6.0 GiB stay in memory, 0 B are read for every forward pass.",
        ),
    ],
)  # fmt: skip
def test_it_reads_well(policy, resident, expected):
    tiers = tuple(Tier.HOST if index in resident else Tier.DISK for index in range(6))
    plan = PlacementPlan(
        target="cpu", requested_policy=policy[0], resolved_policy=policy[1], requested_layers=len(resident), tiers=tiers
    )
    record = PlacementRecord.of(plan, [GIB] * 6, tiers, (6 - len(resident)) * GIB)
    assert str(record) == expected
    assert f"applied_layers={len(resident)}" in repr(record)
