"""Matrix optimizers at the shapes of a 0.6B decoder, beside Optax's Muon and AdamW.

One update of the layers' matrices: seconds, FLOPs and temporary bytes of the compiled program, and
how long compiling took. Leaves are stacked over layers, as this library's decoder has them, and
apart, as most others do. Both Muons run the same coefficients on the same gradients in float32 on
CPUs, and ours in bfloat16 elsewhere, which is its default there. Ours iterates on the matrices, as
Optax does, and on their Gram matrices, whose time is the one with a limit. FLOPs are XLA's count,
which takes a loop's body once: ours are multiplied out by hand in `flops`. On accelerators a whole
training step of a decoder follows, with AdamW and with Muon. Exits with 1 where a limit is not
held.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmarks import harness
from pgjax import models, objectives, optim, train
from pgjax.optim import MatrixSpec, coefficients, oracles
from pgjax.types import Rollout

HIDDEN, HEADS, KV_HEADS, HEAD, MLP, LAYERS = 1024, 16, 8, 128, 3072, 28
SHAPES = {
    "query": (HIDDEN, HEADS * HEAD),
    "key": (HIDDEN, KV_HEADS * HEAD),
    "value": (HIDDEN, KV_HEADS * HEAD),
    "output": (HEADS * HEAD, HIDDEN),
    "gate": (HIDDEN, MLP),
    "up": (HIDDEN, MLP),
    "down": (MLP, HIDDEN),
}
COMPILE_LIMIT = 1 / 3  # where leaves are apart; seven stacked ones are not many for either


def stacked(layers: int) -> dict[str, tuple[int, ...]]:
    return {name: (layers, *shape) for name, shape in SHAPES.items()}


def apart(layers: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}{k}": shape for k in range(layers) for name, shape in SHAPES.items()}


def ours(shapes: dict[str, tuple[int, ...]], method: str = "ns") -> optax.GradientTransformation:
    """Optax's convention of momentum, so that both do the same."""
    return optax.chain(
        optim.matrix_transform(
            oracles.polar(method, coefficients=coefficients.KELLER, steps=5, eps=1e-8),
            shape="keller",
            momentum=optim.momentum(0.95, "ema_nesterov", debias=True),
            specs=dict.fromkeys(shapes, MatrixSpec((-1,), (-2,))),
        ),
        optax.add_decayed_weights(0.0),
        optax.scale_by_learning_rate(1.0),
    )


def theirs(shapes: dict[str, tuple[int, ...]]) -> optax.GradientTransformation:
    axes = {
        name: optax.contrib.MuonDimensionNumbers((len(shape) - 2,), (len(shape) - 1,))
        for name, shape in shapes.items()
    }
    return optax.contrib.muon(1.0, weight_decay=0.0, muon_weight_dimension_numbers=axes)


def flops(layers: int, steps: int = 5) -> float:
    """What Newton-Schulz needs without tricks: `steps (4 m² n + 2 m³)` a matrix."""
    total = 0.0
    for shape in SHAPES.values():
        m, n = sorted(shape)
        total += layers * steps * (4 * m * m * n + 2 * m**3)
    return total


class Update:
    """A compiled update of gradients that stay the same, its state donated."""

    def __init__(
        self, transform: optax.GradientTransformation, shapes: dict[str, tuple[int, ...]], run: bool
    ):
        like = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
        state = jax.eval_shape(transform.init, like)

        def update(g: Any, state: Any) -> tuple[Any, Any]:
            return transform.update(g, state, g)

        jax.clear_caches()
        start = time.perf_counter()
        self.compiled = jax.jit(update, donate_argnums=1).lower(like, state).compile()
        self.seconds = time.perf_counter() - start
        analysis: Any = self.compiled.memory_analysis()
        self.bytes = analysis.temp_size_in_bytes
        if run:
            keys = jax.random.split(jax.random.key(0), len(shapes))
            self.gradients = {
                name: jax.random.normal(key, shape)
                for key, (name, shape) in zip(keys, shapes.items(), strict=True)
            }
            self.state = transform.init(self.gradients)

    def __call__(self) -> Any:
        updates, self.state = self.compiled(self.gradients, self.state)
        return updates


def adamw(shapes: dict[str, tuple[int, ...]]) -> optax.GradientTransformation:
    del shapes
    return optax.adamw(1e-3)


def difference(layers: int, method: str) -> float:
    """Of both Muons' updates, the largest over their root mean square."""
    shapes = stacked(layers)
    mine = Update(ours(shapes, method), shapes, run=True)
    other = Update(theirs(shapes), shapes, run=True)
    a, b = mine(), other()
    return max(
        float(jnp.max(jnp.abs(a[k] - b[k])) / jnp.sqrt(jnp.mean(jnp.square(b[k])))) for k in shapes
    )


def update_rows(
    layers: int, compiled_layers: int, runs: int, say: Callable[[str], None]
) -> list[harness.Row]:
    """Ours beside Optax's Muon and AdamW, stacked and apart."""
    rows = []
    cpu = jax.default_backend() == "cpu"
    errors = {m: difference(layers, m) if cpu else None for m in ("ns", "gram_ns")}
    for label, shapes_of in {"stacked": stacked, "apart": apart}.items():
        shapes = shapes_of(layers)
        say(f"{label}, Muon")
        mine = Update(ours(shapes), shapes, run=True)
        other = Update(theirs(shapes), shapes, run=True)
        a, b, ratio = harness.paired_seconds(mine, other, runs=runs)
        rows.append(
            harness.Row(
                name=f"Muon, {layers} layers {label}",
                peer="optax.contrib",
                ours=harness.milliseconds(a),
                theirs=harness.milliseconds(b),
                ratio=ratio,
                max_abs_error=errors["ns"],
            )
        )
        rows.append(
            harness.Row(
                name="— plain Newton-Schulz FLOPs/s",
                peer="optax.contrib",
                ours=f"{flops(layers) / a / 1e9:.0f} G",
                theirs=f"{flops(layers) / b / 1e9:.0f} G",
                ratio=b / a,
            )
        )
        rows.append(
            harness.Row(
                name="— temporary memory",
                peer="optax.contrib",
                ours=f"{mine.bytes / 2**20:.0f} MiB",
                theirs=f"{other.bytes / 2**20:.0f} MiB",
                ratio=mine.bytes / max(other.bytes, 1),
            )
        )
        del mine
        say(f"{label}, Muon by Gram matrices")
        gram = Update(ours(shapes, "gram_ns"), shapes, run=True)
        rows.append(
            harness.paired(
                "— by gram_ns",
                "optax.contrib",
                gram,
                other,
                runs=runs,
                shown=harness.milliseconds,
                max_abs_error=errors["gram_ns"],
                limit=0.8 if cpu else 1 / 3,
            )
        )
        del gram, other
        mine = Update(ours(shapes), shapes, run=True)
        say(f"{label}, AdamW")
        adam = Update(adamw(shapes), shapes, run=True)
        rows.append(
            harness.paired(
                "— the same update",
                "optax.adamw",
                mine,
                adam,
                runs=runs,
                shown=harness.milliseconds,
            )
        )
        del mine, adam
        say(f"{label}, compiling {compiled_layers} layers")
        whole = shapes_of(compiled_layers)
        seconds = [Update(make(whole), whole, run=False).seconds for make in (ours, theirs)]
        rows.append(
            harness.Row(
                name=f"— compiling it for {compiled_layers} layers",
                peer="optax.contrib",
                ours=f"{seconds[0]:.2f} s",
                theirs=f"{seconds[1]:.2f} s",
                ratio=seconds[0] / seconds[1],
                limit=COMPILE_LIMIT if label == "apart" else None,
            )
        )
    return rows


def training_rows(layers: int, rows: int, length: int, runs: int) -> list[harness.Row]:
    """A step of GRPO with Muon over one with AdamW: forward, backward, update."""
    config = models.DecoderConfig(
        vocab_size=151_936,
        hidden_size=HIDDEN,
        num_layers=layers,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD,
        mlp_size=MLP,
        qk_norm="head",
        tied_embeddings=True,
        max_length=length,
        dtype="bfloat16",
        remat="full",
    )
    decoder, params = models.init(config, jax.random.key(0))
    rng = np.random.default_rng(0)
    mask = jnp.broadcast_to(jnp.arange(length) >= 8, (rows, length))
    data = Rollout(
        tokens=jnp.asarray(rng.integers(0, config.vocab_size, (rows, length)), jnp.int32),
        mask=mask,
        behavior_logprobs=jnp.where(mask, -8.0, 0.0),
        rewards=jnp.asarray(rng.integers(0, 2, rows), jnp.float32),
        group_ids=jnp.asarray(np.arange(rows) // 4, jnp.int32),
    )

    def step(optimizer: optax.GradientTransformation) -> Callable[[], Any]:
        objective = objectives.grpo()
        own = {"decoder": jax.tree.map(jnp.copy, params)}
        state = train.init(own, optimizer, jax.random.key(0), objective=objective)
        outputs = train.language_model_outputs(decoder)
        update: Any = train.make_update(outputs, objective, optimizer, group_size=4)
        held = [state]

        def run() -> Any:
            held[0], metrics = update(held[0], data)
            return metrics["loss"]

        return run

    muon = optim.muon(1e-3, shape="moonshot", adam_learning_rate=1e-4)
    return [
        harness.paired(
            f"training step, {layers} layers, {rows} x {length} tokens, Muon",
            "the same with AdamW",
            step(muon),
            step(optax.adamw(1e-4)),
            runs=runs,
            shown=harness.milliseconds,
            limit=1.10 if jax.default_backend() != "cpu" else None,
        )
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.optimizers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cpu = jax.default_backend() == "cpu"
    parser.add_argument(
        "--layers", type=int, default=2 if cpu else LAYERS, help="layers of the timed update"
    )
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each")
    parser.add_argument("--compiled-layers", type=int, default=LAYERS, help="layers compiled")
    parser.add_argument("--rows", type=int, default=16, help="rows of the training step")
    parser.add_argument("--length", type=int, default=2048, help="tokens of each row")
    parser.add_argument(
        "--no-training", action="store_true", help="leave out the training step (CPUs always do)"
    )
    parser.add_argument("--out", type=pathlib.Path, help="also write the rows to this JSON file")
    options = parser.parse_args(arguments)
    for name in ("layers", "runs", "compiled_layers", "rows", "length"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1")

    device = jax.devices()[0]
    print(f"jax {jax.__version__}, {device.platform}: {device.device_kind}")

    def say(text: str) -> None:
        print(f"  {text} ...", file=sys.stderr, flush=True)

    rows = update_rows(options.layers, options.compiled_layers, options.runs, say)
    if not (cpu or options.no_training):
        say("training step")
        rows += training_rows(options.layers, options.rows, options.length, options.runs)
    return harness.finish(rows, options.out, device.device_kind)


if __name__ == "__main__":
    sys.exit(main())
