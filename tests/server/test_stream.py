"""A stream of messages over connections that are cut: nothing is lost, nothing is read twice."""

from __future__ import annotations

from collections import deque
from copy import deepcopy
from typing import TypeAlias

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cloudexec._proto import tasks_pb2 as pb
from cloudexec._wire import stream as limits
from cloudexec._wire.stream import Stream

_End: TypeAlias = Stream[pb.ServerMessage]


class _Pair:
    """Two ends, and connections that lie between them, of which only the last one is written to.

    An old connection may still deliver what it holds, later than newer ones do: an end may read
    on what came over it. What it does not deliver is lost when it is dropped.
    """

    def __init__(self) -> None:
        self.ends: tuple[_End, _End] = (Stream(), Stream())
        self.written = [0, 0]
        self.read: tuple[list[int], list[int]] = ([], [])
        # By connection, oldest first: what is on its way from each end, as bytes.
        self.connections: list[tuple[deque[bytes], deque[bytes]]] = [(deque(), deque())]

    def write(self, end: int) -> None:
        """Send a message that must arrive; it says how many were sent before."""
        message = pb.ServerMessage(output_credit=self.written[end])
        self.written[end] += 1
        self.ends[end].stamp(message)
        self._put(end, message)

    def acknowledge(self, end: int) -> None:
        """Send what has come, and nothing else."""
        message = pb.ServerMessage()
        self.ends[end].acknowledge(message)
        self._put(end, message)

    def deliver(self, end: int, connection: int = -1) -> None:
        """Have an end read the next message that the other one wrote into a connection."""
        message = pb.ServerMessage.FromString(self.connections[connection][1 - end].popleft())
        if self.ends[end].take(message) and message.number:
            self.read[end].append(message.output_credit)

    def dial_again(self) -> None:
        """Open another connection: each end says what it has, and sends what the other lacks."""
        self.connections.append((deque(), deque()))
        for end in (0, 1):
            self.ends[end].arrived(self.ends[1 - end].received)
        for end in (0, 1):
            for message in self.ends[end].missing():
                self._put(end, message)

    def drop(self, connection: int) -> None:
        """Lose an old connection with what is on its way there."""
        del self.connections[connection]

    def _put(self, end: int, message: pb.ServerMessage) -> None:
        self.connections[-1][end].append(message.SerializeToString())

    def check(self) -> None:
        """Each end has read what the other wrote, from the first on, in order, and each once."""
        for end in (0, 1):
            assert self.read[end] == list(range(self.ends[end].received))
            kept = [message.output_credit for message in self.ends[1 - end].missing()]
            # All that was not read is still there to be sent again.
            assert kept == list(range(self.written[1 - end] - len(kept), self.written[1 - end]))
            assert len(self.read[end]) + len(kept) >= self.written[1 - end]

    def settle(self) -> None:
        """Have the connection that there is deliver everything, and both ends acknowledge."""
        for _ in range(2):
            for end in (0, 1):
                while self.connections[-1][1 - end]:
                    self.deliver(end)
            for end in (0, 1):
                self.acknowledge(end)
        self.check()
        assert [len(each) for each in self.read] == [self.written[1], self.written[0]]
        for end in self.ends:
            assert end.is_clear
            assert not end.owes


class CutStream(RuleBasedStateMachine):
    """Messages of both ends over connections that are delayed, replaced and lost at random."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = _Pair()

    @rule(end=st.sampled_from([0, 1]), count=st.integers(1, 40))
    def write(self, end: int, count: int) -> None:
        for _ in range(count):
            self.pair.write(end)

    @rule(end=st.sampled_from([0, 1]))
    def acknowledge(self, end: int) -> None:
        self.pair.acknowledge(end)

    @rule(end=st.sampled_from([0, 1]), where=st.integers(0, 3), count=st.integers(1, 50))
    def deliver(self, end: int, where: int, count: int) -> None:
        connection = where % len(self.pair.connections)
        for _ in range(min(count, len(self.pair.connections[connection][1 - end]))):
            self.pair.deliver(end, connection)

    @rule()
    def dial_again(self) -> None:
        self.pair.dial_again()

    @precondition(lambda self: len(self.pair.connections) > 1)
    @rule(where=st.integers(0, 3))
    def drop(self, where: int) -> None:
        self.pair.drop(where % (len(self.pair.connections) - 1))

    @invariant()
    def nothing_is_lost_or_doubled(self) -> None:
        self.pair.check()

    def teardown(self) -> None:
        self.pair.settle()


TestCutStream = CutStream.TestCase
TestCutStream.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_every_interleaving_of_a_few_steps_loses_and_doubles_nothing() -> None:
    """All orders of writing, acknowledging, reading from old and new connections, and cuts."""
    seen = 0

    def explore(pair: _Pair, steps: int, cuts: int, writes: int) -> None:
        nonlocal seen
        pair.check()
        if not steps:
            pair.settle()
            seen += 1
            return
        for end in (0, 1):
            if writes:
                branch = deepcopy(pair)
                branch.write(end)
                explore(branch, steps - 1, cuts, writes - 1)
            for connection in range(len(pair.connections)):
                if pair.connections[connection][1 - end]:
                    branch = deepcopy(pair)
                    branch.deliver(end, connection)
                    explore(branch, steps - 1, cuts, writes)
        if pair.ends[1].owes:
            branch = deepcopy(pair)
            branch.acknowledge(1)
            explore(branch, steps - 1, cuts, writes)
        if cuts:
            branch = deepcopy(pair)
            branch.dial_again()
            explore(branch, steps - 1, cuts - 1, writes)

    explore(_Pair(), steps=6, cuts=2, writes=3)
    assert seen > 1000


def test_a_message_that_leaves_a_gap_is_refused() -> None:
    """One that was never sent again must not pass for the next one."""
    end: _End = Stream()
    assert end.take(pb.ServerMessage(number=1))
    with pytest.raises(ValueError, match="message 3 behind message 1"):
        end.take(pb.ServerMessage(number=3))
    assert end.received == 1


def test_an_acknowledgement_of_what_was_never_sent_is_refused() -> None:
    """Nothing that is kept is given up for it."""
    end: _End = Stream()
    end.stamp(pb.ServerMessage())
    with pytest.raises(ValueError, match="2 messages are said to have arrived, of 1"):
        end.take(pb.ServerMessage(received=2))
    assert [message.number for message in end.missing()] == [1]


@pytest.mark.parametrize(("limit", "value"), [("_MOST_KEPT", 5), ("_MOST_KEPT_BYTES", 500)])
def test_what_is_kept_for_a_peer_that_acknowledges_nothing_is_bounded(
    limit: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message that would be too much is not numbered; an acknowledgement makes room again."""
    monkeypatch.setattr(limits, limit, value)
    end: _End = Stream()
    for _ in range(5):
        end.stamp(pb.ServerMessage(forget_functions=range(100)))
    with pytest.raises(ValueError, match=r"5 messages, [0-9]+ bytes, were not acknowledged"):
        end.stamp(pb.ServerMessage())
    end.arrived(1)
    message = pb.ServerMessage()
    end.stamp(message)
    assert message.number == 6


def test_an_acknowledgement_waits_a_moment_unless_many_messages_wait_for_it() -> None:
    """A few may be acknowledged along with an answer; the peer keeps many for nothing."""
    end: _End = Stream()
    pauses = [end.acknowledge_within]
    for number in range(1, 33):
        end.take(pb.ServerMessage(number=number))
        pauses.append(end.acknowledge_within)
    assert pauses == [None, *[0.1] * 31, 0.0]
    end.acknowledge(pb.ServerMessage())
    assert end.acknowledge_within is None
