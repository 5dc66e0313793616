"""Policy gradients as pure JAX functions.

The numeric core is imported at once; rooms with heavier dependencies on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pgjax import (
    advantages,
    aggregate,
    logprobs,
    masks,
    objectives,
    returns,
    segments,
    surrogates,
    types,
)
from pgjax.objectives import Objective, Regularizer
from pgjax.types import PolicyOutputs, Rollout, Transition

__version__ = "0.1.0"

_LAZY = (
    "agents",
    "contrastive",
    "curriculum",
    "diagnostics",
    "envs",
    "models",
    "optim",
    "parallel",
    "policies",
    "quantize",
    "rewards",
    "sampling",
    "search",
    "tasks",
    "train",
    "uncertainty",
    "values",
)

if TYPE_CHECKING:
    from pgjax import (
        agents,
        contrastive,
        curriculum,
        diagnostics,
        envs,
        models,
        optim,
        parallel,
        policies,
        quantize,
        rewards,
        sampling,
        search,
        tasks,
        train,
        uncertainty,
        values,
    )


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"pgjax.{name}")
    raise AttributeError(f"module 'pgjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])


__all__ = [
    "Objective",
    "PolicyOutputs",
    "Regularizer",
    "Rollout",
    "Transition",
    "advantages",
    "agents",
    "aggregate",
    "contrastive",
    "curriculum",
    "diagnostics",
    "envs",
    "logprobs",
    "masks",
    "models",
    "objectives",
    "optim",
    "parallel",
    "policies",
    "quantize",
    "returns",
    "rewards",
    "sampling",
    "search",
    "segments",
    "surrogates",
    "tasks",
    "train",
    "types",
    "uncertainty",
    "values",
]
