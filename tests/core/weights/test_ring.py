"""Reading layers ahead: what is read when, when a slot is used again, and what errors do. Reads wait at gates."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from core.interrupts import interrupted, lines_of, places
from ollm.errors import WeightsError
from ollm.io.scheduler import scheduler_of
from ollm.testing.processes import watchdog
from ollm.weights.counters import WeightCounters
from ollm.weights.ring import IN_FLIGHT, Ring


class FakeRead:
    """Writes its layer's number into the slot once its gate is open."""

    length = 10

    def __init__(self, log, layer, part):
        self.log, self.layer, self.part = log, layer, part
        self.gate = threading.Event()
        self.gate.set()
        self.error = None

    def into(self, buffer):
        self.log.began(self)
        assert self.gate.wait(20)
        if self.error is not None:
            raise self.error
        buffer[self.part] = self.layer

    def __str__(self):
        return f"tensor {self.layer}.{self.part}"


class Log:
    """Who began, in order; `wait_for` waits until so many have."""

    def __init__(self):
        self.reads = []
        self.running = self.most = 0
        self._changed = threading.Condition()

    def began(self, read):
        with self._changed:
            self.reads.append((read.layer, read.part))
            self._changed.notify_all()

    def wait_for(self, count):
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.reads) >= count, 20)
        return self.reads[:count]


@pytest.fixture
def scheduler(tmp_path):
    scheduler = scheduler_of(tmp_path)
    yield scheduler
    scheduler.release()


@pytest.fixture
def log():
    return Log()


def make(scheduler, log, *, layers=5, parts=2, slots=3, of=None):
    reads = {layer: [FakeRead(log, layer, part) for part in range(parts)] for layer in (of or range(layers))}
    buffers = [torch.full((parts,), -1) for _ in range(slots)]
    return Ring(reads, buffers, scheduler, WeightCounters()), reads, buffers


def test_layers_come_round_and_are_read_two_ahead(scheduler, log):
    ring, _, buffers = make(scheduler, log)
    for step in range(12):
        slot = ring.take(step % 5)
        assert buffers[slot].tolist() == [step % 5] * 2
        began = log.wait_for(2 * (step + 3))  # this one and the next two, and never more before the next is taken
        assert sorted(began[2 * step : 2 * step + 2]) == [(step % 5, 0), (step % 5, 1)]
        assert len(log.reads) == 2 * (step + 3)
    ring.close()
    assert len(log.reads) == 2 * 14
    assert ring._counters.read_bytes == 10 * 2 * 14


def test_a_slot_is_not_read_into_while_its_layer_computes(scheduler, log):
    ring, _, buffers = make(scheduler, log)
    slot = ring.take(0)
    log.wait_for(6)
    assert buffers[slot].tolist() == [0, 0]
    ring.release()
    log.wait_for(8)  # layer 3, in that slot
    ring.take(1)
    ring.take(2)
    assert ring.take(3) == slot
    ring.close()


def test_a_slow_read_of_a_later_layer_holds_up_nobody(scheduler, log):
    ring, reads, buffers = make(scheduler, log)
    reads[2][0].gate.clear()
    assert buffers[ring.take(0)].tolist() == [0, 0]
    assert buffers[ring.take(1)].tolist() == [1, 1]
    reads[2][0].gate.set()
    assert buffers[ring.take(2)].tolist() == [2, 2]
    ring.close()


def test_a_slot_is_reused_only_after_the_last_read_of_a_dropped_layer(scheduler, log):
    """A late read must not land in a slot that holds another layer by then."""
    ring, reads, buffers = make(scheduler, log, slots=2)
    reads[1][1].gate.clear()
    ring.take(0)
    log.wait_for(4)  # layer 1 is under way
    ring.release()
    threading.Timer(0, reads[1][1].gate.set).start()
    for _ in range(3):
        for layer in (3, 4, 0):
            assert buffers[ring.take(layer)].tolist() == [layer] * 2
    ring.close()


def test_only_a_few_requests_are_under_way(scheduler, log):
    ring, reads, _ = make(scheduler, log, parts=40)
    for part in reads[0]:
        part.gate.clear()
    taken = threading.Thread(target=ring.take, args=(0,))
    taken.start()
    assert log.wait_for(IN_FLIGHT) == [(0, part) for part in range(IN_FLIGHT)] or len(log.reads) == IN_FLIGHT
    reads[0][0].gate.set()
    log.wait_for(IN_FLIGHT + 1)  # one ended, so one began
    assert len(log.reads) == IN_FLIGHT + 1
    for part in reads[0]:
        part.gate.set()
    taken.join(20)
    ring.close()


def test_layers_may_be_any_in_any_order(scheduler, log):
    ring, _, buffers = make(scheduler, log, of=[1, 4, 6])
    for layer in [1, 4, 6, 1, 6, 6, 4, 1, 1, 4]:
        assert buffers[ring.take(layer)].tolist() == [layer] * 2
    ring.close()


def test_what_is_being_copied_from_is_not_overwritten(scheduler, log):
    ring, _, buffers = make(scheduler, log)
    slot = ring.take(0)
    copied, waiting = threading.Event(), threading.Event()

    def wait_until_copied():
        waiting.set()
        assert copied.wait(20)

    ring.release(wait_until_copied)
    assert waiting.wait(20)
    assert buffers[slot].tolist() == [0, 0]
    copied.set()
    ring.take(1)
    ring.take(2)
    assert ring.take(3) == slot
    ring.close()


@pytest.mark.parametrize("error", [OSError(5, "broken"), EOFError("cut short"), MemoryError(), KeyboardInterrupt()])
def test_an_error_comes_up_where_its_layer_is_taken_and_the_next_time_it_works(scheduler, log, error):
    ring, reads, buffers = make(scheduler, log)
    reads[2][1].error = error
    ring.take(0)
    ring.take(1)
    with pytest.raises(WeightsError, match=r"tensor 2\.1"):
        ring.take(2)
    reads[2][1].error = None
    for layer in (2, 3, 4, 0):
        assert buffers[ring.take(layer)].tolist() == [layer] * 2
    ring.close()


def test_an_abandoned_ring_starts_nothing_and_waits_for_nothing(scheduler, log):
    ring, reads, _ = make(scheduler, log)
    reads[1][0].gate.clear()
    ring.take(0)
    log.wait_for(6)
    ring.abandon()
    reads[1][0].gate.set()
    ring.close()
    assert len(log.reads) == 6


def test_after_closing_nothing_is_read(scheduler, log):
    ring, _, _ = make(scheduler, log)
    ring.take(0)
    ring.close()
    ring.close()
    assert not ring._flying


def test_there_are_as_many_requests_as_threads():
    from ollm.io.scheduler import WORKERS

    assert IN_FLIGHT == WORKERS


def test_an_interrupt_anywhere_leaves_a_ring_that_goes_on_and_ends(scheduler, log):
    """Wherever Ctrl-C comes in `take`, `release` or `close`."""

    def use(ring):
        for layer in (0, 1, 2, 4, 0):
            ring.take(layer)
        ring.close()

    count = lines_of(lambda: use(make(scheduler, log)[0]))
    for at in places(count):
        ring, _, buffers = make(scheduler, log)
        with watchdog(20):
            where = interrupted(lambda ring=ring: use(ring), at)
            for layer in (0, 1, 2, 3, 4, 0, 1):
                assert buffers[ring.take(layer)].tolist() == [layer] * 2, where
            ring.close()
        assert not ring._flying, where


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", range(6))
def test_an_interrupt_while_a_read_is_asked_for_comes_up_and_loses_no_slot(scheduler, log, monkeypatch, at, after):
    """Also if it comes when a worker has the request already."""
    ring, _, buffers = make(scheduler, log)
    submit, calls = scheduler.submit, iter(range(10**6))

    def interrupting(action, request):
        if next(calls) != at:
            return submit(action, request)
        if after:
            submit(action, request)
            while request._turn:  # until a worker has it
                time.sleep(0)
        raise KeyboardInterrupt

    with watchdog(30):
        with monkeypatch.context() as patch:
            patch.setattr(scheduler, "submit", interrupting)
            with pytest.raises(KeyboardInterrupt):
                for layer in range(5):
                    ring.take(layer)
        for layer in (2, 3, 4, 0, 1):
            assert buffers[ring.take(layer)].tolist() == [layer] * 2
        ring.close()
    assert not ring._flying


def test_a_slot_that_is_read_into_by_an_interrupted_request_is_given_to_nobody(scheduler, log, monkeypatch):
    ring, reads, buffers = make(scheduler, log)
    reads[1][1].gate.clear()
    submit, asked = scheduler.submit, []

    def interrupting(action, request):
        submit(action, request)
        if request.read is reads[1][1] and not asked:
            asked.append(request)
            while request._turn:  # until a worker has it
                time.sleep(0)
            raise KeyboardInterrupt

    monkeypatch.setattr(scheduler, "submit", interrupting)
    with watchdog(30):
        with pytest.raises(KeyboardInterrupt):
            ring.take(0)
        taken = {layer: ring.take(layer) for layer in (3,)}
        reads[1][1].gate.set()
        while asked[0] in ring._flying:
            time.sleep(0)
        assert [buffers[slot].tolist() for slot in taken.values()] == [[3, 3]]
        ring.close()


def test_without_a_thread_a_layer_is_an_error_and_the_next_time_it_works(tmp_path, log, no_new_threads, workers):
    scheduler = scheduler_of(tmp_path)
    ring, _, buffers = make(scheduler, log)
    with no_new_threads():
        for _ in range(5):
            with pytest.raises(WeightsError, match=r"tensor 0\.0: No thread .*ulimit"):
                ring.take(0)
    for layer in (0, 1, 2, 3):
        assert buffers[ring.take(layer)].tolist() == [layer] * 2
    ring.close()
    scheduler.release()
