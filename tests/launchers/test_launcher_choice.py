"""Which of several launchers starts a worker, without any worker."""

from __future__ import annotations

import pytest

from cloudexec import ConfigError, WorkerCapacity
from cloudexec._launchers.base import LaunchEnd, Launcher, LaunchRequest, Network
from cloudexec._launchers.choice import Candidate, Choice, Launched

GIB = 1 << 30


class Sized(Launcher):
    """Says which workers it has, and starts none."""

    def __init__(self, *sizes: WorkerCapacity, one_machine: bool = False) -> None:
        self.sizes = sizes
        self.one_machine = one_machine
        self.size_count = len(sizes) or 1

    def capacity(self, size: int) -> WorkerCapacity | None:
        return self.sizes[size] if self.sizes else None

    def size_for(self, cpus: float, memory: int, gpus: int) -> int:
        for size, each in enumerate(self.sizes):
            if each.cpus >= cpus and each.memory >= memory and each.gpus >= gpus:
                return size
        raise ConfigError("too much")


def capacity(cpus: float, gib: int = 1, gpus: int = 0) -> WorkerCapacity:
    return WorkerCapacity(cpus=cpus, memory=gib * GIB, gpus=gpus)


def choice_of(*launchers: Sized, limits: tuple[int | None, ...] = ()) -> Choice:
    """The launchers a, b and so on, which have been started."""
    candidates = [
        Candidate(
            each,
            chr(ord("a") + number),
            limits[number] if limits else None,
            network=Network(),
            usable=True,
        )
        for number, each in enumerate(launchers)
    ]
    return Choice(candidates, return_after=600.0)


def planned(choice: Choice, count: int, now: float, size: int = 0) -> list[tuple[str, int]]:
    """Plan workers; return the launchers with how many of them each has to start."""
    requests = [LaunchRequest(str(n), 1, size) for n in range(1, count + 1)]
    plan = choice.plan(requests, now)
    assert [each for _, some in plan for each in some] == requests
    return [("none" if each is None else each.name, len(some)) for each, some in plan]


def launched(choice: Choice, name: str, asked_at: float = 0.0, number: int = 1) -> Launched:
    candidate = next(each for each in choice.candidates if each.name == name)
    worker = Launched(candidate, LaunchRequest(str(number), 1, 0), asked_at)
    candidate.active[worker.request.launch_id] = worker
    return worker


def test_the_first_launcher_is_preferred_until_it_fails_and_again_after_a_while() -> None:
    choice = choice_of(Sized(), Sized())
    assert planned(choice, 3, now=0.0) == [("a", 3)]
    end, news = choice.ended(launched(choice, "a"), LaunchEnd("wolves"), now=1.0)
    assert end == LaunchEnd("a: wolves; b is tried instead", reclaimed=True)
    assert news.startswith("a cannot start workers; for 600 s, new ones come from b")
    assert planned(choice, 3, now=600.0) == [("b", 3)]
    assert planned(choice, 3, now=601.0) == [("a", 3)]


def test_it_is_said_once_that_a_launcher_fails() -> None:
    choice = choice_of(Sized(), Sized())
    said = [
        choice.ended(launched(choice, "a"), LaunchEnd("wolves"), now=n)[1] for n in (1.0, 2.0, 3.0)
    ]
    assert [bool(each) for each in said] == [True, False, False]


def test_if_all_have_failed_the_executor_is_told_and_all_are_tried_again() -> None:
    choice = choice_of(Sized(), Sized())
    choice.ended(launched(choice, "a"), LaunchEnd("wolves", fatal=True), now=1.0)
    end, news = choice.ended(launched(choice, "b"), LaunchEnd("bears"), now=2.0)
    assert (end, news) == (LaunchEnd("a: wolves; b: bears"), "")
    choice.forgive([LaunchRequest("1", 1, 0)], now=3.0)
    assert planned(choice, 1, now=3.0) == [("a", 1)]
    choice.ended(launched(choice, "a"), LaunchEnd("wolves", fatal=True), now=4.0)
    assert planned(choice, 1, now=5.0) == [("b", 1)]
    end, _ = choice.ended(launched(choice, "b"), LaunchEnd("bears", fatal=True), now=6.0)
    assert end.fatal, "no launcher says that trying again may help"


def test_a_launcher_without_room_hands_on_what_is_too_much_for_it() -> None:
    choice = choice_of(Sized(), Sized(), Sized(), limits=(2, None, None))
    launched(choice, "a")
    assert planned(choice, 3, now=0.0) == [("a", 1), ("b", 2)]
    choice = choice_of(Sized(), Sized(), limits=(2, 3))
    assert planned(choice, 9, now=0.0) == [("a", 2), ("b", 3), ("none", 4)]
    assert "as many workers as it may have" in choice.why_not(LaunchRequest("1", 1), "").reason


def test_what_the_others_have_no_room_for_is_asked_of_those_that_have_failed() -> None:
    """These are not forgiven by that."""
    choice = choice_of(Sized(), Sized(), limits=(None, 2))
    choice.ended(launched(choice, "a"), LaunchEnd("wolves"), now=1.0)
    assert planned(choice, 5, now=2.0) == [("b", 2), ("a", 3)]
    assert planned(choice, 1, now=3.0) == [("b", 1)]


def test_workers_of_several_sizes_are_planned_together() -> None:
    """Each has its own launcher; and to ask what they would cost changes nothing."""
    sizes = capacity(1), capacity(8)
    choice = choice_of(Sized(*sizes), Sized(sizes[0]), Sized(*sizes), limits=(2, None, None))
    requests = [LaunchRequest(str(n), 1, size) for n, size in enumerate((0, 1, 1, 0, 0))]
    for each in choice.candidates:
        choice.bar(each, "wolves", now=1.0)
    for _ in range(2):
        plan = choice.plan(requests, now=2.0)
        assert [(each.name if each else "none", len(some)) for each, some in plan] == [
            ("a", 1),
            ("a", 1),
            ("c", 1),
            ("b", 2),
        ]
    assert all(each.barred_until == 601.0 for each in choice.candidates)


def test_only_as_many_workers_move_as_there_is_room_for_elsewhere() -> None:
    """Those that are on their way there have it, until they were requested again."""
    choice = choice_of(Sized(), Sized(), limits=(None, 2))
    waiting = [launched(choice, "a", number=n) for n in range(1, 6)]
    assert choice.elsewhere(waiting, now=1.0) == 2
    for each in waiting[:2]:
        choice.ended(each, LaunchEnd("no place"), now=1.0)
    assert choice.elsewhere(waiting[2:], now=1.0) == 0
    choice.note_requests(1)
    assert choice.elsewhere(waiting[2:], now=1.0) == 1
    assert choice.elsewhere(waiting[2:], now=20.0) == 2, "they were not needed any more"
    choice.bar(choice.candidates[1], "wolves", now=1.0)
    assert choice.elsewhere(waiting, now=2.0) == 0
    assert choice.elsewhere([], now=2.0) == 0


@pytest.mark.parametrize("how", ["killed", "reclaimed"])
def test_a_launcher_whose_workers_are_killed_three_times_in_a_row_has_failed(how: str) -> None:
    """Those that were on their way at the same time count once."""
    choice = choice_of(Sized(), Sized())
    end = LaunchEnd("gone", **{how: True})
    for now in (1.0, 2.0):
        for _ in range(5):
            told, news = choice.ended(launched(choice, "a", asked_at=now - 0.5), end, now)
            assert (told, news) == (end, "")
    told, news = choice.ended(launched(choice, "a", asked_at=2.5), end, now=3.0)
    assert told.reason == "a: gone; b is tried instead"
    assert news


def test_a_worker_that_connects_ends_the_series() -> None:
    choice = choice_of(Sized(), Sized())
    end = LaunchEnd("gone", killed=True)
    for now in (1.0, 2.0, 3.0, 4.0):
        assert choice.ended(launched(choice, "a", asked_at=now - 0.5), end, now)[0] is end
        choice.note_connected(launched(choice, "a"), now)
    assert choice.candidates[0].connected == 4


def test_a_worker_that_connects_later_ends_what_is_said_of_its_launcher() -> None:
    """But not while others are preferred: it may have been on its way."""
    choice = choice_of(Sized(), Sized())
    first = choice.candidates[0]
    choice.bar(first, "wolves", now=1.0, fatal=True)
    choice.note_connected(launched(choice, "a"), now=2.0)
    assert (first.why, first.fatal) == ("wolves", True)
    choice.note_connected(launched(choice, "a"), now=601.0)
    assert (first.why, first.fatal) == ("", False)


def test_what_is_taken_back_everywhere_is_no_failure() -> None:
    """As with one launcher: the executor asks for it again."""
    choice = choice_of(Sized())
    end = LaunchEnd("gone", reclaimed=True)
    for now in (1.0, 2.0, 3.0, 4.0):
        told, _ = choice.ended(launched(choice, "a", asked_at=now - 0.5), end, now)
        assert told.reclaimed


def test_sizes_are_found_again_among_those_of_other_launchers() -> None:
    """By what a worker has; those of the leading launcher keep their numbers."""
    first = Sized(capacity(1), capacity(2))
    second = Sized(capacity(2, 4), capacity(8, 8, gpus=1))
    choice = choice_of(first, second)
    a, b = choice.candidates
    assert [choice.size_at(a, size) for size in (0, 1)] == [0, 1]
    assert [choice.size_at(b, size) for size in (0, 1)] == [0, 0]
    assert choice.size_for(2, GIB, 0) == 1
    large = choice.size_for(4, GIB, 1)
    assert large == 2
    assert choice.capacity(large) == capacity(8, 8, gpus=1)
    assert (choice.size_at(a, large), choice.size_at(b, large)) == (None, 1)
    assert planned(choice, 2, 0.0, large) == [("b", 2)]
    assert choice.size_for(5, GIB, 1) == large, "not another number for the same"
    assert (choice.size_from(b, 1), choice.size_from(b, 0)) == (large, 0)
    with pytest.raises(ConfigError, match=r"no launcher has such a worker: a: too much; b: too"):
        choice.size_for(9, GIB, 0)


def test_where_no_launcher_in_use_has_a_size_the_error_is_final() -> None:
    choice = choice_of(Sized(capacity(1)), Sized(capacity(8)))
    large = choice.size_for(4, GIB, 0)
    choice.candidates[1].usable = False
    choice.candidates[1].why = "the road is blocked"
    assert planned(choice, 1, 0.0, large) == [("none", 1)]
    end = choice.why_not(LaunchRequest("1", 1, large), "8 CPUs")
    assert end.fatal
    assert end.reason.endswith("b: the road is blocked")
    assert "8 CPUs" in end.reason


def test_launchers_that_do_not_say_what_they_have_start_plain_workers() -> None:
    choice = choice_of(Sized(capacity(1), capacity(2)), Sized())
    assert [choice.size_at(choice.candidates[1], size) for size in (0, 1)] == [0, None]
    choice = choice_of(Sized(), Sized(capacity(4)))
    assert choice.size_at(choice.candidates[1], 0) == 0


def test_a_machine_has_workers_while_processors_and_memory_last() -> None:
    """Also those that are larger than the size of plain tasks; none with GPUs."""
    here = Sized(capacity(4, 8, gpus=1), one_machine=True)
    there = Sized(capacity(1, 3), capacity(2, 4), capacity(2, 4, gpus=1))
    choice = choice_of(here, there)
    assert choice.lead.name == "b"
    assert planned(choice, 5, 0.0) == [("a", 2), ("b", 3)], "memory for two"
    launched(choice, "a")
    assert planned(choice, 5, 0.0, size=1) == [("a", 1), ("b", 4)]
    assert planned(choice, 1, 0.0, size=2) == [("b", 1)]


def test_several_launchers_for_one_machine_leave_its_resources_to_the_executor() -> None:
    both = [Sized(capacity(2), one_machine=True) for _ in range(2)]
    choice = choice_of(*both)
    assert planned(choice, 9, 0.0) == [("a", 9)]
    assert [choice.size_for(cpus, GIB, 0) for cpus in (0.5, 1.0, 2.0)] == [0, 0, 0]
