"""``explain()``: whatever happened to a call can be told afterwards; and the log says so, too."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import contract_tasks as tasks
import pytest
from contract_helpers import PATIENCE, Signals, supervisors, until
from cuttable import CuttableLink

from cloudexec import (
    Batch,
    BatchExecutor,
    BatchFuture,
    Local,
    StoryEvent,
    TaskStory,
    WorkerLostError,
    run,
    stage,
)
from cloudexec._server.marks import Marks
from cloudexec.testing import FakeAWS, ManualLauncher, SimulatedWorker

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("nothing_left")]


@pytest.fixture
def executor() -> Iterator[BatchExecutor]:
    with BatchExecutor(1) as made:
        yield made


def whats(story: TaskStory) -> list[str]:
    return [event.what for event in story.events]


def the(story: TaskStory, what: str) -> StoryEvent:
    found = [event for event in story.events if event.what == what]
    assert len(found) == 1, str(story)
    return found[0]


def test_an_ordinary_call_tells_its_times(executor: BatchExecutor) -> None:
    """Nothing was recorded for it, and when and where it ran is told all the same."""
    executor.submit(tasks.double, 0).result(PATIENCE)
    before = time.time()
    future = executor.submit(time.sleep, 0.1)
    future.result(PATIENCE)
    story = executor.explain(future)
    assert future._notes is None
    assert whats(story) == ["submitted", "sent", "began", "result"]
    assert story.state == "finished"
    assert story.number == 2
    assert story.lost == ()
    submitted, sent, began, result = story.events
    assert sent.worker_id == began.worker_id == future.worker_id
    assert result.run_time == future.run_time
    assert submitted.at is not None
    assert result.at is not None
    assert began.seconds is not None
    assert result.seconds is not None
    assert before - 0.5 < submitted.at < result.at < time.time() + 0.5
    assert submitted.seconds == 0.0
    assert 0.0 <= began.seconds <= result.seconds - 0.09
    clock = time.strftime("%H:%M:%S", time.localtime(submitted.at))
    assert re.search(rf"(?m)^  {clock}\.\d\d\d +submitted$", str(story))
    assert str(story).startswith("task 2, ")


def test_each_of_many_batches_has_its_time(executor: BatchExecutor) -> None:
    """The times of calls that were submitted one after the other are theirs, not of all."""
    futures = []
    for _ in range(3):
        futures.append(executor.submit(tasks.double, 1))
        futures[-1].result(PATIENCE)
        threading.Event().wait(0.05)
    times = [executor.explain(each).events[0].at or 0.0 for each in futures]
    assert times[1] - times[0] > 0.04 < times[2] - times[1]


def test_a_killed_process_is_told_with_its_evidence(
    executor: BatchExecutor, tmp_path: Path
) -> None:
    """Signal, memory, last output; where the call was run again, and that it then came to a
    result. All of it stands in the text."""
    view = executor.with_options(name="fragile")
    future = view.submit(tasks.die_once, str(tmp_path / "x"), "these are my last words")
    assert future.result(PATIENCE) == "done"
    story = view.explain(future)
    assert whats(story) == ["submitted", "sent", "began", "lost", "sent", "began", "result"]
    began, lost, again = story.events[2:5]
    assert began.worker_id == "worker-1"
    assert story.lost == (lost,)
    assert (lost.signal, lost.exit_code, lost.attempt) == (signal.SIGKILL, None, 1)
    assert lost.worker_id == "worker-1"
    assert lost.output.strip() == "these are my last words"
    assert (lost.peak_memory_bytes or 0) > 2**20
    assert lost.run_time is not None
    assert again.attempt == 2
    seconds = [event.seconds for event in story.events]
    assert None not in seconds
    assert seconds == sorted(seconds)  # type: ignore[type-var]
    text = str(story)
    assert "task 1 (fragile)" in text
    assert "lost on worker-1" in text
    assert "SIGKILL" in text
    assert "peak memory" in text
    assert "| these are my last words" in text
    assert "sent to worker-1, attempt 2" in text


def test_the_last_attempt_is_told_when_all_are_lost(executor: BatchExecutor) -> None:
    """Each of them, with the exit code, and then the exception."""
    future = executor.with_options(retries=1).submit(tasks.leave, 7)
    with pytest.raises(WorkerLostError):
        future.result(PATIENCE)
    story = executor.explain(future)
    attempt = ["sent", "began", "lost"]
    assert whats(story) == ["submitted", *attempt, *attempt, "exception"]
    assert [event.exit_code for event in story.lost] == [7, 7]
    assert [event.attempt for event in story.lost] == [1, 2]
    assert story.events[-1].reason.startswith("WorkerLostError: ")


def test_a_killed_worker_tells_who_had_begun(signals: Signals, caplog: Any) -> None:
    """The running call was lost; one that was only sent there was handed back. Which of them the
    worker died of is not known, and is said to be found out."""
    caplog.set_level(logging.INFO, "cloudexec")
    with BatchExecutor(1) as executor:
        executor.submit(tasks.double, 1).result(PATIENCE)
        for _ in range(300):  # short, so that more of them are sent ahead
            executor.submit(tasks.hold_if, "", "").result(PATIENCE)
        held = executor.submit(tasks.hold_if, signals.told, signals.gate)
        behind = [executor.submit(tasks.hold_if, "", "") for _ in range(5)]
        signals.wait()
        until(held.running)
        (supervisor,) = supervisors()
        supervisor.kill()
        signals.wait()
        signals.release(2)
        assert held.result(PATIENCE)
        behind[0].result(PATIENCE)
        story, other = executor.explain(held), executor.explain(behind[0])
    lost = the(story, "lost")
    assert lost.worker_id == "worker-1"
    assert "SIGKILL" in lost.reason
    assert re.search(r"one of 6 suspects", lost.reason)
    assert story.events[-1].worker_id == "worker-2"
    assert whats(other)[:4] == ["submitted", "sent", "returned", "sent"]
    assert "before it is known to have begun" in the(other, "returned").reason
    (record,) = records(caplog, "worker_lost")
    assert record.levelno == logging.WARNING
    assert record.cloudexec_worker == "worker-1"
    assert "SIGKILL" in record.cloudexec_reason
    assert record.cloudexec_count >= 2


def test_where_an_unfinished_call_is(signals: Signals, executor: BatchExecutor) -> None:
    """Running, waiting for a slot, held for a result: it is told before there is an outcome."""
    first = executor.submit(tasks.hold, signals.told, signals.gate)
    second = executor.submit(tasks.hold, signals.told, signals.gate)
    third = executor.submit(tasks.echo, second, first)
    signals.wait()
    story = executor.explain(first)
    assert whats(story) == ["submitted", "sent", "began"]
    assert story.state == "running"
    assert the(story, "sent").at is not None
    waiting = executor.explain(second)
    assert waiting.state == "pending"
    assert the(waiting, "waiting").reason == "for a free slot"
    assert the(executor.explain(third), "held").reason == "2 of 2 results are missing"
    signals.release(2)
    third.result(PATIENCE)
    assert whats(executor.explain(third))[:3] == ["submitted", "held", "released"]


def test_what_does_not_start_is_told() -> None:
    """Why the call waits: how many workers were asked for, and why the last one failed."""
    launcher = ManualLauncher()
    with BatchExecutor(1, launcher=launcher) as executor:
        future = executor.submit(tasks.double, 1)
        launcher.wait(1, PATIENCE)
        assert the(executor.explain(future), "waiting").reason == "for 1 worker on the way"
        launcher.end("1", "no such image")
        until(lambda: len(launcher.launches) > 1)
        story = executor.explain(future)
        assert the(story, "waiting").reason == "for 1 worker on the way: no such image"
        future.cancel()
        story = executor.explain(future)
    assert whats(story) == ["submitted", "cancelled"]
    assert story.state == "cancelled"


def test_what_retry_on_thought_is_told(executor: BatchExecutor, tmp_path: Path) -> None:
    """What was raised, the verdict, and the next attempt; also that it was not worth one."""
    view = executor.with_options(retry_on=FileNotFoundError, retries=5)
    path = str(tmp_path / "x")
    future = view.submit(os.rmdir, path)
    until(lambda: "judged" in whats(executor.explain(future)))
    os.mkdir(path)
    future.result(PATIENCE)
    story = executor.explain(future)
    assert whats(story)[:5] == ["submitted", "sent", "raised", "judged", "sent"]
    assert whats(story)[-1] == "result"
    assert story.events[2].reason.startswith("FileNotFoundError: ")
    assert story.events[3].reason == "worth another attempt"
    refused = view.submit(tasks.divide, 1, 0)
    assert refused.exception(PATIENCE)
    story = executor.explain(refused)
    assert whats(story) == ["submitted", "sent", "raised", "judged", "exception"]
    assert story.events[3].reason == "not worth another attempt"


def test_a_timeout_and_a_kill_are_told(signals: Signals, executor: BatchExecutor) -> None:
    future = executor.with_options(timeout=0.2).submit(time.sleep, 60)
    assert isinstance(future.exception(PATIENCE), TimeoutError)
    story = executor.explain(future)
    assert whats(story) == ["submitted", "sent", "began", "timed out", "exception"]
    assert (story.lost[0].run_time or 0.0) >= 0.2
    running = executor.submit(tasks.hold, signals.told, signals.gate)
    signals.wait()
    assert running.cancel(running=True)
    story = executor.explain(running)
    assert whats(story)[-1] == "cancelled"
    assert story.state == "cancelled"


def test_an_exception_is_told_in_a_line(executor: BatchExecutor) -> None:
    """Of the call itself, of one that it depends on, and of arguments that do not pickle."""
    raised = executor.submit(tasks.divide, 1, 0)
    dependent = executor.submit(tasks.double, raised)
    unsent = executor.submit(tasks.double, threading.Lock())  # type: ignore[arg-type]
    for future in (raised, dependent, unsent):
        assert future.exception(PATIENCE)
    assert executor.explain(raised).events[-1].reason == "ZeroDivisionError: division by zero"
    story = executor.explain(dependent)
    assert "sent" not in whats(story)
    assert story.events[-1].reason.startswith("DependencyError: ")
    story = executor.explain(unsent)
    assert whats(story) == ["exception"]
    assert story.number is None
    assert "not sent" in str(story)


def test_stages_of_a_graph_are_told(executor: BatchExecutor) -> None:
    """By the names of their stages."""
    futures: list[BatchFuture[Any]] = []

    def submitted(
        future: BatchFuture[Any], fn: object, options: object, needs: Any, _: object
    ) -> Any:
        futures.append(future)
        return needs

    doubled = stage(tasks.double)
    executor._submitter.on_submit = submitted  # as cloudexec.tracing does
    assert run(doubled(doubled(1)), executor=executor) == 4
    executor._submitter.on_submit = None
    stories = [executor.explain(each) for each in futures]
    assert [story.name for story in stories] == ["double", "double"]
    assert all(whats(story)[-1] == "result" for story in stories)


def test_it_answers_after_the_end(tmp_path: Path) -> None:
    """After ``shutdown()``, and after the executor was broken."""
    executor = BatchExecutor(1)
    future = executor.submit(tasks.die_once, str(tmp_path / "x"), "")
    executor.shutdown()
    assert whats(executor.explain(future)) == [
        *("submitted", "sent", "began", "lost", "sent", "began", "result")
    ]
    broken = BatchExecutor(1)
    victim = broken.submit(time.sleep, 60)
    broken.kill_workers()
    story = broken.explain(victim)
    assert whats(story)[0] == "submitted"
    assert story.events[-1].reason.startswith("BrokenBatchExecutor: ")


def test_what_was_in_the_journal_is_told(tmp_path: Path) -> None:
    """No worker was asked, and the story says where the result is from."""
    for _ in range(2):
        with BatchExecutor(1, journal=tmp_path / "journal") as executor:
            future = executor.submit(tasks.double, 21)
            assert future.result(PATIENCE) == 42
            story = executor.explain(future)
    assert whats(story) == ["result"]
    assert "journal" in story.events[0].reason
    assert executor.stats().workers.launched == 0


def test_futures_of_others_are_refused(executor: BatchExecutor) -> None:
    """Before they are done and after; and what is no future of an executor of ours at all."""
    with BatchExecutor(1) as other:
        pending = other.submit(time.sleep, 0.1)
        with pytest.raises(ValueError, match="another"):
            executor.explain(pending)
        executor.submit(tasks.double, 1).result(PATIENCE)
        pending.result(PATIENCE)
        with pytest.raises(ValueError, match="another"):
            executor.explain(pending)
    with pytest.raises(TypeError, match="Future"):
        executor.explain(Future())


def test_a_long_story_is_cut_in_the_middle(executor: BatchExecutor, tmp_path: Path) -> None:
    """Its begin and its end are kept, and what is missing is said."""
    path = str(tmp_path / "x")
    future = executor.with_options(retries=200).submit(tasks.leave_until, path, 40)
    future.result(PATIENCE)
    story = executor.explain(future)
    assert len(story.events) < 110
    assert re.fullmatch(r"\d+ events", the(story, "left out").reason)
    assert [event.attempt for event in story.lost][:2] == [1, 2]
    assert story.lost[-1].attempt == 40
    assert whats(story)[-1] == "result"


def test_marks_are_few_and_never_early() -> None:
    """However many batches there were: what is found is the batch's time or a little later."""
    marks = Marks()
    count = 200_000
    for number in range(1, count + 1):
        marks.add(number, (float(number), 1e9 + number, ""))
    assert len(marks._columns[0]) < 33_000
    assert marks.find(count + 1) is None
    late = []
    for number in range(1, count + 1, 997):
        found = marks.find(number)
        assert found is not None
        assert found[1] - found[0] == 1e9
        late.append(found[0] - number)
    assert min(late) == 0.0
    assert max(late) < 16.0


def records(caplog: pytest.LogCaptureFixture, event: str) -> list[Any]:
    return [r for r in caplog.records if getattr(r, "cloudexec_event", "") == event]


def test_a_lost_attempt_is_logged_with_fields(tmp_path: Path, caplog: Any) -> None:
    """Under lasting names, as information: the executor deals with it."""
    caplog.set_level(logging.INFO, "cloudexec")
    with BatchExecutor(1) as executor:
        view = executor.with_options(name="fragile")
        view.submit(tasks.die_once, str(tmp_path / "x"), "").result(PATIENCE)
    (record,) = records(caplog, "attempt_lost")
    assert record.levelno == logging.INFO
    assert record.cloudexec_task == 1
    assert record.cloudexec_task_name == "fragile"
    assert record.cloudexec_worker == "worker-1"
    assert record.cloudexec_attempt == 1
    assert "SIGKILL" in record.cloudexec_reason
    assert "fragile" in record.getMessage()
    assert "run again" in record.getMessage()


def test_a_flood_is_logged_in_sum(caplog: Any) -> None:
    """A hundred lost attempts are twenty lines, and one that counts the others."""
    caplog.set_level(logging.INFO, "cloudexec")
    with BatchExecutor(2, retries=0) as executor:
        futures = [executor.submit(os._exit, 1) for _ in range(60)]
        assert all(isinstance(f.exception(PATIENCE), WorkerLostError) for f in futures)
    found = records(caplog, "attempt_lost")
    assert len(found) <= 25
    assert sum(record.cloudexec_count for record in found) == 60


def test_a_failed_launch_is_logged(caplog: Any) -> None:
    caplog.set_level(logging.INFO, "cloudexec")
    launcher = ManualLauncher()
    with BatchExecutor(1, launcher=launcher) as executor:
        future = executor.submit(tasks.double, 1)
        launcher.wait(1, PATIENCE)
        launcher.end("1", "no such image")
        until(lambda: executor.stats().launch_failures)
        future.cancel()
    (record,) = records(caplog, "launch_failed")
    assert record.levelno == logging.WARNING
    assert record.cloudexec_reason == "no such image"


def test_launches_that_fail_alike_are_told_in_full_once(caplog: Any) -> None:
    """What each worker printed last, behind the first line, differs in its number and times."""
    launcher = ManualLauncher()
    with BatchExecutor(2, launcher=launcher, min_workers=2) as executor:
        future = executor.submit(tasks.double, 1)
        launcher.wait(2, PATIENCE)
        for launch_id in ("1", "2"):
            launcher.end(launch_id, f"it could not reach this process\nworker {launch_id}: no")
        until(lambda: executor.stats().launch_failures == 2)
        future.cancel()
    first, second = (record.getMessage() for record in records(caplog, "launch_failed"))
    assert first.endswith("(launch 1): it could not reach this process\nworker 1: no")
    assert second.endswith("another worker could not be started (launch 2): as before")


class Twice(SimulatedWorker):
    """Sends every result twice."""

    async def _write(self, message: Any, **how: Any) -> None:
        again = type(message).FromString(message.SerializeToString())
        await super()._write(message, **how)
        if message.HasField("results"):
            await super()._write(again, **how)


def test_dropped_duplicates_are_logged_in_sum(caplog: Any) -> None:
    """How many results came for attempts that had one, whenever that is looked at."""
    caplog.set_level(logging.INFO, "cloudexec")
    launcher = ManualLauncher()
    with BatchExecutor(1, launcher=launcher) as executor:
        futures = [executor.submit(tasks.double, n) for n in range(30)]
        (launch,) = launcher.wait(1, PATIENCE)

        async def work() -> None:
            worker = Twice(launch.contact, launch.launch_id)
            await worker.connect()
            await worker.serve()
            launcher.end(launch.launch_id)

        thread = threading.Thread(target=lambda: asyncio.run(work()))
        thread.start()
        assert [future.result(PATIENCE) for future in futures] == [None] * 30
        until(lambda: executor.stats().duplicates == 30)
    thread.join()
    found = records(caplog, "duplicate_dropped")
    assert 1 <= len(found) <= 2
    assert sum(record.cloudexec_count for record in found) == 30


def test_a_cut_connection_is_told_and_logged(signals: Signals, caplog: Any) -> None:
    """That the worker was cut off and came back; the call was not run again."""
    caplog.set_level(logging.INFO, "cloudexec")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = int(server.getsockname()[1])
    link = CuttableLink(port)
    where = {"listen": f"127.0.0.1:{port}", "advertise": f"127.0.0.1:{link.port}"}
    with BatchExecutor(1, launcher=Local(slots_per_worker=1), **where) as executor:  # type: ignore[arg-type]
        future = executor.submit(tasks.hold, signals.told, signals.gate)
        signals.wait()
        link.cut(stay_down=True)
        until(lambda: "worker cut off" in whats(executor.explain(future)))
        link.heal()
        until(lambda: "worker back" in whats(executor.explain(future)))
        signals.release()
        future.result(PATIENCE)
        story = executor.explain(future)
    link.close()
    assert whats(story) == [
        *("submitted", "sent", "worker cut off", "worker back", "began", "result")
    ]
    assert the(story, "began").seconds is None  # the result tells how long it ran, not since when
    for event in ("worker_cut", "worker_back"):
        (record,) = records(caplog, event)
        assert (record.levelno, record.cloudexec_worker) == (logging.INFO, "worker-1")
        assert record.cloudexec_count == 1


def make_batch(aws: Any, **settings: Any) -> Batch:
    made = aws.set_up("queue", max_vcpus=4, spot=bool(settings.get("spot")))
    return Batch(
        queue=made.queue,
        job_role=made.job_role,
        execution_role=made.execution_role,
        region=aws.region,
        image="example.com/worker:1",
        **settings,
    )


def running_job(aws: Any) -> Any:
    return next(each for each in aws.jobs() if each.status == "RUNNING")


def test_the_words_of_aws_are_told(signals: Signals) -> None:
    """A container without memory left: its job, AWS's reason, and the larger size that came."""
    with FakeAWS(grace=0.5, calls_per_second=1000) as aws:
        batch = make_batch(aws, vcpus=0.25, memory=("512MiB", "1GiB"))
        with BatchExecutor(1, launcher=batch) as executor:
            future = executor.submit(tasks.hold, signals.told, signals.gate)
            signals.wait()
            job = running_job(aws).job_id
            aws.faults.out_of_memory(job)
            signals.wait()
            signals.release()
            future.result(PATIENCE)
            story = executor.explain(future)
        lost = the(story, "lost")
        assert lost.job_id == job
        assert lost.out_of_memory
        assert "memory" in lost.reason.lower()
        assert the(story, "climbed").reason == "0.25 vCPU with 1 GiB"
        again = [event for event in story.events if event.what == "sent"][-1]
        assert again.job_id not in ("", job)
        assert f"(job {job})" in str(story)
