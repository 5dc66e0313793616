"""What can be set, its defaults by kind of machine, and how it comes from a command line."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Literal

from experiments.shared import runs
from experiments.shared.objectives import AggregateName, ObjectiveName
from experiments.shared.optimizers import OptimizerName

RewardName = Literal["exact", "continuous", "random", "inverted", "majority_incorrect"]
Preset = Literal["cpu", "gpu", "tpu-pod"]


@dataclasses.dataclass(frozen=True)
class Model:
    """The decoder."""

    hidden_size: int = 128
    """Width of the residual stream."""
    num_layers: int = 3
    """Transformer layers."""
    num_heads: int = 4
    """Query heads."""
    num_kv_heads: int = 4
    """Key and value heads; fewer than query heads is grouped-query attention."""
    mlp_size: int = 512
    """Width of the MLP."""
    activation: Literal["relu", "silu", "gelu"] = "relu"
    """Nonlinearity of the MLP."""
    gated: bool = False
    """Gated MLP, as in Llama."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations and matrix products; parameters stay float32."""
    remat: Literal["full", "dots"] | None = "full"
    """What the backward pass recomputes; saves memory, and on CPUs also time."""


@dataclasses.dataclass(frozen=True)
class Warmup:
    """Supervised warm-up on worked and direct solutions."""

    steps: int = 600
    """Optimizer steps."""
    batch_size: int = 128
    """Sequences per step."""
    learning_rate: float = 2e-2
    """Peak of Muon's, on the layers' matrices; linear warm-up, then cosine decay to a tenth."""
    adam_learning_rate: float = 2e-3
    """Peak of AdamW's, on embeddings, head and norms."""
    levels: tuple[int, ...] = (1, 2, 3, 4)
    """Levels (numbers of operators) demonstrated."""
    microbatches: int = 4
    """Parts of a batch, sorted by length, whose gradients are accumulated."""
    worked_probability: float = 0.3
    """Share of demonstrations that write out every line; the others state the value at once."""


@dataclasses.dataclass(frozen=True)
class RL:
    """Reinforcement."""

    steps: int = 200
    """Rollout batches."""
    prompts: int = 32
    """Prompts per step."""
    samples: int = 8
    """Completions per prompt: the group."""
    levels: tuple[int, ...] = (2, 3, 4)
    """Levels the prompts are drawn from."""
    learning_rate: float = 2e-4
    """After `warmup_steps` of linear increase."""
    adam_learning_rate: float | None = None
    """Of what a matrix optimizer leaves to AdamW; default: the same. Not for other optimizers."""
    warmup_steps: int = 10
    """Steps until the full learning rate."""
    temperature: float = 1.0
    """Of sampling, and of the log-probs that are trained."""
    epochs: int = 1
    """Passes over each rollout batch."""
    minibatches: int = 1
    """Optimizer steps per pass."""
    microbatches: int = 4
    """Parts of a minibatch, sorted by length, whose gradients are accumulated."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient."""
    weight_decay: float = 0.0
    """For adamw, lion and muon."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """Sampling on devices of its own, while the others learn from what was sampled before."""

    sampling_mesh: str = ""
    """Devices that only sample, by axis, such as data=4: the last ones; `mesh` is of the others.
    Default: all devices sample and learn in turn."""
    staleness: int = 1
    """Updates between sampling and learning, with a sampling mesh."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Held-out accuracy."""

    levels: tuple[int, ...] = (1, 2, 3, 4)
    """Levels evaluated."""
    samples: int = 8
    """Samples per prompt: avg@k, pass@k and maj@k with this k."""
    test_prompts: int = 512
    """Test prompts per level, before and after the reinforcement."""
    validation_prompts: int = 64
    """Validation prompts per level, for the learning curves."""
    every: int = 50
    """Steps between validations."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Supervised warm-up, then policy gradient, on RandomCalculation."""

    preset: Preset = "cpu"
    """Defaults for a kind of machine; any other flag overrides them."""
    objective: ObjectiveName = "grpo"
    """The recipe, from pgjax.objectives."""
    objective_options: tuple[str, ...] = ()
    """Keywords of the recipe, such as kl_coefficient=0.01 high=0.28."""
    aggregate: AggregateName | None = None
    """Reduction of the loss; default: the recipe's own, for grpo token_mean, as most code today."""
    optimizer: OptimizerName = "adam"
    """Of the reinforcement; the warm-up uses Muon and AdamW."""
    reward: RewardName = "exact"
    """What a completion earns: exact match, the paper's continuous reward, or a spurious one."""
    seed: int = 0
    """Of initialisation, data order and sampling, warm-up included."""
    data_preset: Literal["micro9", "micro19", "mini99"] = "micro19"
    """Numbers and operators of the expressions."""
    data_dir: pathlib.Path | None = None
    """Where data sets live; default: TFDS_DATA_DIR or ~/tensorflow_datasets."""
    out: pathlib.Path | None = None
    """Directory of the run; default: the next free runs/grpo_random_calculation/NNN."""
    resume: bool = False
    """Continue the run in `out` (default: the newest), exactly where it stopped."""
    warmup_from: pathlib.Path | None = None
    """Start from the warmed-up model of another run's directory instead of warming up."""
    mesh: str = ""
    """Devices by axis, such as data=2,fsdp=4; default: all devices along data."""
    placement: Placement = Placement()
    processes: runs.Processes = runs.ALONE
    checkpoint_every: int = 50
    """Steps between checkpoints."""
    show_every: int = 50
    """Steps between sampled completions shown above the progress bar; 0 for none."""
    profile: int | None = None
    """Trace three steps of the reinforcement from this one on, into `profile` of the directory."""
    wandb: str | None = None
    """Project of Weights & Biases to write metrics to as well."""
    model: Model = Model()
    warmup: Warmup = Warmup()
    rl: RL = RL()
    evaluation: Evaluation = Evaluation()


_LARGE_MODEL = Model(
    hidden_size=384, num_layers=6, num_heads=6, num_kv_heads=6, mlp_size=1536, dtype="bfloat16"
)
PRESETS: dict[str, Config] = {
    "cpu": Config(),
    "gpu": Config(
        preset="gpu",
        data_preset="mini99",
        model=_LARGE_MODEL,
        warmup=Warmup(steps=2000, batch_size=512),
        rl=RL(prompts=128, samples=16, steps=600, levels=(2, 3, 4, 5), learning_rate=1e-4),
        evaluation=Evaluation(levels=(1, 2, 3, 4, 5)),
    ),
    "tpu-pod": Config(
        preset="tpu-pod",
        data_preset="mini99",
        mesh="data=-1",
        model=dataclasses.replace(_LARGE_MODEL, hidden_size=512, num_heads=8, num_kv_heads=8),
        warmup=Warmup(steps=2000, batch_size=2048),
        rl=RL(prompts=512, samples=16, steps=600, levels=(2, 3, 4, 5), learning_rate=2e-4),
        evaluation=Evaluation(levels=(1, 2, 3, 4, 5)),
    ),
}


RUNS = pathlib.Path("runs/grpo_random_calculation")


def load_config(directory: pathlib.Path) -> Config:
    """The config that a run was started with."""
    return runs.load_config(Config, directory)


def next_run() -> pathlib.Path:
    return runs.next_run(RUNS)


def parse(arguments: list[str], *, description: str | None = None) -> Config:
    """The config of a command line: a preset's (or the resumed run's) defaults, then the flags."""
    return runs.parse(
        Config,
        arguments,
        presets=PRESETS,
        default_preset="cpu",
        root=RUNS,
        program="grpo_random_calculation",
        description=description,
    )
