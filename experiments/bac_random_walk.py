"""How many episodes does a policy gradient need: averages against Bayesian actor-critic (BAC)?

A walk over ten states: every step earns 1 with some noise, a wall stands at the left, the tenth
state ends it. The policy goes right from state x with probability σ(θ_x); at θ = 0 the discounted
return's gradient is known exactly. Each estimate sees the same M episodes:

* return: the episode's discounted return times its whole score;
* reward to go: γ^t times the discounted return from t on times the score of step t;
* reward to go less V: with the exact value of the state taken off, which no data gave;
* BAC: the GP temporal-difference critic and its gradient, with the exact Fisher matrix;
* BAC, own Fisher: with the matrix estimated from the same episodes.

Exits 0 if BAC's mean relative error is below half of reward to go's at every M. A Bayesian estimate
shrinks to 0 where little is known, and 0 itself has relative error 1, so the cosine with the exact
gradient, which no scale changes, has to be above reward to go's as well.

Source: Ghavamzadeh, Engel and Valko 2016, arXiv 2604.27563.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from experiments.shared import reproduction
from pgjax import advantages, envs, returns, sampling
from pgjax.uncertainty import gp

WALKED = 9
AVERAGE, TO_GO, BASELINE, BAC, OWN = (
    "return",
    "reward to go",
    "reward to go less V",
    "BAC",
    "BAC, own Fisher",
)


@dataclasses.dataclass(frozen=True)
class Config:
    """One gradient, estimated again and again."""

    episodes: tuple[int, ...] = (1, 2, 5, 10)
    """M, episodes that one estimate sees."""
    repeats: int = 20
    """Independent estimates at each M."""
    seed: int = 0
    """Of the first repeat."""
    discount: float = 0.99
    """γ."""
    reward_variance: float = 0.1
    """Of each step's reward."""
    noise: float = 0.1
    """s², the critic's noise."""
    width: float = 3.0
    """Of the critic's kernel over states."""
    fisher_scale: float = 0.01
    """c, the critic's prior variance along the scores."""
    out: pathlib.Path = pathlib.Path("runs/bac_random_walk")
    """Directory for results."""
    quick: bool = False
    """One and two episodes, three repeats."""


def walk(reward_variance: float) -> envs.Environment:
    """States 0 to 8, from 0; the ninth, to the right of 8, ends the episode."""

    def reset(key: PRNGKeyArray) -> tuple[Array, Array]:
        return jnp.int32(0), jnp.int32(0)

    def step(key: PRNGKeyArray, state: Int[Array, ""], action: Int[Array, ""]) -> envs.Step:
        reward = 1.0 + reward_variance**0.5 * jax.random.normal(key)
        state = jnp.maximum(state + 2 * action - 1, 0).astype(jnp.int32)
        return envs.Step(state, state, reward, state == WALKED, jnp.bool_(False))

    kinds = envs.Discrete(WALKED + 1), envs.Discrete(2)
    return envs.Environment(reset, step, *kinds, "random walk")


@dataclasses.dataclass(frozen=True)
class Exact:
    """Of the policy that goes either way: gradient [9], Fisher matrix [9, 9], values [9]."""

    gradient: np.ndarray
    fisher: np.ndarray
    values: np.ndarray


def exact(discount: float) -> Exact:
    """By linear equations in the nine states."""
    left, right = np.maximum(np.arange(WALKED) - 1, 0), np.arange(WALKED) + 1
    moves = np.zeros((WALKED, WALKED + 1))
    for to in (left, right):
        np.add.at(moves, (np.arange(WALKED), to), 0.5)
    rest = np.eye(WALKED) - discount * moves[:, :WALKED]
    values = np.linalg.solve(rest, np.ones(WALKED))
    occupancy = np.linalg.solve(rest.T, np.eye(WALKED)[0])
    ends = np.append(values, 0.0)
    # The slope of σ at 0 is 1/4, and so is the variance of the score.
    gradient = occupancy * 0.25 * discount * (ends[right] - ends[left])
    return Exact(gradient, np.diag(occupancy * 0.25), values)


def longest(episodes: int) -> int:
    """Steps within which so many are over, but for once in a million times (90 ± 73 steps each)."""
    return 500 + 90 * episodes + int(365 * episodes**0.5)


def scores_of(state: Int[Array, " N"], action: Int[Array, " N"]) -> Float[Array, "N 9"]:
    """∇_θ log π(a | x) at θ = 0."""

    def log_prob(theta: Array, x: Array, a: Array) -> Array:
        return jax.nn.log_sigmoid(jnp.where(a == 1, theta[x], -theta[x]))

    return jax.vmap(jax.grad(log_prob), (None, 0, 0))(jnp.zeros(WALKED), state, action)


def estimates(
    key: PRNGKeyArray, config: Config, truth: Exact, episodes: int
) -> tuple[dict[str, Float[Array, " 9"]], Bool[Array, ""]]:
    """Every method's gradient from the same episodes, and whether they were all over in time."""
    env = walk(config.reward_variance)
    start_key, key = jax.random.split(key)

    def act(key: PRNGKeyArray, observation: Int[Array, " N"]) -> sampling.Decision:
        return sampling.Decision(jax.random.bernoulli(key, shape=(1,)).astype(jnp.int32))

    running = sampling.start_environments(env, start_key, 1)
    _, seen, _ = sampling.unroll_environments(env, act, running, key, num_steps=longest(episodes))
    seen = jax.tree.map(lambda x: x[:, 0], seen)
    earlier = jnp.cumsum(seen.terminated) - seen.terminated
    mask = earlier < episodes
    complete = jnp.sum(seen.terminated & mask) == episodes

    scores = jnp.where(mask[:, None], scores_of(seen.observation, seen.action), 0.0)
    discounts = config.discount * (1.0 - seen.terminated)
    to_go = returns.discounted(seen.reward, discounts, mask=mask)
    step = jnp.arange(mask.size)
    first = jnp.concatenate([jnp.ones(1, bool), seen.terminated[:-1]])
    began = jax.lax.cummax(jnp.where(first, step, 0))
    weight = jnp.where(mask, config.discount ** (step - began), 0.0) / episodes
    whole = to_go[began] / episodes

    bac = functools.partial(
        advantages.bac_gradient,
        scores,
        gp.gaussian_kernel(
            *2 * [seen.observation[:, None].astype(jnp.float32)], width=config.width
        ),
        seen.reward,
        seen.terminated,
        discount=config.discount,
        noise=config.noise,
        fisher_scale=config.fisher_scale,
        mask=mask,
    )
    values = jnp.asarray(truth.values, jnp.float32)[seen.observation]
    found = {
        AVERAGE: whole @ scores,
        TO_GO: (weight * to_go) @ scores,
        BASELINE: (weight * (to_go - values)) @ scores,
        BAC: bac(fisher=jnp.asarray(truth.fisher, jnp.float32)).mean,
        OWN: bac(fisher=advantages.fisher_matrix(scores, weights=weight)).mean,
    }
    return found, complete


def run(config: Config) -> reproduction.Findings:
    """All methods at each number of episodes."""
    sizes = (1, 2) if config.quick else config.episodes
    repeats = 3 if config.quick else config.repeats
    if not sizes or min(sizes) < 1:
        raise ValueError(f"episodes: expected numbers of at least 1, got {sizes}")
    if repeats < 2:
        raise ValueError(f"repeats: expected at least 2, got {repeats}")
    truth = exact(config.discount)
    table: dict[str, dict[str, Any]] = {}
    all_over = True
    for episodes in reproduction.track(sizes, "episodes"):
        keys = jax.random.split(jax.random.key(config.seed + 1000 * episodes), repeats)
        several = jax.jit(
            lambda keys, episodes=episodes: jax.lax.map(
                lambda key: estimates(key, config, truth, episodes), keys
            )
        )
        found, complete = several(keys)
        all_over &= bool(np.all(complete))
        for name, every in found.items():
            each = np.asarray(every, float)
            norm = np.linalg.norm(truth.gradient)
            columns = table.setdefault(name, {})
            columns[f"error, {episodes}"] = np.linalg.norm(each - truth.gradient, axis=1) / norm
            columns[f"cosine, {episodes}"] = (
                each @ truth.gradient / norm / np.linalg.norm(each, axis=1)
            )
    return reproduction.Findings(
        title="Relative error of the gradient, and its cosine with the exact one, by episodes",
        table={name: ordered(columns, sizes) for name, columns in table.items()},
        claims=[*claims(table, sizes), over(all_over)],
        panels={
            text: {
                name: reproduction.band(
                    sizes, np.stack([columns[f"{kind}, {m}"] for m in sizes], axis=1)
                )
                for name, columns in table.items()
            }
            for kind, text in (("error", "relative error"), ("cosine", "cosine"))
        },
        x_label="episodes",
    )


def ordered(columns: dict[str, Any], sizes: tuple[int, ...]) -> dict[str, Any]:
    """Errors first."""
    return {f"{kind}, {m}": columns[f"{kind}, {m}"] for kind in ("error", "cosine") for m in sizes}


def claims(table: dict[str, dict[str, Any]], sizes: tuple[int, ...]) -> list[reproduction.Claim]:
    """BAC against reward to go."""
    ratios = [table[BAC][f"error, {m}"].mean() / table[TO_GO][f"error, {m}"].mean() for m in sizes]
    gains = [table[BAC][f"cosine, {m}"] - table[TO_GO][f"cosine, {m}"] for m in sizes]
    seen = ", ".join(
        f"{reproduction.with_error(g, '+.2f')} ({m})" for g, m in zip(gains, sizes, strict=True)
    )
    return [
        reproduction.Claim(
            "BAC's relative error is below half of reward to go's at every number of episodes",
            max(ratios) < 0.5,
            ", ".join(f"{x:.2f} of it ({m})" for x, m in zip(ratios, sizes, strict=True)),
        ),
        reproduction.Claim(
            "BAC's cosine is above reward to go's at every number of episodes",
            all(g.mean() > 0 for g in gains),
            seen,
        ),
    ]


def over(all_over: bool) -> reproduction.Claim:
    """Nothing was cut off."""
    return reproduction.Claim("every episode was over in time", all_over, str(all_over).lower())


def main(arguments: list[str] | None = None) -> int:
    """Runs the experiment from the command line."""
    return reproduction.main(
        "bac_random_walk", Config, run, description=__doc__, arguments=arguments
    )


if __name__ == "__main__":
    sys.exit(main())
