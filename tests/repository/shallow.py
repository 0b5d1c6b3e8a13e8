"""A plugin of pytest for children that run the kit over a store that passes it at depth elsewhere: what repeats itself
is tried a few times."""

from hypothesis import settings

settings.register_profile("shallow", max_examples=10, stateful_step_count=10, deadline=None)
settings.load_profile("shallow")
