"""Records on Weights & Biases, for those who have an account or a server of it."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

_ID_FILE = "wandb_run.json"


class WandbRun:
    """A run of a W&B project, gone on with when the directory's run is.

    Names are `phase/name`, drawn over each phase's own steps.
    """

    def __init__(self, project: str, directory: pathlib.Path) -> None:
        """Opens the run.

        Raises:
          ImportError: without the wandb package.
        """
        try:
            import wandb
        except ImportError as error:
            raise ImportError(
                "wandb is not installed: pip install wandb, or leave the project out"
            ) from error
        path = directory / _ID_FILE
        known = json.loads(path.read_text()) if path.exists() else {}
        self._run: Any = wandb.init(
            project=project,
            dir=str(directory),
            name=directory.name,
            id=known.get("id"),
            resume="allow",
        )
        path.write_text(json.dumps({"id": self._run.id, "project": project}))
        self._phases: set[str] = set()

    def write(self, step: int, numbers: Mapping[str, float], *, phase: str) -> None:
        if phase not in self._phases:
            self._phases.add(phase)
            self._run.define_metric(f"{phase}/step")
            self._run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")
        values = {f"{phase}/{name}": value for name, value in numbers.items()}
        self._run.log({f"{phase}/step": step, **values})

    def close(self) -> None:
        self._run.finish()
