"""Does a behaviour policy that looks at what was drawn make a sample more like its policy?

A bandit of ten actions and a softmax policy with logits from N(0, 1), which stays as it is. Actions
are drawn independently (on-policy), or by a behaviour policy that is refitted after every eight
draws to all draws so far: by one plain gradient step (ROS), or by PROPS with up to sixteen.
Sampling error is KL(empirical ‖ policy), exactly. Independent draws have (A - 1) / 2T of it to
first order.

Exits 0 if PROPS's mean error is below .7 of on-policy sampling's after 64 draws and below .5 after
256, ROS's below on-policy sampling's at both.

Sources: PROPS, Corrado and Hanna 2023, arXiv 2311.08290; ROS, Zhong et al. 2022, arXiv 2111.14552.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from experiments.shared import reproduction
from pgjax import diagnostics, sampling

ON_POLICY, ROS, PROPS = "on-policy", "ROS", "PROPS"
MARKS = (16, 64, 256)


@dataclasses.dataclass(frozen=True)
class Config:
    """What to sample."""

    actions: int = 10
    """Of the bandit."""
    every: int = 8
    """Draws between refits."""
    step_size: float = 1.0
    """Of plain gradient descent on the behaviour policy's logits, for both methods."""
    epochs: int = 16
    """Steps of PROPS at most."""
    clip: float = 0.3
    """Width ε of PROPS."""
    max_kl: float = 0.03
    """Limit δ of PROPS."""
    seeds: int = 300
    """Policies, each with one sample by each method."""
    out: pathlib.Path = pathlib.Path("runs/props_bandit")
    """Directory for results."""
    quick: bool = False
    """Ten policies."""


def log_prob(logits: Float[Array, " A"], actions: Array) -> Array:
    """Of each action drawn."""
    return jax.nn.log_softmax(logits)[actions]


def refits(config: Config) -> dict[str, Callable[..., Array]]:
    """`(key, logits, actions, mask) -> behaviour logits` of each method."""
    descent = optax.sgd(config.step_size)

    def props(key: Array, logits: Array, actions: Array, mask: Array) -> Array:
        return sampling.props_refit(
            key,
            log_prob,
            logits,
            actions,
            descent.init(logits),
            optimizer=descent,
            num_epochs=config.epochs,
            num_minibatches=1,
            clip=config.clip,
            max_kl=config.max_kl,
            mask=mask,
        ).params

    def ros(key: Array, logits: Array, actions: Array, mask: Array) -> Array:
        del key
        return sampling.ros_refit(log_prob, logits, actions, step_size=config.step_size, mask=mask)

    return {ON_POLICY: lambda key, logits, actions, mask: logits, ROS: ros, PROPS: props}


def errors(config: Config, refit: Callable[..., Array], key: Array) -> Float[Array, " R"]:
    """Sampling error after each refit's draws, of one policy."""
    start, key = jax.random.split(key)
    logits = jax.random.normal(start, (config.actions,))
    number = MARKS[-1]

    def part(actions: Array, given: tuple[Array, Array]) -> tuple[Array, Array]:
        begin, key = given
        fit_key, draw_key = jax.random.split(key)
        behavior = refit(fit_key, logits, actions, jnp.arange(number) < begin)
        drawn = jax.random.categorical(draw_key, behavior, shape=(config.every,))
        actions = jax.lax.dynamic_update_slice(actions, drawn, (begin,))
        met = jnp.where(jnp.arange(number) < begin + config.every, 1.0, 0.0)
        counts = jnp.zeros(config.actions).at[actions].add(met)
        policy = jax.nn.softmax(logits)
        return actions, diagnostics.tabular_sampling_error(counts[None], policy[None])

    begins = config.every * jnp.arange(number // config.every)
    keys = jax.random.split(key, len(begins))
    return jax.lax.scan(part, jnp.zeros(number, jnp.int32), (begins, keys))[1]


def run(config: Config) -> reproduction.Findings:
    """All methods on the same policies."""
    if MARKS[0] % config.every:
        raise ValueError(f"every: expected a divisor of {MARKS[0]}, got {config.every}")
    seeds = 10 if config.quick else config.seeds
    keys = jax.random.split(jax.random.key(0), seeds)
    found: dict[str, Float[np.ndarray, "S R"]] = {}
    for name, refit in refits(config).items():
        curves = jax.jit(jax.vmap(lambda key, refit=refit: errors(config, refit, key)))(keys)
        found[name] = np.asarray(curves)
    at = [mark // config.every - 1 for mark in MARKS]
    table: dict[str, Any] = {
        name: {f"T = {mark}": x[:, i] for mark, i in zip(MARKS, at, strict=True)}
        for name, x in found.items()
    }

    def share(name: str, mark: int) -> float:
        column = f"T = {mark}"
        return float(table[name][column].mean() / table[ON_POLICY][column].mean())

    limits = ((PROPS, 64, 0.7), (PROPS, 256, 0.5), (ROS, 64, 1.0), (ROS, 256, 1.0))
    return reproduction.Findings(
        title=f"Sampling error, {seeds} policies over {config.actions} actions",
        table=table,
        claims=[
            reproduction.Claim(
                f"{name}'s error after {mark} draws is below {limit:g} of on-policy sampling's",
                share(name, mark) < limit,
                f"{share(name, mark):.3f}",
            )
            for name, mark, limit in limits
        ],
        panels={
            "KL(empirical ‖ policy)": {
                name: reproduction.band(
                    np.log2(config.every * (1 + np.arange(x.shape[1]))), np.log10(x + 1e-6)
                )
                for name, x in found.items()
            }
        },
        x_label="log₂ draws (errors as log₁₀)",
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs the experiment from the command line."""
    return reproduction.main("props_bandit", Config, run, description=__doc__, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
