"""Commands in cluster files are read as a shell reads them."""

import os
import subprocess
from pathlib import Path

import pytest

from orchestration.clusters.rules import in_background, starts

COMMANDS = [
    "A=1 prog x --host=h",
    "export A=1 B=2; prog x --host h",
    "cd /tmp && A=1 nohup setsid prog x --host h > log 2>&1 &",
    'export A=1 && S="$(cat f | tr a b)" prog x --host "h"',
    "A=1 S=$(cat f) prog x --host h",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_read_as_a_shell_does(command: str, tmp_path: Path) -> None:
    [start] = starts("commands[0]", command, ["prog", "x"])
    assert start.option("--host") == "h"
    program = tmp_path / "bin/prog"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho "$A" > "$OUT"\n')
    program.chmod(0o755)
    env = {"PATH": f"{program.parent}:{os.environ['PATH']}", "OUT": str(tmp_path / "out")}
    subprocess.run(["bash", "-c", f"{command.removesuffix('&')}"], env=env, cwd=tmp_path, check=True, timeout=20)
    assert start.env["A"] == (tmp_path / "out").read_text().strip() == "1"


def test_what_runs_in_the_background_is_told_from_what_is_waited_for() -> None:
    for waits in ("prog x", "prog x && next", "prog x > log 2>&1", "prog x &> log", "sleep 9 & prog x"):
        assert not in_background(waits, "prog x")
    for returns in ("prog x &", "prog x > log 2>&1 & disown", "cd / && nohup prog x&"):
        assert in_background(returns, "prog x")
