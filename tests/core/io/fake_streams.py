"""Streams that only write down what they are told, to test the order of copies and kernels without an accelerator."""

from __future__ import annotations

import itertools
from contextlib import contextmanager


class FakeEvent:
    def __init__(self, log, name):
        self.log, self.name = log, name

    def synchronize(self):
        self.log.append(f"host waits for {self.name}")


class FakeStream:
    def __init__(self, log, name):
        self.log, self.name, self.count = log, name, itertools.count(1)

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for {event.name}")

    def record_event(self):
        event = FakeEvent(self.log, f"{self.name} {next(self.count)}")
        self.log.append(f"record {event.name}")
        return event


class FakeStreams:
    def __init__(self):
        self.log = []
        self.copying = FakeStream(self.log, "copy")
        self._computing = FakeStream(self.log, "compute")

    def computing(self):
        return self._computing

    @contextmanager
    def on_copying(self):
        self.log.append("begin copy")
        yield
        self.log.append("end copy")
