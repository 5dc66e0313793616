"""A reproduction's quick preset, from the command line to its files."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np


def run(name: str, directory: Path) -> tuple[dict[str, Any], list[np.ndarray]]:
    """What `experiments.<name> --quick` wrote, and its table's columns, all finite.

    Whether claims hold takes their full size, so that either exit status will do.
    """
    module = importlib.import_module(f"experiments.{name}")
    assert module.main(["--quick", "--out", str(directory)]) in (0, 1)
    found = json.loads((directory / "results.json").read_text())
    assert found["claims"] and (directory / "curves.png").stat().st_size > 0
    columns = [np.asarray(x) for row in found["table"].values() for x in row.values()]
    assert columns and all(x.ndim == 1 and x.size and np.isfinite(x).all() for x in columns)
    return found, columns
