"""From an objective and an optimizer to a run: state, update, loop, checkpoints, metrics."""

from pgjax.train import checkpoints, metrics
from pgjax.train.collecting import make_collect
from pgjax.train.evaluation import accuracy_by_level, evaluate_text
from pgjax.train.loop import Interrupted, NonFinite, fit
from pgjax.train.observing import Profile
from pgjax.train.outputs import OutputsFunction, language_model_outputs, record_experts
from pgjax.train.partial import combine, only, partition, trainable_mask
from pgjax.train.rollouts import demonstrations, to_rollout
from pgjax.train.skipped import describe_skipped, keep_skipped, load_skipped
from pgjax.train.split import Lookahead, SplitState, SplitStep
from pgjax.train.state import TrainState, init, shardings
from pgjax.train.text import host_reward, make_text_step
from pgjax.train.update import make_update

__all__ = [
    "Interrupted",
    "Lookahead",
    "NonFinite",
    "OutputsFunction",
    "Profile",
    "SplitState",
    "SplitStep",
    "TrainState",
    "accuracy_by_level",
    "checkpoints",
    "combine",
    "demonstrations",
    "describe_skipped",
    "evaluate_text",
    "fit",
    "host_reward",
    "init",
    "keep_skipped",
    "language_model_outputs",
    "load_skipped",
    "make_collect",
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
