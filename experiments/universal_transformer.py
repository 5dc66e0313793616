"""One attention layer and one wide ReLU layer: does the error fall as the width grows.

A map of three tokens that depends on the whole sequence is fitted by random hidden units with a
least-squares output layer, behind attention that hands every token the whole sequence, and without
it. With attention the error must fall monotonically over the widths, at least five-fold; without,
it must stay above 0.3. Then the whole layer, attention included, is trained by Adam at one width,
and must end below the random units of that width (the claim is arXiv 2507.10581's; the construction
is made here). Exits with 1 if that does not show.
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
import optax
from jaxtyping import Array, Float

from experiments.shared import reproduction
from pgjax.models import single_layer

TOKENS, FEATURES = 3, 2


@dataclasses.dataclass(frozen=True)
class Config:
    """Sequences, widths, and a training."""

    seeds: int = 3
    """Random hidden units and data sets."""
    train: int = 4000
    """Sequences to fit."""
    test: int = 2000
    """Sequences on which the error is measured."""
    widths: tuple[int, ...] = (8, 32, 128, 512, 2048)
    """Hidden units."""
    beta: float = 30.0
    """Sharpness of the attention that is built."""
    ridge: float = 1e-9
    """Of least squares in float64, over the units' total variance."""
    trained_width: int = 128
    """Of the layer that Adam trains; one of `widths`."""
    steps: int = 3000
    """Of Adam."""
    batch: int = 256
    """Sequences of an update."""
    learning_rate: float = 3e-3
    """Of Adam; falls to 0 as a cosine."""
    quick: bool = False
    """Two small widths and a short training, for tests."""
    out: pathlib.Path = pathlib.Path("runs/universal_transformer")
    """Directory for table and plot."""


def target(x: Float[Array, "N n d"]) -> Float[Array, "N n"]:
    """`sin(2π mean_j x_j1) x_i2 + max_j x_j2 - |x_i1 - 1/2|`."""
    wave = jnp.sin(2 * jnp.pi * x[..., 0].mean(-1, keepdims=True))
    return wave * x[..., 1] + x[..., 1].max(-1, keepdims=True) - jnp.abs(x[..., 0] - 0.5)


def rmse(found: Float[Array, "N n"], x: Float[Array, "N n d"]) -> Float[Array, ""]:
    """Root mean square error over all tokens."""
    return jnp.sqrt(jnp.mean((found - target(x)) ** 2))


def attention(config: Config, *, sees: bool) -> single_layer.AttentionParams:
    """Heads that copy the sequence, or heads that see nothing."""
    params = single_layer.routing_attention_params(
        tokens=TOKENS, features=FEATURES, beta=config.beta
    )
    return params if sees else {**params, "value": jnp.zeros_like(params["value"])}


@functools.partial(jax.jit, static_argnames=("config", "width", "sees"))
def random_units(
    config: Config, key: Array, train: Array, test: Array, width: int, sees: bool
) -> Float[Array, ""]:
    """Test error of random hidden units with the best output layer."""
    params = single_layer.single_layer_init(key, tokens=TOKENS, features=FEATURES, width=width)
    heads = attention(config, sees=sees)

    def units(x: Array) -> Array:
        slots = single_layer.attention_slots(heads, x)
        return single_layer.hidden_units(params["hidden"], slots)

    output = single_layer.random_feature_fit(
        units(train).reshape(-1, width), target(train).reshape(-1, 1), ridge=config.ridge
    )
    found = units(test) @ output["kernel"] + output["bias"]
    return rmse(found[..., 0], test)


@functools.partial(jax.jit, static_argnames="config")
def trained(config: Config, key: Array, train: Array, test: Array) -> Float[Array, " K"]:
    """Test error of the whole layer during Adam's training, 31 times."""
    start, order = jax.random.split(key)
    params = single_layer.single_layer_init(
        start, tokens=TOKENS, features=FEATURES, width=config.trained_width
    )
    optimizer = optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.steps))

    def loss(params: Any, x: Array) -> Array:
        return jnp.mean((single_layer.single_layer_apply(params, x)[..., 0] - target(x)) ** 2)

    def step(carry: Any, key: Array) -> tuple[Any, None]:
        params, state = carry
        chosen = jax.random.randint(key, (config.batch,), 0, len(train))
        update, state = optimizer.update(jax.grad(loss)(params, train[chosen]), state)
        return (optax.apply_updates(params, update), state), None

    def error(params: Any) -> Array:
        return rmse(single_layer.single_layer_apply(params, test)[..., 0], test)

    def chunk(carry: Any, key: Array) -> tuple[Any, Array]:
        carry, _ = jax.lax.scan(step, carry, jax.random.split(key, config.steps // 30))
        return carry, error(carry[0])

    first = (params, optimizer.init(params))
    _, curve = jax.lax.scan(chunk, first, jax.random.split(order, 30))
    return jnp.concatenate([error(params)[None], curve])


def run(config: Config) -> reproduction.Findings:
    """The sweep of widths, and the training."""
    if config.quick:
        config = dataclasses.replace(
            config, train=200, test=100, widths=(8, 16), trained_width=16, steps=60
        )
    errors: dict[bool, list[list[float]]] = {True: [], False: []}
    curves = []
    for seed in reproduction.track(range(config.seeds), "seeds"):
        keys = jax.random.split(jax.random.key(seed), 4)
        train, test = (
            jax.random.uniform(key, (count, TOKENS, FEATURES))
            for key, count in ((keys[0], config.train), (keys[1], config.test))
        )
        with jax.enable_x64(True):
            wide = [jnp.asarray(np.asarray(x, np.float64)) for x in (train, test)]
            for sees, rows in errors.items():
                fits = [
                    random_units(config, keys[2], *wide, width=width, sees=sees)
                    for width in config.widths
                ]
                rows.append([float(x) for x in fits])
        curves.append(np.asarray(trained(config, keys[3], train, test)))
    by_name = {
        "with attention": np.array(errors[True]),
        "without": np.array(errors[False]),
    }
    table = {
        name: {f"width {width}": x[:, i] for i, width in enumerate(config.widths)}
        for name, x in by_name.items()
    }
    last = np.array([curve[-1] for curve in curves])
    table["trained, with attention"] = {f"width {config.trained_width}": last}
    seen, blind = by_name["with attention"].mean(0), by_name["without"].mean(0)
    at = config.widths.index(config.trained_width)
    claims = [
        reproduction.Claim(
            "with attention the error falls at every width, five-fold in all",
            bool(np.all(np.diff(seen) < 0) and seen[0] >= 5 * seen[-1]),
            ", ".join(f"{x:.3f}" for x in seen) + f": {seen[0] / seen[-1]:.1f}-fold",
        ),
        reproduction.Claim(
            "without attention it stays above 0.3",
            bool(blind.min() > 0.3),
            ", ".join(f"{x:.3f}" for x in blind),
        ),
        reproduction.Claim(
            f"trained attention at width {config.trained_width} ends lower than random units",
            bool(last.mean() < seen[at]),
            f"{last.mean():.3f} against {seen[at]:.3f}",
        ),
    ]
    widths = np.log2(np.array(config.widths))
    panels: dict[str, dict[str, Any]] = {
        "test error over log2 of the width": {
            name: reproduction.band(widths, x) for name, x in by_name.items()
        },
        f"test error during training, width {config.trained_width}": {
            "Adam": reproduction.band(np.linspace(0, config.steps, 31), np.stack(curves))
        },
    }
    return reproduction.Findings(
        title="A map of three tokens", table=table, claims=claims, panels=panels
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs the experiment from the command line."""
    return reproduction.main(
        "universal_transformer", Config, run, description=__doc__, arguments=arguments
    )


if __name__ == "__main__":
    sys.exit(main())
