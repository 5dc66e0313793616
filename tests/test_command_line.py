"""What a command says before and while it works: missing extras, and progress in a log."""

import dataclasses
import sys

import pytest

from experiments.shared import command_line, reproduction


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = 3


def test_flags_change_the_default():
    parsed = command_line.parse(
        Config, "name", description="A command.", arguments=["--steps", "4"], default=Config(5)
    )
    assert parsed == Config(4)
    assert command_line.parse(Config, "name", description=None, arguments=[]) == Config(3)


def test_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tyro", None)
    with pytest.raises(SystemExit) as stop:
        command_line.parse(Config, "ppo", description=None, arguments=[])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "experiments.ppo needs tyro" in said
    assert "pip install -e '.[experiments]'" in said


def test_progress_in_a_log_is_a_line(monkeypatch, capsys):
    monkeypatch.setattr(reproduction, "SECONDS_BETWEEN_LINES", 0.0)
    assert list(reproduction.track("ab", "letters")) == ["a", "b"]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" after ")[0] for line in lines] == [
        "letters: 1 of 2 done",
        "letters: 2 of 2 done",
    ]
    monkeypatch.setattr(reproduction, "SECONDS_BETWEEN_LINES", 1e6)
    assert list(reproduction.track("ab", "letters")) == ["a", "b"]
    assert capsys.readouterr().err == ""
