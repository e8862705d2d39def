"""Records in both formats, and files that hold them."""

from __future__ import annotations

import csv
import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cloudexec.cli._csv_output import CsvFormat
from cloudexec.cli._errors import CommandError, RunError
from cloudexec.cli._jsonl_output import JsonLinesFormat
from cloudexec.cli._output_file import OutputFile, StreamOutput
from cloudexec.cli._recorder import Recorder
from cloudexec.cli._records import Format, Record, RowError
from cloudexec.cli._resume import put_in_order, read_ledger, repair

FUNCTION = "jobs.py:score"
MakeFormat = Callable[[], Format]


def json_lines() -> Format:
    return JsonLinesFormat(FUNCTION)


def csv_rows() -> Format:
    return CsvFormat(FUNCTION, ("x",), can_widen=True)


both_formats = pytest.mark.parametrize("make_format", [json_lines, csv_rows])


def record(row: int, value: object = None, *, x: object = 1, error: str | None = None) -> Record:
    return Record(
        row=row,
        input={"x": x},
        value=value,
        error=None if error is None else RowError("ValueError", error, "Traceback:\n  ...\n"),
        seconds=0.5,
        worker="w1",
        attempts=1,
    )


def write(path: Path, form: Format, *records: Record) -> None:
    output = OutputFile(path)
    recorder = Recorder(output, form, has_rows=output.size > 0, highest=0)
    for one in records:
        recorder.write(one)
    output.close()


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_json_record_has_input_outcome_and_how_it_ran(folder: Path) -> None:
    """A value or an error, never both."""
    path = Path("out.jsonl")
    write(path, json_lines(), record(1, [2]), record(2, error="bad\nnews"))
    one, two = (json.loads(line) for line in path.read_text().splitlines())
    assert one == {
        "row": 1,
        "input": {"x": 1},
        "value": [2],
        "seconds": 0.5,
        "worker": "w1",
        "attempts": 1,
        "function": FUNCTION,
    }
    assert "value" not in two
    assert two["error"] == {
        "type": "ValueError",
        "message": "bad\nnews",
        "traceback": "Traceback:\n  ...\n",
    }


def test_csv_record_has_a_column_for_each_part(folder: Path) -> None:
    """Inputs, keys of a returned dict and the error are spread over columns."""
    path = Path("out.csv")
    write(path, csv_rows(), record(1, {"w": 2, "h": [3]}), record(2, error="bad\nnews"))
    one, two = table(path)
    assert list(one) == [
        "row",
        "input.x",
        "value",
        "value.w",
        "value.h",
        "error.type",
        "error.message",
        "error.traceback",
        "seconds",
        "worker",
        "attempts",
        "function",
    ]
    assert (one["value.w"], one["value.h"], one["error.type"]) == ("2", "[3]", "")
    assert (two["error.message"], two["value.w"], two["input.x"]) == ("bad\nnews", "", "1")


def test_csv_table_is_widened_for_keys_that_come_later(folder: Path) -> None:
    """Rows that are there already get empty cells, whatever their cells hold."""
    path = Path("out.csv")
    write(path, csv_rows(), record(1, error="\r\n,'\""), record(2, {"a": 1}), record(3, {"b": 2}))
    rows = table(path)
    assert [row["error.message"] for row in rows] == ["\r\n,'\"", "", ""]
    assert [(row["value.a"], row["value.b"]) for row in rows] == [("", ""), ("1", ""), ("", "2")]


def test_csv_stream_keeps_keys_that_come_later_as_json() -> None:
    """What cannot be written anew loses nothing either."""
    form = CsvFormat(FUNCTION, ("x",), can_widen=False)
    first = record(1, {"a": 1})
    assert not form.widen(first)
    form.header()
    second = record(2, {"b": 2})
    assert not form.widen(second)
    assert b'"{""b"": 2}"' in form.encode(second)


@both_formats
def test_what_was_written_is_found_again(folder: Path, make_format: MakeFormat) -> None:
    """Row numbers, inputs and failures can be read back."""
    path = Path("out")
    write(path, make_format(), record(2, "a\nb", x="u\rv"), record(1, error="bad"), record(3))
    form = make_format()
    with path.open("rb") as lines:
        ledger = read_ledger("out", lines, form, FUNCTION)
    assert ledger.keys == {
        2: form.key({"x": "u\rv"}),
        1: form.key({"x": 1}),
        3: form.key({"x": 1}),
    }
    assert ledger.failed == {1}
    assert not ledger.is_in_order
    assert ledger.good_size == path.stat().st_size


@both_formats
def test_torn_record_is_cut_off_wherever_it_was_torn(folder: Path, make_format: MakeFormat) -> None:
    """After a crash at any byte, the whole records remain and the next one has its own line."""
    path = Path("out")
    write(path, make_format(), record(1, "a"))
    whole = path.read_bytes()
    write(path, _resumed(path, make_format), record(2, 'b\n"c"', x="é"))
    full = path.read_bytes()
    for size in range(len(whole), len(full)):
        path.write_bytes(full[:size])
        form = make_format()
        with path.open("rb") as lines:
            ledger = read_ledger("out", lines, form, FUNCTION)
        output = OutputFile(path)
        repair(output, ledger)
        output.close()
        missing = [record(n, 'b\n"c"', x="é") for n in (2,) if n not in ledger.keys]
        write(path, form, *missing)
        assert path.read_bytes() == full


def _resumed(path: Path, make_format: MakeFormat) -> Format:
    form = make_format()
    with path.open("rb") as lines:
        read_ledger("out", lines, form, FUNCTION)
    return form


@both_formats
@pytest.mark.parametrize(
    "content", [b"a,b\n1,2\n", b"precious", b'{"row": "x"}\n', b"row,input.x,value\n", b"\x00\n"]
)
def test_file_of_another_origin_is_refused_and_untouched(
    folder: Path, make_format: MakeFormat, content: bytes
) -> None:
    """Whatever stands in a file that is not ours stays there."""
    path = Path("out")
    path.write_bytes(content)
    with path.open("rb") as lines, pytest.raises(CommandError) as caught:
        read_ledger("out", lines, make_format(), FUNCTION)
    assert caught.value.message.startswith("out exists and is not this job's output: ")
    assert caught.value.message.endswith("; choose another --output, or --overwrite it")
    assert path.read_bytes() == content


@both_formats
def test_output_of_another_function_is_refused(folder: Path, make_format: MakeFormat) -> None:
    """Results of two functions never mix."""
    path = Path("out")
    write(path, make_format(), record(1))
    with path.open("rb") as lines, pytest.raises(CommandError) as caught:
        read_ledger("out", lines, make_format(), "jobs.py:scale")
    assert caught.value.message == (
        "out holds results of jobs.py:score, not of jobs.py:scale: "
        "choose another --output, or --overwrite it"
    )


@both_formats
def test_rows_are_put_in_order_afterwards(folder: Path, make_format: MakeFormat) -> None:
    """A file whose gaps were filled later can be sorted by row."""
    path = Path("out")
    write(path, make_format(), record(3, "c\n"), record(1), record(2, error="bad"))
    sizes = path.stat().st_size
    output = OutputFile(path)
    put_in_order(output, make_format())
    output.close()
    with path.open("rb") as lines:
        ledger = read_ledger("out", lines, make_format(), FUNCTION)
    assert list(ledger.keys) == [1, 2, 3]
    assert ledger.is_in_order
    assert path.stat().st_size == sizes


def test_second_run_on_one_output_is_refused_even_after_it_was_replaced(folder: Path) -> None:
    """The lock holds for the name, not only for the file that had it first."""
    path = Path("out")
    first = OutputFile(path)
    first.append(b"a\n")
    for _ in range(2):
        with pytest.raises(CommandError) as caught:
            OutputFile(path)
        assert caught.value.message == "out is being written by another run"
        first.replace([b"b\n"])
    first.append(b"c\n")
    first.close()
    OutputFile(path).close()
    assert path.read_bytes() == b"b\nc\n"
    assert os.listdir() == ["out"]


def test_failed_replacement_leaves_the_file_as_it_was(folder: Path) -> None:
    """Contents change at once or not at all."""
    path = Path("out")
    output = OutputFile(path)
    output.append(b"a\n")

    def pieces() -> Iterator[bytes]:
        yield b"b\n"
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(RunError) as caught:
        output.replace(pieces())
    assert caught.value.message == "cannot rewrite out: No space left on device"
    output.append(b"c\n")
    output.close()
    assert path.read_bytes() == b"a\nc\n"
    assert os.listdir() == ["out"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_full_disk_is_said_in_one_line() -> None:
    """The error names the output and the reason."""
    output = StreamOutput("/dev/full")
    with pytest.raises(RunError) as caught:
        output.append(b"a\n")
    assert caught.value.message == "cannot write to /dev/full: No space left on device"
    output.close()
