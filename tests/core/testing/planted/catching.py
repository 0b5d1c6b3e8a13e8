"""Marks broken plugins with the test of the kit that is named for their bug."""

from __future__ import annotations


class Table(dict[str, tuple[str, str]]):
    """Names of test classes, each with its test (or several, joined by `|`) and what the failure says."""

    def caught_by(self, test, says):
        """Marks a test class as broken."""

        def mark(case):
            self[case.__name__] = (test, says)
            return case

        return mark
