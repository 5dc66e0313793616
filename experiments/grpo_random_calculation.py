"""Teaches a small language model arithmetic by policy gradient, from scratch.

A supervised warm-up on RandomCalculation gives a model with two habits, answering directly and
writing out the worked lines; then any objective, with only the final answer's correctness as
reward, makes it choose the better habit and sharpen it. Nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import pathlib
import sys
import time
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import pgjax as pg
from pgjax.tasks import random_calculation as task
from pgjax.train import evaluation, text

ObjectiveName = Literal[
    "grpo", "dr_grpo", "dapo", "gspo", "cispo", "lite_ppo", "ppo", "rloo", "reinforce",
    "reinforce_pp",
]  # fmt: skip
OptimizerName = Literal["adam", "adamw", "sgd", "lion", "muon"]
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

    steps: int = 1400
    """Optimizer steps."""
    batch_size: int = 128
    """Sequences per step."""
    learning_rate: float = 2e-3
    """Peak; 50 steps of linear warm-up, then cosine decay to a tenth."""
    levels: tuple[int, ...] = (1, 2, 3)
    """Levels (numbers of operators) demonstrated."""
    microbatches: int = 4
    """Parts of a batch, sorted by length, whose gradients are accumulated."""
    worked_probability: float = 0.35
    """Share of demonstrations that write out every line; the others state the value at once."""


@dataclasses.dataclass(frozen=True)
class RL:
    """Reinforcement."""

    steps: int = 400
    """Rollout batches."""
    prompts: int = 32
    """Prompts per step."""
    samples: int = 8
    """Completions per prompt: the group."""
    levels: tuple[int, ...] = (2, 3, 4)
    """Levels the prompts are drawn from."""
    learning_rate: float = 2e-4
    """After `warmup_steps` of linear increase."""
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
    aggregate: (
        Literal["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum"] | None
    ) = None
    """Reduction of the loss; default: the recipe's own, for grpo token_mean, as most code today."""
    optimizer: OptimizerName = "adam"
    """Of the reinforcement; the warm-up uses adamw."""
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
    checkpoint_every: int = 50
    """Steps between checkpoints."""
    show_every: int = 50
    """Steps between sampled completions shown above the progress bar; 0 for none."""
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
        warmup=Warmup(steps=4000, batch_size=512, learning_rate=1e-3, levels=(1, 2, 3, 4)),
        rl=RL(prompts=128, samples=16, steps=600, levels=(2, 3, 4, 5), learning_rate=1e-4),
        evaluation=Evaluation(levels=(1, 2, 3, 4, 5)),
    ),
    "tpu-pod": Config(
        preset="tpu-pod",
        data_preset="mini99",
        mesh="data=-1",
        model=dataclasses.replace(_LARGE_MODEL, hidden_size=512, num_heads=8, num_kv_heads=8),
        warmup=Warmup(steps=4000, batch_size=2048, learning_rate=1e-3, levels=(1, 2, 3, 4)),
        rl=RL(prompts=512, samples=16, steps=600, levels=(2, 3, 4, 5), learning_rate=2e-4),
        evaluation=Evaluation(levels=(1, 2, 3, 4, 5)),
    ),
}

# --- configuration from the command line, and back from a run's directory ------------------------


def _nested(cls: type, values: dict[str, Any]) -> Any:
    """A config dataclass from its JSON form."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    sections = {"model": Model, "warmup": Warmup, "rl": RL, "evaluation": Evaluation}
    paths = ("data_dir", "out", "warmup_from")
    made: dict[str, Any] = {}
    for name, value in values.items():
        if name not in fields:
            raise ValueError(f"config.json: unknown field {name!r}")
        if name in sections and cls is Config:
            value = _nested(sections[name], value)
        elif isinstance(value, list):
            value = tuple(value)
        elif name in paths and value is not None:
            value = pathlib.Path(value)
        made[name] = value
    return cls(**made)


def load_config(directory: pathlib.Path) -> Config:
    """The config that a run was started with."""
    path = directory / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no run to resume here (no config.json)")
    return _nested(Config, json.loads(path.read_text()))


RUNS = pathlib.Path("runs/grpo_random_calculation")


def _newest_run() -> pathlib.Path:
    found = sorted(p.parent for p in RUNS.glob("[0-9]*/config.json"))
    if not found:
        raise FileNotFoundError(f"{RUNS}: no run to resume here; start one without --resume")
    return found[-1]


def _next_run() -> pathlib.Path:
    numbers = [int(p.name) for p in RUNS.glob("[0-9]*") if p.name.isdigit()]
    return RUNS / f"{max(numbers, default=0) + 1:03d}"


def _peek(arguments: list[str], flag: str) -> str | None:
    """The value of a flag, before the full parser knows its defaults."""
    for i, argument in enumerate(arguments):
        if argument == flag and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith(flag + "="):
            return argument.partition("=")[2]
    return None


def parse(arguments: list[str]) -> Config:
    """The config of a command line: a preset's (or the resumed run's) defaults, then the flags."""
    import tyro

    default = PRESETS.get(_peek(arguments, "--preset") or "cpu", Config())
    if "--resume" in arguments:
        out = _peek(arguments, "--out")
        directory = pathlib.Path(out) if out else _newest_run()
        default = dataclasses.replace(load_config(directory), out=directory, resume=True)
    return tyro.cli(
        Config,
        args=arguments,
        default=default,
        prog="python -m experiments.grpo_random_calculation",
        description=__doc__,
    )


def make_objective(config: Config) -> pg.Objective:
    """The recipe with its options, for instance `kl_coefficient=0.01`."""
    recipe = getattr(pg.objectives, config.objective)
    options: dict[str, Any] = {}
    for option in config.objective_options:
        name, equals, value = option.partition("=")
        if not equals:
            raise ValueError(f"objective_options: expected name=value, got {option!r}")
        try:
            options[name] = json.loads(value.replace("True", "true").replace("False", "false"))
        except json.JSONDecodeError:
            raise ValueError(
                f"objective_options: {name}: expected a number or true/false, got {value!r}"
            ) from None
    if config.objective == "dr_grpo":
        options.setdefault("length", max_new_tokens(config))
    known = inspect.signature(recipe).parameters
    for name in options:
        if name not in known:
            raise ValueError(
                f"objective_options: {config.objective} has no option {name!r}, "
                f"only {', '.join(known) or 'none'}"
            )
    objective = recipe(**options)
    aggregate = config.aggregate or ("token_mean" if config.objective == "grpo" else None)
    if aggregate is None:
        return objective
    return dataclasses.replace(objective, aggregate=getattr(pg.aggregate, aggregate))


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Clipping by global norm, then the named optimizer with a linearly warmed-up rate."""
    rl = config.rl
    rate = optax.linear_schedule(
        rl.learning_rate / rl.warmup_steps, rl.learning_rate, rl.warmup_steps
    )
    optimizer = {
        "adam": lambda: optax.adam(rate, b1=0.9, b2=0.99),
        "adamw": lambda: optax.adamw(rate, b1=0.9, b2=0.99, weight_decay=rl.weight_decay),
        "sgd": lambda: optax.sgd(rate, momentum=0.9),
        "lion": lambda: optax.lion(rate, weight_decay=rl.weight_decay),
        "muon": lambda: optax.contrib.muon(rate, weight_decay=rl.weight_decay),
    }[config.optimizer]()
    return optax.chain(optax.clip_by_global_norm(rl.clip_norm), optimizer)


# --- the parts of a run ---------------------------------------------------------------------------


def prompt_length(config: Config) -> int:
    levels = config.warmup.levels + config.rl.levels + config.evaluation.levels
    return max(task.prompt_length_bound(task.PRESETS[config.data_preset], n) for n in levels)


def max_new_tokens(config: Config) -> int:
    levels = config.rl.levels + config.evaluation.levels
    return max(task.response_length_bound(task.PRESETS[config.data_preset], n) for n in levels)


def widths(length: int) -> tuple[int, ...]:
    """Row lengths at which an update is compiled: a third and two thirds of the longest row."""
    return (length // 3, 2 * length // 3)


def make_decoder(config: Config) -> tuple[pg.models.FunctionalDecoder, Any]:
    model = config.model
    key, head_key = jax.random.split(jax.random.key(config.seed))
    decoder_config = pg.models.DecoderConfig(
        vocab_size=task.VOCAB_SIZE,
        hidden_size=model.hidden_size,
        num_layers=model.num_layers,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        mlp_size=model.mlp_size,
        activation=model.activation,
        gated=model.gated,
        rope_theta=1000.0,
        tied_embeddings=False,
        max_length=prompt_length(config) + max_new_tokens(config),
        dtype=model.dtype,
        remat=model.remat,
    )
    decoder, params = pg.models.init(decoder_config, key)
    params = {"decoder": params}
    if config.objective == "ppo":
        params["value_head"] = pg.models.value_head_init(decoder_config, head_key)
    return decoder, params


def make_reward(
    config: Config, decoder: pg.models.FunctionalDecoder, initial: Any
) -> text.RewardFunction:
    """The reward of a completion, judged on the device."""

    def exact(samples: Any, batch: Any, key: Any) -> Any:
        reference = jnp.asarray(batch["answers"])[samples.prompt_ids]
        return pg.rewards.exact_reward(*graded(samples, reference))

    def graded(samples: Any, reference: Any) -> tuple[Any, Any, Any]:
        values, ok = task.parse_answer(samples.tokens, samples.mask)
        return values, reference, ok

    def continuous(samples: Any, batch: Any, key: Any) -> Any:
        reference = jnp.asarray(batch["answers"])[samples.prompt_ids]
        return pg.rewards.numeric_reward(*graded(samples, reference))

    def random(samples: Any, batch: Any, key: Any) -> Any:
        return pg.rewards.random_reward(key, samples.tokens.shape[0], gamma=0.5)

    def inverted(samples: Any, batch: Any, key: Any) -> Any:
        return pg.rewards.inverted_reward(exact(samples, batch, key))

    def majority_incorrect(samples: Any, batch: Any, key: Any) -> Any:
        """1 for the wrong answer the *initial* model gives most often to this prompt."""
        before = generate(config, decoder, initial, batch, key)
        values, ok = task.parse_answer(before.tokens, before.mask)
        shape = (-1, config.rl.samples)
        label, exists = pg.rewards.majority_incorrect_label(
            values.reshape(shape), ok.reshape(shape), jnp.asarray(batch["answers"])
        )
        ids = samples.prompt_ids
        values, reference, ok = graded(samples, label[ids])
        return pg.rewards.exact_reward(values, reference, ok & exists[ids])

    functions = {
        "exact": exact,
        "continuous": continuous,
        "random": random,
        "inverted": inverted,
        "majority_incorrect": majority_incorrect,
    }
    function = functions[config.reward]
    return function if config.reward == "majority_incorrect" else jax.jit(function)


def generate(
    config: Config, decoder: pg.models.FunctionalDecoder, params: Any, batch: Any, key: Any
) -> pg.sampling.Samples:
    return pg.sampling.generate(
        decoder,
        params["decoder"],
        batch["prompts"],
        batch["prompt_lengths"],
        key,
        num_samples=config.rl.samples,
        max_new_tokens=max_new_tokens(config),
        temperature=config.rl.temperature,
        stop_tokens=(task.EOS,),
    )


def demonstration_rollout(batch: dict[str, np.ndarray]) -> pg.Rollout:
    size = batch["tokens"].shape[0]
    return pg.Rollout(
        tokens=jnp.asarray(batch["tokens"]),
        mask=jnp.asarray(batch["mask"]),
        behavior_logprobs=jnp.zeros(batch["tokens"].shape, jnp.float32),
        rewards=jnp.ones(size, jnp.float32),
        group_ids=jnp.arange(size, dtype=jnp.int32),
    )


def evaluation_batches(
    source: task.Source, levels: tuple[int, ...], per_level: int, length: int
) -> list[dict[str, np.ndarray]]:
    """The first `per_level` prompts of every level, easy ones first, in batches of one size."""
    rows = pg.tasks.prompt_arrays(source, prompt_length=length, levels=levels, per_level=per_level)
    order = np.argsort(rows["levels"], kind="stable")
    size = max(d for d in range(1, 129) if len(order) % d == 0)
    return [
        {name: values[part] for name, values in rows.items()} for part in order.reshape(-1, size)
    ]


# --- the run --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run came to: test accuracy by level before and after the reinforcement."""

    directory: pathlib.Path
    before: dict[int, evaluation.Accuracy]
    after: dict[int, evaluation.Accuracy]
    seconds: dict[str, float]
    tokens_per_second: float


class Run:
    """One run: everything that does not change from step to step."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.mesh = pg.parallel.make_mesh(config.mesh)
        self.directory = config.out or _next_run()
        self._claim_directory()
        self.decoder, self.params = make_decoder(config)
        self.sources = {
            split: task.data_source(config.data_preset, split, data_dir=config.data_dir)
            for split in ("train", "validation", "test")
        }
        self.prompt_length = prompt_length(config)
        self.max_new_tokens = max_new_tokens(config)
        axes: dict[str, Any] = {"decoder": self.decoder.logical_axes()}
        if "value_head" in self.params:
            axes["value_head"] = pg.models.value_head_logical_axes()
        self.shardings = pg.parallel.shardings(axes, self.mesh, shapes=self.params)
        self.writer = pg.train.metrics.MetricsWriter(self.directory)

    def _claim_directory(self) -> None:
        path = self.directory / "config.json"
        if path.exists() and not self.config.resume:
            raise FileExistsError(
                f"{self.directory} already holds a run: pass --resume to continue it, "
                "or another --out"
            )
        self.directory.mkdir(parents=True, exist_ok=True)
        saved = dataclasses.asdict(dataclasses.replace(self.config, resume=False))
        path.write_text(json.dumps(saved, indent=2, default=str) + "\n")

    def place(self, batch: Any) -> Any:
        """Spreads the rows of a batch over the mesh."""
        sharding = pg.parallel.batch_sharding(self.mesh)
        return jax.tree.map(lambda x: jax.device_put(x, sharding), batch)

    def fit(
        self,
        phase: str,
        state: pg.train.TrainState,
        step: text.Step,
        batches: Any,
        num_steps: int,
        **options: Any,
    ) -> pg.train.TrainState:
        """Runs a phase to its end, from its newest checkpoint where there is one."""
        with pg.train.checkpoints.open(
            self.directory / "checkpoints" / phase,
            keep_last=2,
            keep_best=1,
            best_metric="accuracy",
        ) as saved:
            if saved.latest_step() is not None:
                state, metadata = saved.restore(like=state)
                batches.set_state(metadata["batches"])
            self.writer.truncate_after(int(state.step), phase=phase, phases=("warmup", "rl"))
            state = pg.train.fit(
                step,
                state,
                batches,
                num_steps=num_steps,
                phase=phase,
                writer=self.writer,
                checkpoints=saved,
                checkpoint_every=self.config.checkpoint_every,
                metadata={"config": json.loads((self.directory / "config.json").read_text())},
                **options,
            )
        return state

    def warm_up(self) -> Any:
        """Parameters after the supervised phase."""
        config = self.config
        optimizer = optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.adamw(
                optax.warmup_cosine_decay_schedule(
                    0.0,
                    config.warmup.learning_rate,
                    min(50, config.warmup.steps // 4),
                    max(config.warmup.steps, 1),
                    0.1 * config.warmup.learning_rate,
                ),
                b1=0.9,
                b2=0.98,
                weight_decay=0.01,
            ),
        )
        task_config = task.PRESETS[config.data_preset]
        length = max(
            task.prompt_length_bound(task_config, n) + task.response_length_bound(task_config, n)
            for n in config.warmup.levels
        )
        params = pg.parallel.shard(self.params["decoder"], self.shardings["decoder"])
        state = pg.train.init({"decoder": params}, optimizer, jax.random.key(config.seed))
        update = pg.train.make_update(
            pg.train.language_model_outputs(self.decoder),
            pg.objectives.supervised(),
            optimizer,
            num_microbatches=config.warmup.microbatches,
            widths=widths(length),
            state_shardings=pg.train.shardings(state),
        )
        batches = pg.tasks.sft_loader(
            self.sources["train"],
            length=length,
            batch_size=config.warmup.batch_size,
            worked_probability=config.warmup.worked_probability,
            levels=config.warmup.levels,
            seed=config.seed,
        )

        def step(state: pg.train.TrainState, batch: Any) -> Any:
            state, metrics = update(state, self.place(demonstration_rollout(batch)))
            shown = {name: metrics[name] for name in ("loss", "gradient_norm", "entropy")}
            return state, {**shown, "tokens": batch["mask"].sum()}

        state = self.fit(
            "warmup",
            state,
            step,
            batches,
            config.warmup.steps,
            progress_fields=("loss", "entropy", "tokens/s"),
        )
        return state.params["decoder"]

    def evaluate(self, split: str, per_level: int, params: Any, *, greedy: bool = False) -> Any:
        """Accuracy by level of the decoder's parameters."""
        batches = evaluation_batches(
            self.sources[split], self.config.evaluation.levels, per_level, self.prompt_length
        )
        samples = 1 if greedy else self.config.evaluation.samples
        graded = evaluation.evaluate_text(
            self.decoder,
            params,
            batches,
            lambda samples: task.parse_answer(samples.tokens, samples.mask),
            jax.random.key(self.config.seed + 1),
            num_samples=samples,
            max_new_tokens=self.max_new_tokens,
            stop_tokens=(task.EOS,),
            temperature=0.0 if greedy else 1.0,
        )
        return evaluation.accuracy_by_level(graded, k=samples)

    def test(self, name: str, params: Any) -> dict[int, evaluation.Accuracy]:
        """Test accuracy, measured once and kept in the run's directory."""
        path = self.directory / f"test_{name}.json"
        if path.exists():
            stored = json.loads(path.read_text())["sampled"]
            return {int(n): evaluation.Accuracy(**a) for n, a in stored.items()}
        count = self.config.evaluation.test_prompts
        sampled = self.evaluate("test", count, params)
        greedy = self.evaluate("test", count, params, greedy=True)
        content = {
            "sampled": {n: a._asdict() for n, a in sampled.items()},
            "greedy": {n: a._asdict() for n, a in greedy.items()},
        }
        path.write_text(json.dumps(content, indent=2) + "\n")
        return sampled

    def reinforce(self, initial: Any) -> tuple[Any, float]:
        """Parameters after the policy-gradient phase, and sampled tokens per second."""
        config, rl = self.config, self.config.rl
        optimizer = make_optimizer(config)
        # The update donates its state, so the learner gets a copy; the reference stays as it is.
        reference = {"decoder": initial}
        params = {**self.params, "decoder": jax.tree.map(jnp.copy, initial)}
        params = pg.parallel.shard(params, self.shardings)
        state = pg.train.init(params, optimizer, jax.random.key(config.seed))
        update = pg.train.make_update(
            pg.train.language_model_outputs(self.decoder, temperature=rl.temperature),
            make_objective(config),
            optimizer,
            num_epochs=rl.epochs,
            num_minibatches=rl.minibatches,
            num_microbatches=rl.microbatches,
            widths=widths(self.prompt_length + self.max_new_tokens),
            state_shardings=pg.train.shardings(state),
        )
        shown: list[str] = []

        def show(at: int, samples: Any, rewards: Any) -> None:
            if config.show_every and at % config.show_every == 0:
                shown[:] = completions(samples, rewards, count=4)

        inner = text.make_text_step(
            self.decoder,
            update,
            make_reward(config, self.decoder, reference),
            num_samples=rl.samples,
            max_new_tokens=self.max_new_tokens,
            stop_tokens=(task.EOS,),
            temperature=rl.temperature,
            reference_params=reference,
            on_samples=show,
        )

        def step(state: pg.train.TrainState, batch: Any) -> Any:
            return inner(state, self.place(batch))

        def validate(state: pg.train.TrainState) -> dict[str, float]:
            count = config.evaluation.validation_prompts
            levels = self.evaluate("validation", count, state.params["decoder"])
            metrics = {f"accuracy/level {n}": a.average for n, a in levels.items()}
            metrics |= {f"length/level {n}": a.length for n, a in levels.items()}
            return {**metrics, "accuracy": float(np.mean([a.average for a in levels.values()]))}

        def pop_shown(at: int, state: pg.train.TrainState) -> str | None:
            text, shown[:] = "\n".join(shown), []
            return text or None

        state = self.fit(
            "rl",
            state,
            step,
            pg.tasks.prompts_loader(
                self.sources["train"],
                prompt_length=self.prompt_length,
                num_prompts=rl.prompts,
                levels=rl.levels,
                seed=config.seed,
            ),
            rl.steps,
            evaluate=validate,
            evaluate_every=config.evaluation.every,
            progress_fields=("reward", "approx_kl", "entropy", "tokens/s"),
            on_step=pop_shown,
        )
        records = pg.train.metrics.read_metrics(self.directory / "metrics.jsonl")
        speeds = [r["tokens/s"] for r in records if r["phase"] == "rl"]
        return state.params["decoder"], float(np.median(speeds))


def completions(samples: Any, rewards: Any, *, count: int) -> list[str]:
    """Sampled completions as text, one of each of the first prompts."""
    tokens, mask = np.asarray(samples.tokens), np.asarray(samples.mask)
    lines = []
    for prompt in range(count):
        rows = np.flatnonzero(np.asarray(samples.prompt_ids) == prompt)
        if not len(rows):
            break
        row = rows[0]
        start = int(mask[row].argmax())
        end = start + int(mask[row].sum())
        response = task.decode([t for t in tokens[row, start:end] if t != task.EOS])
        mark = "✓" if float(rewards[row]) > 0.5 else "✗"
        lines.append(f"  {mark} {task.decode(tokens[row, :start])} {response}")
    return lines


def run(config: Config) -> Result:
    """Warm-up, test, reinforcement, test; resumable at any point."""
    started = time.perf_counter()
    this = Run(config)
    warmed = warmed_up(this)
    warm_seconds = time.perf_counter() - started
    before = this.test("before", warmed)
    began = time.perf_counter()
    trained, speed = this.reinforce(warmed)
    rl_seconds = time.perf_counter() - began
    after = this.test("after", trained)
    this.writer.close()
    seconds = {
        "warmup": warm_seconds,
        "reinforcement": rl_seconds,
        "total": time.perf_counter() - started,
    }
    result = Result(this.directory, before, after, seconds, speed)
    write_report(config, result)
    return result


def warmed_up(this: Run) -> Any:
    """The decoder's parameters after the warm-up: this run's, or another's that it starts from."""
    own = this.directory / "checkpoints" / "warmed_up"
    like = pg.parallel.shard(this.params["decoder"], this.shardings["decoder"])
    source = this.config.warmup_from
    directory = own if source is None else source / "checkpoints" / "warmed_up"
    if source is None and not own.exists():
        params = this.warm_up()
        with pg.train.checkpoints.open(own) as saved:
            saved.save(this.config.warmup.steps, params)
        return params
    if not directory.is_dir():
        raise FileNotFoundError(f"warmup_from: no warmed-up model in {directory}")
    with pg.train.checkpoints.open_readonly(directory) as saved:
        params, _ = saved.restore(like=like)
    return params


# --- the end: table, picture, files ---------------------------------------------------------------


def write_report(config: Config, result: Result) -> None:
    """results.json and curves.png in the run's directory."""
    content = {
        "before": {n: a._asdict() for n, a in result.before.items()},
        "after": {n: a._asdict() for n, a in result.after.items()},
        "seconds": result.seconds,
        "tokens_per_second": result.tokens_per_second,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    (result.directory / "results.json").write_text(json.dumps(content, indent=2) + "\n")
    records = pg.train.metrics.read_metrics(result.directory)

    def curve(phase: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        rows = [r for r in records if r["phase"] == phase and name in r]
        return np.array([r["step"] for r in rows]), np.array([r[name] for r in rows])

    levels = config.evaluation.levels
    panels: dict[str, dict[str, tuple[Any, Any]]] = {
        "warm-up loss (nats per token)": {"loss": curve("warmup", "loss")},
        "reward (training prompts)": {config.reward: curve("rl", "reward")},
        "validation accuracy": {
            f"level {n}": curve("rl_evaluation", f"accuracy/level {n}") for n in levels
        },
        "completion length (tokens)": {"training": curve("rl", "completion_length")},
        "entropy (nats per token)": {"policy": curve("rl", "entropy")},
        "groups without signal": {"share": curve("rl", "groups_without_signal")},
    }
    pg.train.metrics.plot_curves(
        {title: lines for title, lines in panels.items() if all(len(x) for x, _ in lines.values())},
        result.directory / "curves.png",
        title=f"{config.objective} on RandomCalculation, {config.data_preset}, seed {config.seed}",
        smooth=10,
    )


def print_report(config: Config, result: Result) -> None:
    """The table a person reads at the end, and where everything lies."""
    import rich

    def with_interval(a: evaluation.Accuracy) -> str:
        return f"{100 * a.average:.1f} [{100 * a.low:.1f}, {100 * a.high:.1f}]"

    k = config.evaluation.samples
    rows = [
        {
            "level": level,
            f"before: avg@{k} [95%]": with_interval(before),
            "after": with_interval(after),
            "gain": f"{100 * (after.average - before.average):+.1f}",
            f"pass@{k}": f"{100 * before.pass_at_k:.1f} → {100 * after.pass_at_k:.1f}",
            f"maj@{k}": f"{100 * before.majority_at_k:.1f} → {100 * after.majority_at_k:.1f}",
            "tokens": f"{before.length:.1f} → {after.length:.1f}",
        }
        for level, before in result.before.items()
        for after in [result.after[level]]
    ]
    title = "Accuracy in % on held-out (test) problems, before and after the reinforcement"
    rich.print(pg.train.metrics.summary_table(rows, title=title))
    seconds = result.seconds
    rich.print(
        f"{result.tokens_per_second:,.0f} sampled tokens/s in the reinforcement; "
        f"warm-up {seconds['warmup']:.0f} s, reinforcement {seconds['reinforcement']:.0f} s, "
        f"in all {seconds['total']:.0f} s"
    )
    for path in sorted(result.directory.iterdir()):
        print(f"  {path}{'/' if path.is_dir() else ''}")


def main(arguments: list[str] | None = None) -> int:
    config = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        result = run(config)
    except pg.train.Interrupted as stop:
        print(f"\n{stop}. Continue with:\n  python -m experiments.grpo_random_calculation --resume")
        return 128 + stop.signal_number
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_report(config, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
