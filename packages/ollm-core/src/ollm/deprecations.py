"""Everything that is deprecated, in one place, with what replaces it and when it goes. Knows nothing else.

A hook or a method that is to go works for at least two minor versions more. Until then `ollm plugins` shows a warning
beside each plugin that implements such a hook, and using a strategy that overrides such a method warns once. What goes
with a version is named after it: a test that turns `RemovedIn…Warning` into an error tells an author what to change.

- A hook: `@hookspec(warn_on_impl=RemovedIn03Warning("…"))` in `ollm.contracts.hookspecs`; an argument of a hook:
  `warn_on_impl_args`. Such warnings are collected when plugins are discovered.
- A method of a contract: a line in `METHODS`. What replaces it gets a default in the abstract class that calls the old
  one, so that stores and policies that have only the old one go on working.
"""

from __future__ import annotations

import warnings


class OllmDeprecationWarning(DeprecationWarning):
    """Base class of the warnings about what will go. Subclasses are named after the version in which it goes."""


METHODS: dict[tuple[type, str], OllmDeprecationWarning] = {}
"""Contract and name of each method that plugins should not override any more, and what to say. Nothing is deprecated
now."""


def warn_of_methods(built: object, what: str) -> None:
    """Warn of each deprecated method that `built`, made by the strategy `what`, overrides."""
    for (contract, name), warning in METHODS.items():
        if isinstance(built, contract) and getattr(type(built), name) is not getattr(contract, name):
            # not at the line that built it, which is ours: at the plugin's class
            warnings.warn(type(warning)(f"{what}: {type(built).__name__}.{name}: {warning}"), stacklevel=3)
