"""What each objective adds to a training step of GRPO at 10M parameters.

Steps of a recipe and of plain GRPO are run in turn, in one process; times are ratios. FLOPs and
temporary bytes are those of the compiled programs, by XLA's own count, which takes the body of a
loop once however often it runs (here the layers' and the vocabulary's, in both programs alike).
Then what each field of `rollout.old` costs beside log-probs alone. Exits with 1 where an objective
that reads nothing of the old policy costs more FLOPs or memory than its limit.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmarks import harness, language_models
from experiments.estimator_atlas import options_of, public_recipes
from pgjax import models, objectives, train
from pgjax.types import Rollout

SIZE = language_models.SIZES["10M"]
GROUP = 4
LIMIT = 1.05  # of FLOPs and of temporary bytes, without another forward pass


def batch(rows: int, length: int) -> Rollout:
    """Completions of all but the first eight tokens, in groups and turns, with made-up facts."""
    rng = np.random.default_rng(0)
    shape = (rows, length)
    mask = jnp.broadcast_to(jnp.arange(length) >= 8, shape)
    group_ids = jnp.asarray(np.arange(rows) // GROUP, jnp.int32)
    return Rollout(
        tokens=jnp.asarray(rng.integers(0, SIZE.config["vocab_size"], shape), jnp.int32),
        mask=mask,
        behavior_logprobs=jnp.where(mask, -8.0, 0.0),
        rewards=jnp.asarray(rng.integers(0, 2, rows), jnp.float32),
        group_ids=group_ids,
        truncated=jnp.zeros(rows, bool),
        turn_ids=jnp.where(mask, jnp.arange(length) // 64, -1),
        extras={
            "answer_ids": jnp.asarray(rng.integers(0, 3, rows), jnp.int32),
            "strata": jnp.asarray(rng.integers(0, 2, rows), jnp.int32),
            "prompt_ids": group_ids,
            "used": jnp.asarray(rng.integers(0, 2, rows), bool),
            "demonstrated": jnp.zeros(rows, bool),
        },
    )


def make(name: str) -> objectives.Objective:
    """The recipe with what it cannot do without; turns are the rollout's, sizes the model's."""
    options = options_of(name, GROUP)
    for turns in ("turn_ids", "steps"):
        if callable(options.get(turns)):
            del options[turns]
    for size in ("vocab_size", "hidden_size"):
        if size in options:
            options[size] = SIZE.config[size]
    return public_recipes()[name](**options)


def begun(decoder: Any, params: Any, objective: objectives.Objective) -> tuple[Any, Any]:
    """A state, and the update of it."""
    optimizer = optax.adamw(1e-4)
    params = {"decoder": jax.tree.map(jnp.copy, params)}
    if "values" in objective.needs:
        params["value_head"] = models.value_head_init(decoder.config, jax.random.key(1))
    state = train.init(params, optimizer, jax.random.key(0), objective=objective)
    outputs = train.language_model_outputs(decoder)
    return state, train.make_update(outputs, objective, optimizer, group_size=GROUP)


class Step:
    """One compiled training step, and what XLA says of it."""

    def __init__(self, decoder: Any, params: Any, objective: objectives.Objective, data: Rollout):
        self.state, update = begun(decoder, params, objective)
        self.data = data
        self.compiled = update.lower(self.state, data).compile()
        self.flops, self.bytes = cost(self.compiled)

    def __call__(self) -> Any:
        self.state, metrics = self.compiled(self.state, self.data)
        return metrics["loss"]


def cost(compiled: Any) -> tuple[float, int]:
    """FLOPs and temporary bytes of a compiled program."""
    analysis = compiled.cost_analysis()
    analysis = analysis[0] if isinstance(analysis, list) else analysis
    return float(analysis["flops"]), int(compiled.memory_analysis().temp_size_in_bytes)


def step_rows(names: list[str], runs: int, say: Callable[[str], None]) -> list[harness.Row]:
    """Time, FLOPs and temporary bytes of each recipe's step over GRPO's."""
    decoder, params = language_models.decoder_of(SIZE)
    data = batch(SIZE.rows, SIZE.length)
    plain = Step(decoder, params, objectives.grpo(), data)
    million = f"{language_models.count(params) / 1e6:.0f}M"
    rows = []
    for name in names:
        say(name)
        objective = make(name)
        step = Step(decoder, params, objective, data)
        again = bool(objective.old_needs) or bool({"proximal_logprobs"} & objective.needs)
        limit = None if again or "values" in objective.needs else LIMIT
        rows += [
            harness.paired(
                f"{name}, step of {million} parameters, {SIZE.rows} x {SIZE.length} tokens"
                + (", another forward pass" if again else ""),
                "grpo",
                step,
                plain,
                runs=runs,
                shown=harness.milliseconds,
            ),
            harness.Row(
                name="— FLOPs",
                peer="grpo",
                ours=f"{step.flops / 1e9:.2f} G",
                theirs=f"{plain.flops / 1e9:.2f} G",
                ratio=step.flops / plain.flops,
                limit=limit,
            ),
            harness.Row(
                name="— temporary memory",
                peer="grpo",
                ours=f"{step.bytes / 2**20:.0f} MiB",
                theirs=f"{plain.bytes / 2**20:.0f} MiB",
                ratio=step.bytes / plain.bytes,
                limit=limit,
            ),
        ]
    return rows


def feature_rows(say: Callable[[str], None]) -> list[harness.Row]:
    """FLOPs and temporary bytes of a forward pass that also gives one field of `rollout.old`."""
    decoder, params = language_models.decoder_of(SIZE)
    outputs = train.language_model_outputs(decoder)
    data = batch(SIZE.rows, SIZE.length)

    def compiled(needs: frozenset[str]) -> tuple[float, int]:
        run: Any = jax.jit(lambda params, data: outputs(params, data, needs))
        return cost(run.lower({"decoder": params}, data).compile())

    flops, size = compiled(frozenset())
    rows = []
    for name in sorted(objectives.objective.OLD_NEEDS):
        say(f"old.{name}")
        more_flops, more_size = compiled(frozenset({name}))
        rows += [
            harness.Row(
                name=f"old.{name}, forward pass, FLOPs",
                peer="log-probs alone",
                ours=f"{(more_flops - flops) / 1e9:+.2f} G",
                theirs=f"{flops / 1e9:.2f} G",
                ratio=more_flops / flops,
            ),
            harness.Row(
                name="— temporary memory",
                peer="log-probs alone",
                ours=f"{(more_size - size) / 2**20:+.1f} MiB",
                theirs=f"{size / 2**20:.1f} MiB",
                ratio=more_size / size,
            ),
        ]
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.objectives", description=__doc__
    )
    names = [name for name in public_recipes() if name != "grpo"]
    parser.add_argument(
        "--only", nargs="*", choices=names, default=names, metavar="RECIPE",
        help=f"recipes to run, of {', '.join(names)}; default: all",
    )  # fmt: skip
    parser.add_argument("--runs", type=int, default=7, help="steps of each, in turn; default: 7")
    parser.add_argument("--no-features", action="store_true", help="leave out `rollout.old`")
    parser.add_argument("--out", type=pathlib.Path, help="also write the rows to this JSON file")
    options = parser.parse_args(arguments)
    if options.runs < 1:
        parser.error(f"--runs: expected at least 1, got {options.runs}")
    device = jax.devices()[0]
    print(f"jax {jax.__version__}, {device.platform}: {device.device_kind}")

    def say(text: str) -> None:
        print(f"  {text} …", file=sys.stderr, flush=True)

    rows = step_rows(options.only, options.runs, say) if options.only else []
    if not options.no_features:
        rows += feature_rows(say)
    return harness.finish(rows, options.out, device.device_kind)


if __name__ == "__main__":
    sys.exit(main())
