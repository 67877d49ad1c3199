"""Progress crosses a log file: a bar becomes lines, and lines a bar again."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from orchestration.submission.log import LogView
from orchestration.terminal import new_progress, progress_line, read_progress


@given(st.integers(0, 10**9), st.one_of(st.none(), st.integers(1, 10**9)), st.text("abc 0.4[]/", min_size=1))
def test_a_line_of_progress_is_read_as_it_was_meant(done: int, total: int | None, text: str) -> None:
    assert read_progress(progress_line(done, total, text)) == (done, total, text)
    assert read_progress(f"rank-0: {progress_line(done, total, text)}") is None


def test_a_log_file_gets_lines_where_a_terminal_has_a_bar() -> None:
    out = io.StringIO()
    with new_progress(Console(file=out, width=100)) as progress:
        bar = progress.add_task("rendering", total=3)
        progress.update(bar, completed=2)
    assert "[2/3] rendering" in out.getvalue().splitlines()


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_becomes_a_bar_again_and_other_lines_stay(terminal: bool) -> None:
    out = io.StringIO()
    with new_progress(Console(file=out, width=100, force_terminal=terminal)) as progress:
        view = LogView(progress)
        for piece in ("run demo: sta", "rting [Ray]\n[5/1", "0] training  loss 0.5\nlast words"):
            view.feed(piece)
        view.close()
        assert [(task.completed, task.total) for task in progress.tasks] == ([(5, 10)] if terminal else [])
    assert "run demo: starting [Ray]" in out.getvalue() and "last words" in out.getvalue()
    assert ("[5/10] training" in out.getvalue()) is not terminal
