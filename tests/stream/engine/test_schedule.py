"""The rules of the scheduler, as properties of any order of events; no model, no tensor."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sinks.errors import InvalidInput, QueueFull
from sinks.stream.engine.schedule import LEAST, Scheduler

EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(0, 5), st.integers(0, 300), st.integers(0, 6)),
        st.tuples(st.just("cancel"), st.integers(0, 30)),
        st.tuples(st.just("leave"), st.integers(0, 5)),
        st.tuples(st.just("turn")),
    ),
    max_size=60,
)


class World:
    """Requests with so much to read and to write, driven by a scheduler; checks every turn."""

    def __init__(self, slots: int, queue: int, chunk: int, parks: bool = False) -> None:
        self.scheduler = Scheduler(slots, queue, chunk, parks)
        self.sitting: set[int] = set()
        self.stream: dict[int, int] = {}
        self.unread: dict[int, int] = {}
        self.unwritten: dict[int, int] = {}
        self.admitted: list[int] = []
        self.over: set[int] = set()
        self.last_read: dict[int, int] = {}
        self.turns = 0

    def submit(self, stream: int, tokens: int, answer: int) -> None:
        number = len(self.stream)
        try:
            self.scheduler.submit(number, stream)
        except QueueFull:
            assert self.scheduler.waiting == self.scheduler.queue
            return
        assert self.scheduler.waiting <= self.scheduler.queue
        self.stream[number], self.unread[number], self.unwritten[number] = stream, tokens, answer

    def finish(self, request: int) -> None:
        self.scheduler.finish(request)
        self.over.add(request)

    def leave(self, stream: int) -> None:
        if not self.scheduler.busy(stream):
            self.scheduler.leave(stream)
            self.sitting.discard(stream)

    def turn(self) -> bool:
        admitted = self.scheduler.admit()
        for stream in list(self.scheduler.parting):
            assert stream in self.sitting and self.scheduler.parks
            assert stream not in {self.stream[n] for n in self.admitted if n not in self.over}, "nobody who works"
            self.sitting.remove(stream)
            self.scheduler.parted(stream)
        for request in admitted:
            self.sitting.add(self.stream[request])
            earlier = [n for n in self.stream if n < request and self.stream[n] == self.stream[request]]
            assert all(n in self.over for n in earlier), "a stream's requests run one after another, in order"
            self.admitted.append(request)
            self.scheduler.begin(request, self.unread[request])
            self.last_read[request] = self.turns
        assert self.sitting == self.scheduler.held and len(self.sitting) <= self.scheduler.slots
        running = [n for n in self.admitted if n not in self.over]
        streams = [self.stream[n] for n in running]
        assert len(set(streams)) == len(streams) and set(streams) <= self.scheduler.held
        readers = [n for n in running if self.unread[n]]
        turn = self.scheduler.turn(lambda _: True)
        self.turns += 1
        assert set(turn.writers) == set(running) - set(readers), "every writer writes at every turn"
        self.check_reads(readers, turn.reads)
        for request in turn.writers:
            self.unwritten[request] -= 1
            if self.unwritten[request] <= 0:
                self.finish(request)
        return not turn.idle

    def check_reads(self, readers: list[int], reads: tuple[tuple[int, int], ...]) -> None:
        chunk = self.scheduler.chunk
        assert sum(count for _, count in reads) <= chunk
        assert len(reads) <= 1 + chunk // LEAST
        assert bool(reads) == bool(readers)
        assert len({request for request, _ in reads}) == len(reads)
        for request, count in reads:
            assert 0 < count <= self.unread[request]
            self.unread[request] -= count
            self.last_read[request] = self.turns
        for request in readers:
            assert self.turns - self.last_read[request] <= self.scheduler.slots, "nobody is passed over for ever"


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.sampled_from([1, 7, 64, 200]), EVENTS, st.booleans())
def test_any_order_of_events_keeps_the_rules_and_everybody_comes_to_an_end(slots, queue, chunk, events, parks):
    """Where streams at rest are put away, none has to leave for all to come to an end."""
    world = World(slots, queue, chunk, parks)
    for event in events:
        if event[0] == "submit":
            world.submit(*event[1:])
        elif event[0] == "cancel" and event[1] in world.stream:
            world.finish(event[1])
        elif event[0] == "leave":
            world.leave(event[1])
        elif event[0] == "turn":
            world.turn()
    bound = sum(world.unread.values()) + sum(world.unwritten.values()) + 2 * len(world.stream) + 2
    for _ in range(bound):
        world.turn()
        for stream in () if parks else set(world.stream.values()):
            world.leave(stream)
    assert world.over == set(world.stream), "nobody starves"
    for stream in set(world.stream.values()):
        world.leave(stream)
    assert not world.scheduler.waiting and not world.scheduler.running and not world.scheduler.held


@given(st.lists(st.integers(0, 40), min_size=1, max_size=20), st.integers(1, 4))
def test_new_streams_are_admitted_in_order(streams, slots):
    world = World(slots, queue=20, chunk=8)
    for number in range(len(streams)):
        world.submit(number, streams[number], 1)
    while world.turn():
        for stream in range(len(streams)):
            world.leave(stream)
    assert world.admitted == sorted(world.admitted) and len(world.over) == len(streams)


def test_the_stream_that_rested_longest_is_put_away_first_one_that_nobody_asks():
    scheduler = Scheduler(slots=3, queue=9, chunk=8, parks=True)
    for stream in (0, 1, 2):
        scheduler.submit(stream, stream)
    for request in scheduler.admit():
        scheduler.begin(request, 0)
    for request in (1, 0, 2):
        scheduler.finish(request)
    scheduler.submit(3, 3)  # finds 1 at rest for longest, but somebody asks that
    scheduler.submit(4, 1)
    assert scheduler.admit() == (3, 4) and list(scheduler.parting) == [0]
    scheduler.parted(0)
    scheduler.submit(5, 0)
    scheduler.submit(6, 2)
    assert scheduler.admit() == (3, 4, 5), "a request for a stream that lost its slot waits in its turn"
    assert scheduler.held == {0, 1, 3} and list(scheduler.parting) == [2]


def test_a_request_behind_a_busy_stream_holds_up_nobody():
    scheduler = Scheduler(slots=2, queue=9, chunk=8)
    for request, stream in enumerate([0, 0, 0, 1]):
        scheduler.submit(request, stream)
    assert scheduler.admit() == (0, 3) == scheduler.admit()
    scheduler.begin(3, 1)
    scheduler.finish(0)
    assert scheduler.admit() == (1,) and scheduler.waiting == 1


def test_a_reserved_stream_keeps_its_requests_waiting():
    scheduler = Scheduler(slots=2, queue=9, chunk=8)
    scheduler.reserve(7, 0)
    scheduler.submit(8, 0)
    assert scheduler.admit() == () and scheduler.busy(0)
    scheduler.finish(7)
    assert scheduler.admit() == (8,)


def test_who_may_not_write_is_left_out():
    scheduler = Scheduler(slots=2, queue=9, chunk=8)
    for request in (0, 1):
        scheduler.submit(request, request)
    for request in scheduler.admit():
        scheduler.begin(request, 0)
    assert scheduler.turn(lambda request: request == 1).writers == (1,)


def test_what_is_left_of_a_chunk_goes_to_the_next():
    scheduler = Scheduler(slots=4, queue=9, chunk=100)
    for request, tokens in enumerate([40, 500, 500, 10]):
        scheduler.submit(request, request)
        assert scheduler.admit() == (request,)
        scheduler.begin(request, tokens)
    assert scheduler.turn(bool).reads == ((0, 40), (1, 60))
    assert scheduler.turn(bool).reads == ((2, 100),)
    assert scheduler.turn(bool).reads == ((3, 10), (1, 68))


@pytest.mark.parametrize("wrong", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (1.5, 1, 1)])
@pytest.mark.usefixtures("unchecked")
def test_sizes_are_whole_and_positive(wrong):
    with pytest.raises(InvalidInput):
        Scheduler(*wrong)
