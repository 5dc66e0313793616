"""Does scaling steps by their entropy speed up learning from a terminal reward alone?

A chain of eight decisions, by turns forced (one sensible action, of which the policy is soon sure)
and open (two good actions of four, so that it stays unsure), with one logit table for each kind; a
reward of 1 if all eight are good. GRPO against EMPG, its scale alone and its bonus alone, each with
the best of the same learning rates. The second chain adds a way to get lost: after a bad open
action the rest is decided by a third, clueless table, as agents wander that have left the task.
Shows the claim, and exits 0, if on both chains EMPG reaches 80% success in fewer updates than GRPO
for at least 7 of 10 seeds with no larger maximal KL divergence of one update.

In the first chain what follows a decision does not depend on it, so the bonus cannot help there in
expectation; the second is the kind of task the bonus is meant for.

Source: EMPG, Wang et al. 2025, arXiv 2509.09265.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

import pgjax as pg
from experiments.shared import reproduction, tabular
from pgjax import objectives
from pgjax.diagnostics import problems
from pgjax.objectives import agentic

LENGTH, ACTIONS = 8, 4
FORCED, OPEN, LOST = 0, 1, 2
START = ((2.5, 0.0, 0.0, 0.0), (0.0,) * 4, (0.0,) * 4)
GOAL = 0.8


@dataclasses.dataclass(frozen=True)
class Config:
    """How to train."""

    steps: int = 300
    """Updates."""
    group_size: int = 16
    """Episodes of a group; four groups an update."""
    learning_rates: tuple[float, ...] = (1.0, 4.0, 16.0, 64.0)
    """Of plain gradient ascent; each method gets the one with which it is fastest."""
    seeds: int = 10
    """Independent runs."""
    out: pathlib.Path = pathlib.Path("runs/empg_chain")
    """Directory for results."""
    quick: bool = False
    """Ten updates of three runs of GRPO and EMPG on the first chain, one learning rate."""


def kinds(tokens: Array, *, lost: bool) -> Array:
    """Which table decides each position, `[B, 1 + LENGTH]`."""
    usual = (jnp.arange(LENGTH + 1) + 1) % 2
    usual = jnp.broadcast_to(usual, tokens.shape)
    if not lost:
        return usual
    bad = (usual == OPEN) & (tokens > 1) & (jnp.arange(LENGTH + 1) > 0)
    before = jnp.cumsum(bad, axis=1) - bad > 0
    return jnp.where(before, LOST, usual)


def problem(*, lost: bool) -> problems.TokenProblem:
    """Parameters: logits [3, A]. Action 0 is good everywhere, 1 in open decisions as well."""

    def reward(tokens: Array) -> Array:
        kind = kinds(tokens, lost=lost)
        good = (kind != LOST) & (tokens <= kind)
        return jnp.all(good[:, 1:], axis=1).astype(jnp.float32)

    return problems.TokenProblem(
        num_prompts=4,
        num_actions=ACTIONS,
        horizon=LENGTH,
        logits=lambda params, tokens: params[kinds(tokens, lost=lost)],
        reward=reward,
    )


def steps_of(rollout: pg.Rollout) -> Array:
    """Every decision is a step."""
    positions = jnp.arange(LENGTH + 1) - 1
    return jnp.broadcast_to(positions, rollout.mask.shape)


def measure(params: Array) -> dict[str, Array]:
    """The exact chance of success, and the policy itself."""
    forced, open_, _ = jax.nn.softmax(params)
    success = forced[0] ** (LENGTH // 2) * (open_[0] + open_[1]) ** (LENGTH // 2)
    return {"success": success, "logits": params}


def largest_kl(logits: Float[np.ndarray, "S K 3 A"]) -> Float[np.ndarray, " S"]:
    """Largest KL(old ‖ new) of one update, mean of both kinds of decision, by seed."""
    logp = np.asarray(jax.nn.log_softmax(logits[:, :, :LOST]))
    old, new = logp[:, :-1], logp[:, 1:]
    return np.sum(np.exp(old) * (old - new), axis=-1).mean(-1).max(-1)


def updates_needed(success: Float[np.ndarray, "S K"]) -> Float[np.ndarray, " S"]:
    """Updates until 80% success; one more than there are where that is never reached."""
    reached = success >= GOAL
    return np.where(reached.any(1), reached.argmax(1), success.shape[1]).astype(float)


def run(config: Config) -> reproduction.Findings:
    """All methods on both chains."""
    steps, seeds = (10, 3) if config.quick else (config.steps, config.seeds)
    rates = config.learning_rates[:1] if config.quick else config.learning_rates
    methods = {
        "GRPO": objectives.grpo(),
        "scale alone": agentic.empg(zeta=0.0, steps=steps_of, num_steps=LENGTH),
        "bonus alone": agentic.empg(k=0.0, steps=steps_of, num_steps=LENGTH),
        "EMPG": agentic.empg(steps=steps_of, num_steps=LENGTH),
    }
    table: dict[str, Any] = {}
    panels: dict[str, Any] = {}
    claims: list[reproduction.Claim] = []
    chains = {"chain": False, "chain, can get lost": True}
    if config.quick:
        chains, methods = {"chain": False}, {name: methods[name] for name in ("GRPO", "EMPG")}
    for chain, lost in chains.items():
        best: dict[str, Any] = {}
        for name, objective in reproduction.track(methods.items(), chain):
            at_rates = tabular.learn_at_rates(
                problem(lost=lost),
                objective,
                optax.sgd,
                rates=rates,
                seeds=seeds,
                init=lambda key: jnp.asarray(START),
                measure=measure,
                group_size=config.group_size,
                steps=steps,
            )
            for i, rate in enumerate(rates):
                curves = {column: x[i] for column, x in at_rates.items()}
                found = {
                    "updates to 80%": updates_needed(curves["success"]),
                    "success": curves["final/success"],
                    "largest KL": largest_kl(curves["logits"]),
                    "gradient norm": curves["gradient_norm"].mean(1),
                    "learning rate": np.full(seeds, rate),
                }
                key = found["updates to 80%"].mean(), -found["success"].mean()
                if name not in best or key < best[name][0]:
                    best[name] = key, found, curves["success"]
        for name, (_, found, _) in best.items():
            table[f"{chain}: {name}"] = found
        panels[f"success, {chain}"] = {
            name: reproduction.band(np.arange(steps), success)
            for name, (_, _, success) in best.items()
        }
        grpo, empg = best["GRPO"][1], best["EMPG"][1]
        faster = int(np.sum(empg["updates to 80%"] < grpo["updates to 80%"]))
        claims += [
            reproduction.Claim(
                f"{chain}: EMPG needs fewer updates for 7 of 10 seeds",
                faster >= 0.7 * seeds,
                f"{faster} of {seeds}",
            ),
            reproduction.Claim(
                f"{chain}: EMPG's largest KL of an update is no larger",
                bool(empg["largest KL"].mean() <= grpo["largest KL"].mean()),
                f"{empg['largest KL'].mean():.3f} against {grpo['largest KL'].mean():.3f}",
            ),
        ]
    return reproduction.Findings(
        title="Learning from a terminal reward, steps scaled by entropy",
        table=table,
        claims=claims,
        panels=panels,
        x_label="update",
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs the experiment from the command line."""
    return reproduction.main("empg_chain", Config, run, description=__doc__, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
