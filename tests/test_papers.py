"""Every function and command that PAPERS.md and the README name exists."""

import importlib.util
import pathlib
import re

import pytest

import pgjax as pg

ROOT = pathlib.Path(__file__).parent.parent
TABLE = (ROOT / "PAPERS.md").read_text()
README = (ROOT / "README.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip().strip("|").split("|")]
    for line in TABLE.splitlines()
    if line.startswith("|") and not line.startswith(("| paper", "|---"))
]


def resolve(path):
    target = pg
    for part in path.split("."):
        target = getattr(target, part)
    return target


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:40])
def test_row_names_things_that_exist(row):
    assert len(row) == 5, row
    paper, arxiv, functions, command, result = row
    assert paper and result
    assert arxiv == "" or re.fullmatch(r"\d{4}\.\d{4,5}", arxiv)
    names = re.findall(r"`([\w.]+)`", functions)
    assert names
    for name in names:
        assert callable(resolve(name)), name
        assert resolve(name).__doc__, name
    check_command(command.strip("`"))


def check_command(command):
    words = command.split()
    assert words[:2] == ["python", "-m"], command
    if words[2] == "pytest":
        for word in words[3:]:
            if word.startswith("tests/"):
                assert (ROOT / word).is_file(), word
    else:
        assert importlib.util.find_spec(words[2]) is not None, words[2]


def test_readme_commands_exist():
    commands = re.findall(r"python -m experiments[\w.]*", README)
    assert len(commands) > 4
    for command in commands:
        check_command(command)


def test_readme_lists_every_objective():
    cells = re.findall(r"^\| (`[^|]*`) \|", README, flags=re.M)
    listed = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    recipes = {n for n in pg.objectives.__all__ if n[0].islower()}
    others = {n for n in recipes if n.startswith("with_")}
    others |= {
        "by_turn",
        "normalized",
        "step_count",
        "kl_to_reference",
        "entropy_bonus",
        "value_loss",
    }
    assert recipes - others <= listed
    for name in others:
        assert f"`{name}`" in README or f"{name}(" in README
    assert "PLACEHOLDER" not in README + TABLE


def test_importing_pgjax_is_light():
    """`import pgjax` pulls in nothing optional or slow."""
    import subprocess
    import sys

    heavy = {"grain", "tensorflow_datasets", "tyro", "rich", "matplotlib", "distrax", "orbax"}
    code = f"import sys, pgjax; print(sorted({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
