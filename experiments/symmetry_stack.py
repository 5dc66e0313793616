"""Row-normalised embeddings and centred heads beside AdamW, on next tokens of a Markov chain.

Contexts follow Zipf's law, so that most words are rare; the true logits are of rank 8 plus the
words' log frequencies. A model of an embedding, a gated MLP and a head learns them; the MLP is
trained by Muon throughout, and only the two tables' optimizer is compared, at the best of as many
pairs of rates each. The loss is exact: all contexts, all next words, less the chain's entropy.

A head's mean row cannot change any prediction. AdamW moves it; the centred update never does. The
same is asked of a router over eight experts, by its mean row and by how evenly experts are used.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

import pgjax as pg
from experiments.shared import reproduction
from experiments.shared.descent import descend
from experiments.shared.optimizers import falling

WORDS, WIDTH, INNER, EXPERTS, TOP = 256, 32, 64, 8, 2
Table = Literal["rows", "centred_rows", "hybrid", "centred_hybrid", "adam"]


@dataclasses.dataclass(frozen=True)
class Config:
    """How long, how often, and at which rates."""

    seeds: int = 3
    """chains, each with its own start"""
    steps: int = 1500
    """updates; the rates fall to zero over the last 40%"""
    batch: int = 256
    """contexts in an update"""
    matrix_rate: float = 0.02
    """of Muon, on the MLP"""
    adam_rates: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1)
    """of AdamW, tried for the embedding and the head each"""
    row_rates: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0)
    """of the embedding's symmetric update"""
    head_rates: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1)
    """of the head's"""
    quick: bool = False
    """two seeds, forty steps, one pair of rates, to see that it runs"""
    out: str = "results/symmetry_stack"
    """directory for table, plot and numbers"""


class Method(NamedTuple):
    """Who trains the embedding and the head, and the router where there is one."""

    embedding: Table
    head: Table
    router: Literal["adam", "centred_left", "centred_rows"] = "adam"


TABLES = {
    "AdamW": Method("adam", "adam"),
    "rows, centred rows": Method("rows", "centred_rows"),
    "hybrid, centred hybrid": Method("hybrid", "centred_hybrid"),
}
ROUTERS = {
    "AdamW": Method("rows", "centred_rows", "adam"),
    "centred left spectral": Method("rows", "centred_rows", "centred_left"),
    "centred rows": Method("rows", "centred_rows", "centred_rows"),
}


def chain(key: Array) -> tuple[Array, Array]:
    """Frequencies of contexts `[V]`, and of next words given them `[V, V]`, logs of both."""
    left, right = jax.random.split(key)
    frequency = -jnp.log(jnp.arange(1, WORDS + 1.0))
    frequency = frequency - jax.nn.logsumexp(frequency)
    factors = [jax.random.normal(k, (WORDS, 8)) for k in (left, right)]
    logits = factors[0] @ factors[1].T / 8**0.5 + frequency
    return frequency, jax.nn.log_softmax(logits)


def init(key: Array, moe: bool) -> Any:
    keys = iter(jax.random.split(key, 8))

    def normal(*shape: int, fan: int) -> Array:
        return jax.random.normal(next(keys), shape) / fan**0.5

    params: dict[str, Any] = {
        "embedding": normal(WORDS, WIDTH, fan=1),
        "unembedding": normal(WIDTH, WORDS, fan=WIDTH),
    }
    lead = (1, EXPERTS) if moe else (1,)
    inner = INNER // TOP if moe else INNER
    block = {
        "gate": normal(*lead, WIDTH, inner, fan=WIDTH),
        "up": normal(*lead, WIDTH, inner, fan=WIDTH),
        "down": normal(*lead, inner, WIDTH, fan=inner),
    }
    if moe:
        block["router"] = normal(1, WIDTH, EXPERTS, fan=WIDTH)
    params["layers"] = {"moe" if moe else "mlp": block}
    return params


def logits_of(params: Any, contexts: Array) -> tuple[Array, Array]:
    """Next words' logits `[B, V]`, and each expert's share of the tokens `[E]` (none: zeros)."""
    x = params["embedding"][contexts]
    x = x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)
    block = params["layers"].get("mlp")
    if block is not None:
        hidden = jax.nn.silu(x @ block["gate"][0]) * (x @ block["up"][0])
        return (x + hidden @ block["down"][0]) @ params["unembedding"], jnp.zeros(EXPERTS)
    block = params["layers"]["moe"]
    scores, chosen = jax.lax.top_k(x @ block["router"][0], TOP)
    used = jax.nn.one_hot(chosen, EXPERTS)
    weights = jnp.einsum("bk,bke->be", jax.nn.softmax(scores), used)
    gates, ups = (jnp.einsum("bd,edf->ebf", x, block[name][0]) for name in ("gate", "up"))
    outs = jnp.einsum("ebf,efd->ebd", jax.nn.silu(gates) * ups, block["down"][0])
    y = x + jnp.einsum("be,ebd->bd", weights, outs)
    return y @ params["unembedding"], used.sum(1).mean(0) / TOP


def optimizer(
    method: Method, rates: Float[Array, 2], matrix_rate: float, steps: int
) -> optax.GradientTransformation:
    """The stack with these tables; every rate is constant, then falls to zero."""

    return pg.optim.symmetry_stack(
        pg.optim.Rates(
            embedding=falling(rates[0], steps),
            head=falling(rates[1], steps),
            router=falling(0.01 if method.router == "adam" else 0.1, steps),
            matrices=falling(matrix_rate, steps),
            vectors=falling(0.01, steps),
        ),
        embedding=method.embedding,
        head=method.head,
        router=method.router,
        weight_decay=0.0,
    )


class Curves(NamedTuple):
    """Over records: loss above the chain's entropy, length of a mean row, evenness of experts."""

    excess: Any
    head_row: Any
    router_row: Any
    load_entropy: Any


def learn(
    method: Method, moe: bool, config: Config, steps: int, every: int, key: Array, rates: Array
) -> Curves:
    world, start, noise = jax.random.split(key, 3)
    frequency, after = chain(world)
    params = init(start, moe)
    transform = optimizer(method, rates, config.matrix_rate, steps)
    floor = -jnp.sum(jnp.exp(frequency)[:, None] * jnp.exp(after) * after)

    def record(params: Any) -> Curves:
        logits, _ = logits_of(params, jnp.arange(WORDS))
        loss = -jnp.sum(jnp.exp(frequency)[:, None] * jnp.exp(after) * jax.nn.log_softmax(logits))
        drawn = jax.random.categorical(jax.random.key(0), frequency, shape=(4096,))
        _, load = logits_of(params, drawn)
        router = params["layers"]["moe"]["router"][0] if moe else jnp.zeros((WIDTH, EXPERTS))
        return Curves(
            loss - floor,
            jnp.linalg.norm(params["unembedding"].mean(1)),
            jnp.linalg.norm(router.mean(1)),
            -jnp.sum(jax.scipy.special.xlogy(load, load)) / np.log(EXPERTS),
        )

    def loss_of(params: Any, contexts: Array, words: Array) -> Array:
        logits, _ = logits_of(params, contexts)
        return optax.softmax_cross_entropy_with_integer_labels(logits, words).mean()

    def gradient(params: Any, key: Array) -> Any:
        first, second = jax.random.split(key)
        contexts = jax.random.categorical(first, frequency, shape=(config.batch,))
        words = jax.random.categorical(second, after[contexts])
        return jax.grad(loss_of)(params, contexts, words)

    return descend(gradient, transform, params, jax.random.split(noise, steps), record, every)


def best(curves: Curves) -> tuple[int, Curves]:
    """The pair of rates with the least mean excess at the end, and its curves over seeds."""
    ends = np.nan_to_num(curves.excess[..., -1].mean(1), nan=np.inf)
    chosen = int(np.argmin(ends))
    return chosen, Curves(*(x[chosen] for x in curves))


def run(config: Config) -> reproduction.Findings:
    """Tunes each pair of tables, then compares routers at the symmetric pair's rates."""
    if config.seeds < 2:
        raise ValueError(f"seeds: expected at least 2, got {config.seeds}")
    if config.steps < 20 or config.steps % 20:
        raise ValueError(f"steps: expected a multiple of 20, got {config.steps}")
    steps, seeds, every = config.steps, config.seeds, config.steps // 20
    if config.quick:
        steps, seeds, every = 40, 2, 10
    keys = jax.random.split(jax.random.key(0), seeds)

    def solve(method: Method, moe: bool, pairs: Any) -> Curves:
        one = functools.partial(learn, method, moe, config, steps, every)
        over = jax.vmap(jax.vmap(one, (0, None)), (None, 0))
        found = jax.jit(over)(keys, jnp.asarray(pairs))
        return Curves(*map(np.asarray, found))

    table: dict[str, dict[str, Any]] = {}
    tables: dict[str, Curves] = {}
    rates: dict[str, tuple[float, float]] = {}
    for name, method in reproduction.track(TABLES.items(), "tables"):
        own = method.embedding == "adam"
        pairs = list(
            itertools.product(
                config.adam_rates if own else config.row_rates,
                config.adam_rates if own else config.head_rates,
            )
        )[: 1 if config.quick else None]
        index, curves = best(solve(method, False, pairs))
        tables[name], rates[name] = curves, pairs[index]
        table[f"{name} @{pairs[index][0]:g}/{pairs[index][1]:g}"] = {
            "excess loss": curves.excess[:, -1],
            "head's mean row": curves.head_row[:, -1],
        }
    routers: dict[str, Curves] = {}
    for name, method in reproduction.track(ROUTERS.items(), "routers"):
        found = solve(method, True, [rates["rows, centred rows"]])
        routers[name] = Curves(*(x[0] for x in found))
        table[f"router: {name}"] = {
            "excess loss": routers[name].excess[:, -1],
            "router's mean row moved by": np.abs(
                routers[name].router_row[:, -1] - routers[name].router_row[:, 0]
            ),
            "evenness of experts": routers[name].load_entropy[:, -1],
        }
    ours, theirs = tables["rows, centred rows"], tables["AdamW"]
    moved = np.abs(ours.head_row[:, -1] - ours.head_row[:, 0])
    x = every * np.arange(ours.excess.shape[-1])
    claims = [
        reproduction.Claim(
            "the symmetric pair's best excess loss is no higher than AdamW's best",
            bool(ours.excess[:, -1].mean() <= theirs.excess[:, -1].mean()),
            f"{ours.excess[:, -1].mean():.4f} against {theirs.excess[:, -1].mean():.4f}",
        ),
        reproduction.Claim(
            "the centred head's mean row stays where it began (every seed, within .05)",
            bool(moved.max() < 0.05),
            f"moved by {moved.max():.1e}; AdamW's to {theirs.head_row[:, -1].mean():.2f}",
        ),
    ]
    return reproduction.Findings(
        title=f"symmetry-compatible tables and routers, {seeds} seeds",
        table=table,
        claims=claims,
        panels={
            "log10 of excess loss": {
                name: reproduction.band(x, np.log10(np.maximum(c.excess, 1e-6)))
                for name, c in tables.items()
            },
            "length of the head's mean row": {
                name: reproduction.band(x, c.head_row) for name, c in tables.items()
            },
            "evenness of experts": {
                name: reproduction.band(x, c.load_entropy) for name, c in routers.items()
            },
        },
    )


def main(arguments: list[str] | None = None) -> int:
    return reproduction.main(
        "symmetry_stack", Config, run, description=__doc__, arguments=arguments
    )


if __name__ == "__main__":
    raise SystemExit(main())
