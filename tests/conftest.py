"""Profiles of Hypothesis: `make test` is quick, `make nightly` looks longer."""

from hypothesis import settings

settings.register_profile("quick", max_examples=80, stateful_step_count=15, deadline=None)
settings.register_profile("nightly", max_examples=2000, stateful_step_count=40, deadline=None)
settings.load_profile("quick")
