"""Does scaling steps by their entropy speed up learning from a terminal reward alone?

A chain of eight decisions, by turns forced (one sensible action, of which the policy is soon sure)
and open (two good actions of four, so that it stays unsure), with one logit table for each kind; a
reward of 1 if all eight are good, at first once in 300 episodes. GRPO against EMPG, its scale alone
and its bonus alone. The second chain adds a way to get lost: after a bad open action the rest is
decided by a third, clueless table, as agents wander that have left the task.

A higher learning rate needs fewer updates and takes larger ones: updates to 80% success fall as
its inverse, the largest KL divergence of an update grows as its square. At the best rate all
methods are done after a handful of updates, and at one rate EMPG simply takes smaller steps than
GRPO; neither says which has the better direction. So methods are compared at equal largest KL: each
runs at every rate of one grid, and for each seed the updates to 80% are interpolated (in logs) at
five values of the largest KL. Exits 0 if, by the geometric mean over these five, EMPG needs fewer
updates than GRPO for at least 70% of the seeds on both chains.

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
START = ((1.0, 0.0, 0.0, 0.0), (0.0,) * 4, (0.0,) * 4)
GOAL = 0.8
LARGEST_KL = (0.01, 0.02, 0.05, 0.1, 0.2)


@dataclasses.dataclass(frozen=True)
class Config:
    """How to train."""

    steps: int = 200
    """Updates."""
    group_size: int = 16
    """Episodes of a group; four groups an update."""
    learning_rates: tuple[float, ...] = tuple(2 * 2 ** (i / 2) for i in range(13))
    """Of plain gradient ascent, for every method; 2 to 128."""
    seeds: int = 20
    """Independent runs at each learning rate."""
    first_seed: int = 100
    """Of the runs."""
    out: pathlib.Path = pathlib.Path("runs/empg_chain")
    """Directory for results."""
    quick: bool = False
    """Ten updates of three runs of GRPO and EMPG on the first chain, two learning rates."""


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


def largest_kl(logits: Float[np.ndarray, "*R K 3 A"], *, lost: bool) -> Float[np.ndarray, "*R"]:
    """Largest KL(old ‖ new) of one update, of an episode by the old policy, per decision."""
    logp = np.asarray(jax.nn.log_softmax(logits))
    old, new = logp[..., :-1, :, :], logp[..., 1:, :, :]
    by_kind = np.sum(np.exp(old) * (old - new), axis=-1)
    good = np.exp(old[..., OPEN, :2]).sum(-1)
    on_task = np.mean([good**i if lost else np.ones_like(good) for i in range(LENGTH // 2)], axis=0)
    usual = by_kind[..., [FORCED, OPEN]].mean(-1)
    return np.max(on_task * usual + (1 - on_task) * by_kind[..., LOST], axis=-1)


def updates_needed(success: Float[np.ndarray, "*R K"]) -> Float[np.ndarray, "*R"]:
    """Updates until 80% success; one more than there are where that is never reached."""
    reached = success >= GOAL
    return np.where(reached.any(-1), reached.argmax(-1), success.shape[-1]).astype(float)


def frontier(
    kl: Float[np.ndarray, "R S"], updates: Float[np.ndarray, "R S"]
) -> Float[np.ndarray, "S Q"]:
    """Updates at each of `LARGEST_KL`, by seed: interpolated in logs between learning rates."""
    order = np.argsort(kl, axis=0)
    floored = np.maximum(kl, 1e-9), updates  # a run without any reward moves nothing
    x, y = (np.log(np.take_along_axis(z, order, axis=0)) for z in floored)
    wanted = np.log(LARGEST_KL)
    return np.exp([np.interp(wanted, x[:, s], y[:, s]) for s in range(x.shape[1])])


def run(config: Config) -> reproduction.Findings:
    """All methods on both chains."""
    steps, seeds = (10, 3) if config.quick else (config.steps, config.seeds)
    rates = config.learning_rates[::12] if config.quick else config.learning_rates
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
    bracketed = True
    for chain, lost in chains.items():
        found: dict[str, Float[np.ndarray, "S Q"]] = {}
        for name, objective in reproduction.track(methods.items(), chain):
            curves = tabular.learn_at_rates(
                problem(lost=lost),
                objective,
                optax.sgd,
                rates=rates,
                seeds=seeds,
                first_seed=config.first_seed,
                init=lambda key: jnp.asarray(START),
                measure=measure,
                group_size=config.group_size,
                steps=steps,
            )
            kl, updates = largest_kl(curves["logits"], lost=lost), updates_needed(curves["success"])
            found[name] = frontier(kl, np.maximum(updates, 1))
            bracketed &= bool(
                (kl.min(0) <= LARGEST_KL[0]).all() and (kl.max(0) >= LARGEST_KL[-1]).all()
            )
        for name, updates in found.items():
            table[f"{chain}: {name}"] = {
                **{f"KL {kl:g}": updates[:, i] for i, kl in enumerate(LARGEST_KL)},
                "mean": mean_updates(updates),
                "of GRPO's": mean_updates(updates) / mean_updates(found["GRPO"]),
            }
        panels[f"updates to 80%, {chain}"] = {
            name: reproduction.band(LARGEST_KL, updates) for name, updates in found.items()
        }
        claims.append(fewer_updates(chain, found))
    claims.append(
        reproduction.Claim(
            "the learning rates reach beyond both ends of the largest KLs compared, for every seed",
            bracketed,
            f"{rates[0]:g} to {rates[-1]:g}",
        )
    )
    return reproduction.Findings(
        title="Updates to 80% success at equal largest KL of an update",
        table=table,
        claims=claims,
        panels=panels,
        x_label="largest KL of an update",
    )


def mean_updates(updates: Float[np.ndarray, "S Q"]) -> Float[np.ndarray, " S"]:
    """The geometric mean over `LARGEST_KL`."""
    return np.exp(np.log(updates).mean(1))


def fewer_updates(chain: str, found: dict[str, Float[np.ndarray, "S Q"]]) -> reproduction.Claim:
    """EMPG against GRPO, seed by seed."""
    ratio = mean_updates(found["EMPG"]) / mean_updates(found["GRPO"])
    fewer, seeds = int(np.sum(ratio < 1)), len(ratio)
    return reproduction.Claim(
        f"{chain}: at equal largest KL EMPG needs fewer updates than GRPO for 70% of the seeds",
        fewer >= 0.7 * seeds,
        f"{fewer} of {seeds}, {reproduction.with_error(ratio, '.3f')} of GRPO's",
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs the experiment from the command line."""
    return reproduction.main("empg_chain", Config, run, description=__doc__, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
