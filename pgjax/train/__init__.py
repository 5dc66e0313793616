"""From an objective and an optimizer to a run: state, update, loop, checkpoints, metrics."""

from pgjax.train import checkpoints, metrics
from pgjax.train.evaluation import accuracy_by_level, evaluate_text
from pgjax.train.loop import Interrupted, fit
from pgjax.train.outputs import OutputsFunction, language_model_outputs, record_experts
from pgjax.train.partial import combine, only, partition, trainable_mask
from pgjax.train.rollouts import demonstrations, to_rollout
from pgjax.train.state import TrainState, init, shardings
from pgjax.train.text import host_reward, make_text_step
from pgjax.train.update import make_update

__all__ = [
    "Interrupted",
    "OutputsFunction",
    "TrainState",
    "accuracy_by_level",
    "checkpoints",
    "combine",
    "demonstrations",
    "evaluate_text",
    "fit",
    "host_reward",
    "init",
    "language_model_outputs",
    "make_text_step",
    "make_update",
    "metrics",
    "only",
    "partition",
    "record_experts",
    "shardings",
    "to_rollout",
    "trainable_mask",
]
