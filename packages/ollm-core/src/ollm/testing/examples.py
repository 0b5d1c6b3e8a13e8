"""How Hypothesis tries things in the kit: how many, and how deep, is its user's profile's business; nothing depends on
how fast the machine is.

Health checks judge whoever wrote a test, with a clock too, and their verdict is another on a busy machine. Authors of
plugins did not write these: they are told of nothing but their plugin.
"""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings


def unhurried(**more: Any) -> settings:
    """The settings of every test of the kit that uses Hypothesis: the profile's, without a clock."""
    return settings(deadline=None, suppress_health_check=list(HealthCheck), **more)
