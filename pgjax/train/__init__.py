"""From an objective and an optimizer to a training run: state, update, loop, checkpoints, metrics."""

from pgjax.train import checkpoints, metrics
from pgjax.train.evaluation import evaluate_text
from pgjax.train.loop import Interrupted, fit
from pgjax.train.outputs import OutputsFunction, language_model_outputs
from pgjax.train.rollouts import to_rollout
from pgjax.train.state import TrainState, init
from pgjax.train.update import make_update

__all__ = [
    "Interrupted",
    "OutputsFunction",
    "TrainState",
    "checkpoints",
    "evaluate_text",
    "fit",
    "init",
    "language_model_outputs",
    "make_update",
    "metrics",
    "to_rollout",
]
