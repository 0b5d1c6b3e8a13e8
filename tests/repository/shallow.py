"""A plugin of pytest for children that run the kit over a store that passes it at depth elsewhere: as often as an
author would, but with short programs of random operations; with `--hypothesis-profile=least` hardly at all."""

from hypothesis import settings

settings.register_profile("shallow", max_examples=100, stateful_step_count=5, deadline=None)
settings.register_profile("least", max_examples=10, stateful_step_count=5, deadline=None)
settings.load_profile("shallow")
