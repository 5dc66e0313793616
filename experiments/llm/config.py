"""What can be set for a checkpoint's post-training, and published settings for some models."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Literal

from experiments.shared import runs
from experiments.shared.objectives import AggregateName, ObjectiveName
from experiments.shared.optimizers import OptimizerName

Train = Literal["full", "lora"]
DType = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class Data:
    """How problems are read and put to the model."""

    split: str = "train"
    """Of a TFDS data set."""
    test_split: str = "test"
    """Of a TFDS data set given as `test_task`."""
    data_dir: pathlib.Path | None = None
    """Where TFDS data sets live; default: TFDS_DATA_DIR or ~/tensorflow_datasets."""
    count: int = 5000
    """How many problems the synthetic task has."""
    prompt: Literal["chat", "plain"] = "chat"
    """With the tokenizer's chat template, or the question as it is."""
    system: str | None = None
    """System message; default: the template's own."""
    suffix: str = "\nReason step by step and put the final answer within \\boxed{}."
    """Added to every question."""
    prompt_lengths: tuple[int, ...] = (128, 256, 512)
    """Widths in tokens to which prompts are padded; longer ones are left out and counted."""


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What is trained, and how."""

    train: Train = "full"
    """All parameters, or low-rank adapters on frozen ones."""
    rank: int = 32
    """Of the adapters."""
    alpha: float = 64.0
    """Of the adapters: their product is scaled by alpha / rank."""
    targets: tuple[str, ...] = ("*",)
    """Which matrices get adapters, by pattern, such as layers/attention/*."""
    base: Literal["as_loaded", "int8", "nf4"] = "as_loaded"
    """How the frozen parameters are held beside adapters."""
    dtype: DType = "bfloat16"
    """Of activations and matrix products."""
    param_dtype: DType = "float32"
    """Of the parameters that are trained; frozen ones are held in `dtype`."""
    remat: Literal["full", "dots"] | None = "full"
    """What the backward pass recomputes to save memory."""
    optimizer: OptimizerName = "adamw"
    learning_rate: float = 1e-6
    """After `warmup_steps` of linear increase."""
    adam_learning_rate: float | None = None
    """Of what a matrix optimizer leaves to AdamW; default: the same. Not for other optimizers."""
    warmup_steps: int = 10
    """Steps until the full learning rate."""
    weight_decay: float = 0.0
    """For adamw, lion and muon."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient."""
    microbatches: int = 1
    """Parts of a minibatch whose gradients are accumulated."""
    packed: tuple[float, ...] = ()
    """Shares of a microbatch's rows into which its sequences may be packed, such as 0.25 0.5;
    none: no packing. For one device."""


@dataclasses.dataclass(frozen=True)
class RL:
    """Reinforcement."""

    steps: int = 200
    """Rollout batches."""
    prompts: int = 32
    """Prompts per step."""
    samples: int = 8
    """Completions per prompt: the group."""
    max_new_tokens: int = 512
    """Length budget of a completion."""
    temperature: float = 1.0
    """Of sampling, and of the log-probs that are trained."""
    epochs: int = 1
    """Passes over a batch of rollouts."""
    minibatches: int = 1
    """Optimizer steps per pass."""
    slots: int | None = None
    """Sample by continuous batching with so many slots; default: all completions at once."""
    routing_replay: Literal["none", "learner", "sampler"] = "none"
    """For mixtures of experts: every update uses the experts that the learner chose before its
    first update on the batch (R2), or those that the sampler used (R3)."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Held-out accuracy."""

    test_prompts: int = 256
    """Test problems before and after training; fewer where there are fewer."""
    validation_prompts: int = 64
    """Validation problems for the learning curves."""
    samples: int = 4
    """Samples per problem: avg@k, pass@k and maj@k with this k."""
    max_new_tokens: int = 512
    """Length budget of a completion."""
    temperature: float = 1.0
    """0 is greedy, with one sample."""
    batch: int = 32
    """Problems evaluated at a time."""
    every: int = 20
    """Steps between validations; 0 for only at the end."""


@dataclasses.dataclass(frozen=True)
class Common:
    """Fields of both experiments."""

    model: pathlib.Path = pathlib.Path("model")
    """Directory of a checkpoint in Hugging Face's format, tokenizer included."""
    task: str = "synthetic"
    """A JSON-lines file (fields as in GSM8K, MATH, or prompt and answer), the name of a prepared
    TFDS data set such as gsm8k, or synthetic: generated word problems."""
    test_task: str | None = None
    """Where the test problems come from; default: a part of `task`, chosen by a hash of each
    question, that training never sees."""
    out: pathlib.Path | None = None
    """Directory of the run; default: the next free one under runs/."""
    resume: bool = False
    """Continue the run in `out` (default: the newest), exactly where it stopped."""
    seed: int = 0
    """Of adapters, data order and sampling."""
    mesh: str = ""
    """Devices by axis, such as data=2,fsdp=4; default: all devices along data."""
    processes: runs.Processes = runs.ALONE
    checkpoint_every: int = 20
    """Steps between checkpoints."""
    show_every: int = 20
    """Steps between sampled completions shown above the progress bar; 0 for none."""
    profile: int | None = None
    """Trace three steps from this one on, into `profile` of the directory."""
    wandb: str | None = None
    """Project of Weights & Biases to write metrics to as well."""
    export: bool = True
    """Write the trained model in Hugging Face's format at the end."""
    verifier_workers: int = 2
    """Processes for answers that need symbolic comparison."""


@dataclasses.dataclass(frozen=True)
class GRPOConfig(Common):
    """Policy gradient on a checkpoint; the reward is a verifier's judgement of the final answer."""

    preset: Literal["default", "qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b", "qwen3-1.7b"] = (
        "default"
    )
    """Published settings for a model; any other flag overrides them."""
    objective: ObjectiveName = "grpo"
    """The recipe, from pgjax.objectives."""
    objective_options: tuple[str, ...] = ()
    """Keywords of the recipe, such as kl_coefficient=0.01 high=0.28."""
    aggregate: AggregateName | None = None
    """Reduction of the loss; default: the recipe's own, for grpo token_mean."""
    data: Data = Data()
    tuning: Tuning = Tuning()
    rl: RL = RL()
    evaluation: Evaluation = Evaluation()


@dataclasses.dataclass(frozen=True)
class SFTConfig(Common):
    """Maximum likelihood of worked solutions, on the assistant's tokens alone."""

    preset: Literal["default"] = "default"
    steps: int = 200
    """Optimizer steps."""
    batch_size: int = 32
    """Conversations per step."""
    lengths: tuple[int, ...] = (256, 512, 1024)
    """Widths in tokens to which conversations are padded; longer ones are left out and counted."""
    data: Data = Data()
    tuning: Tuning = Tuning(learning_rate=1e-5)
    evaluation: Evaluation = Evaluation()


_GSM8K = Data(prompt_lengths=(256, 512))

# Numbers that are not said to be ours are those of the source named.
GRPO_PRESETS: dict[str, GRPOConfig] = {
    "default": GRPOConfig(),
    # verl's GSM8K quick start: 256 prompts a batch, minibatches of 64, 512 and 256 tokens, 1e-6;
    # it is PPO there. Eight samples are ours.
    "qwen2.5-0.5b": GRPOConfig(
        preset="qwen2.5-0.5b",
        task="gsm8k",
        test_task="gsm8k",
        data=_GSM8K,
        tuning=Tuning(microbatches=8),
        rl=RL(steps=435, prompts=256, samples=8, max_new_tokens=256, minibatches=4),
    ),
    # Liu et al. 2025, arXiv 2503.20783 (Dr. GRPO on Qwen2.5-Math-1.5B): 128 prompts, 8 samples,
    # 1e-6, 3000 tokens, temperature 1, no KL.
    "qwen2.5-1.5b": GRPOConfig(
        preset="qwen2.5-1.5b",
        task="gsm8k",
        test_task="gsm8k",
        objective="dr_grpo",
        data=dataclasses.replace(_GSM8K, prompt_lengths=(256, 512, 1024)),
        tuning=Tuning(microbatches=32),
        rl=RL(steps=300, prompts=128, samples=8, max_new_tokens=3000),
    ),
    # verl's GRPO example for a 7B model on GSM8K: 1024 prompts, 5 samples, minibatches of 256,
    # 512 and 1024 tokens, 1e-6, KL 0.001 in the loss.
    "qwen2.5-7b": GRPOConfig(
        preset="qwen2.5-7b",
        task="gsm8k",
        test_task="gsm8k",
        objective_options=("kl_coefficient=0.001",),
        data=_GSM8K,
        tuning=Tuning(microbatches=32),
        rl=RL(steps=105, prompts=1024, samples=5, max_new_tokens=1024, minibatches=4),
        mesh="fsdp=-1",
    ),
    # torchforge's GRPO app for Qwen3-1.7B on GSM8K: groups of 8, 512 and 512 tokens, 1e-5; its
    # replay buffer has no counterpart here. 32 prompts are ours.
    "qwen3-1.7b": GRPOConfig(
        preset="qwen3-1.7b",
        task="gsm8k",
        test_task="gsm8k",
        data=_GSM8K,
        tuning=Tuning(learning_rate=1e-5, warmup_steps=1, microbatches=8),
        rl=RL(steps=200, prompts=32, samples=8, max_new_tokens=512),
    ),
}
SFT_PRESETS: dict[str, SFTConfig] = {"default": SFTConfig()}

GRPO_RUNS = pathlib.Path("runs/grpo_llm")
SFT_RUNS = pathlib.Path("runs/sft")
