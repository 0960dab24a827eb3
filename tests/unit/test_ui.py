"""What a person and a CI log see."""

from __future__ import annotations

import io
import json
import threading

import pytest

from recvirt.ui import Reporter, format_amount, format_bytes, format_seconds


def make(mode: str = "plain", *, quiet: bool = False, verbose: bool = False) -> tuple[Reporter, io.StringIO]:
    stream = io.StringIO()
    return Reporter(mode=mode, stream=stream, quiet=quiet, verbose=verbose), stream


def test_steps_nest_and_tell_their_time() -> None:
    reporter, stream = make()
    with reporter.step("outer"):
        reporter.info("news")
        with reporter.step("inner"):
            pass
    lines = stream.getvalue().splitlines()
    assert lines[:3] == ["outer ...", "  news", "  inner ..."]
    assert lines[3].startswith("  inner: done in ")
    assert lines[4].startswith("outer: done in ")


def test_a_failed_step_says_so_even_when_quiet() -> None:
    reporter, stream = make(quiet=True)
    with pytest.raises(RuntimeError), reporter.step("work"):
        raise RuntimeError
    assert "work: FAILED after" in stream.getvalue()


def test_quiet_leaves_warnings_and_drops_news() -> None:
    reporter, stream = make(quiet=True)
    reporter.info("news")
    reporter.progress("copy", 1, 2)
    reporter.warn("careful")
    assert stream.getvalue() == "warning: careful\n"


def test_details_only_when_verbose() -> None:
    quiet, stream = make()
    quiet.detail("$ true")
    assert stream.getvalue() == ""
    verbose, stream = make(verbose=True)
    verbose.detail("$ true")
    assert stream.getvalue() == "$ true\n"


def test_a_stream_that_is_no_terminal_gets_plain_lines() -> None:
    reporter, _ = make("auto")
    assert reporter.resolved_mode() == "plain"


def test_plain_progress_is_bounded_to_a_line_each_ten_seconds() -> None:
    reporter, stream = make()
    for done in range(100):
        reporter.progress("copy", done, 100, "files")
    assert stream.getvalue() == "copy:  0% 0 files of 100 files\n"


def test_progress_without_a_known_total_has_no_percentage() -> None:
    reporter, stream = make()
    reporter.progress("unpack", 1500, None, "bytes")
    assert stream.getvalue() == "unpack: 1.5 kB\n"


def test_live_progress_is_wiped_before_a_line() -> None:
    reporter, stream = make("live")
    reporter.progress("copy", 5, 10)
    reporter.info("news")
    assert stream.getvalue().endswith("\r\x1b[Knews\n")


def test_json_is_an_object_a_line() -> None:
    reporter, stream = make("json")
    with reporter.step("work"):
        reporter.progress("copy", 5, 10, "files")
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [event["event"] for event in events] == ["step-start", "progress", "step-end"]
    assert events[1]["done"] == 5
    assert events[1]["total"] == 10
    assert events[2]["seconds"] >= 0


def test_only_outer_steps_fold_in_a_ci_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    reporter, stream = make()
    with reporter.step("outer"), reporter.step("inner"):
        pass
    text = stream.getvalue()
    assert text.startswith("::group::outer\n")
    assert text.count("::group::") == text.count("::endgroup::") == 1


def test_threads_have_an_indentation_of_their_own() -> None:
    reporter, stream = make()
    with reporter.step("outer"):
        thread = threading.Thread(target=reporter.info, args=("elsewhere",))
        thread.start()
        thread.join()
    assert "\nelsewhere\n" in stream.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (59.94, "59.9 s"), (60, "1 min 0 s"), (83.2, "1 min 23 s"), (3601, "60 min 1 s")],
)
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1_500_000, "1.5 MB"), (5e9, "5.0 GB"), (7.2e12, "7.2 TB")],
)
def test_format_bytes(value: float, text: str) -> None:
    assert format_bytes(value) == text


def test_format_amount() -> None:
    assert format_amount(3, "files") == "3 files"
    assert format_amount(3, "") == "3"
