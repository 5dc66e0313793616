"""The flags of a command, read into its config."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, TypeVar

_Config = TypeVar("_Config")


def parse(
    config_class: type[_Config],
    program: str,
    *,
    description: str | None,
    arguments: Sequence[str] | None = None,
    default: _Config | None = None,
) -> _Config:
    """The config that the flags ask for; ends with status 2 where they can't be read.

    Args:
      config_class: a dataclass, whose fields are the flags and their docstrings the help.
      program: the module's name under `experiments`.
      description: for `--help`.
      arguments: default: the command line's.
      default: of the flags that are not given; default: the class's own defaults.
    """
    try:
        import tyro
    except ModuleNotFoundError as error:
        if error.name != "tyro":
            raise
        print(
            f"error: experiments.{program} needs tyro, of the extra `experiments`, which is not "
            "installed: pip install -e '.[experiments]'",
            file=sys.stderr,
        )
        raise SystemExit(2) from error

    given: dict[str, Any] = {} if default is None else {"default": default}
    return tyro.cli(
        config_class,
        args=arguments,
        prog=f"python -m experiments.{program}",
        description=description,
        **given,
    )
