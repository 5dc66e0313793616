"""A small decoder in 2, 3 and 4 bits by seven methods: perplexity, and bytes as they are stored.

A decoder learns to write out worked arithmetic. Its layers' matrices are then packed by plain
rounding, GPTQ, GPTAQ, FOEM, FOEM with GPTAQ's correction, and rounding of channels scaled (and
groups clipped) by AWQ's and by QuantLRM's importance, all from the same calibration rows; the
layers behind see what the quantised ones before them give. QuantLRM's updates come from a short
further fine-tuning, of which only the sizes are used: what is quantised is the model before it.
Perplexity is that of held-out worked answers, by the decoder running on the packed matrices.

The ranking of GPTQ's relatives is measured and reported. Exits with 1 if GPTQ is not better than
plain rounding at 2 and 3 bits, or if packed matrices do not take the bytes that their bits, scales
and zero points add up to, or do not compute what their dense forms do.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PRNGKeyArray

import pgjax as pg
from experiments.shared import reproduction
from pgjax import models, quantize
from pgjax.models import matrices
from pgjax.tasks import random_calculation as task

LEVELS = (1, 2, 3)


@dataclasses.dataclass(frozen=True)
class Config:
    """Decoder, training and quantisers."""

    hidden_size: int = 64
    """Width of the residual stream."""
    num_layers: int = 2
    """Transformer layers."""
    mlp_size: int = 64
    """Width of the gated MLP; as the residual stream's, one program quantises every matrix."""
    steps: int = 600
    """Of Adam, batches of 64 rows."""
    tune_steps: int = 60
    """More of them at a hundredth of the rate, for QuantLRM's updates."""
    calibration: int = 96
    """Rows from the training items."""
    test: int = 288
    """Held-out rows."""
    group: int = 32
    """Inputs with one scale and zero point."""
    bits: tuple[int, ...] = (2, 3, 4)
    """Of the weights."""
    beta: float = 0.2
    """Of FOEM."""
    alpha: float = 0.25
    """Of GPTAQ."""
    seeds: int = 3
    """Decoders, each with its own batches."""
    out: pathlib.Path = pathlib.Path("runs/quantize_decoder")
    """Directory for results."""
    quick: bool = False
    """A tiny decoder at 3 bits, barely trained."""


def rows_of(split: str, count: int, seed: int) -> tuple[Array, Array]:
    """Worked items as rows of tokens, and the mask of their answers."""
    config = task.PRESETS["micro19"]
    per_level = -(-count // len(LEVELS))
    items = task.make_items(config, seed=seed, split=split, levels=LEVELS, per_level=per_level)
    length = max(
        task.prompt_length_bound(config, n) + task.response_length_bound(config, n) for n in LEVELS
    )
    batch = task.token_batch(
        [item.prompt for item in items[:count]],
        [item.worked for item in items[:count]],
        length=length,
    )
    return jnp.asarray(batch["tokens"]), jnp.asarray(batch["mask"])


def loss_of(decoder: pg.models.FunctionalDecoder, params: Any, tokens: Array, mask: Array) -> Array:
    """Mean negative log-likelihood of the masked tokens."""
    logits = decoder.logits(params, decoder.apply(params, tokens[:, :-1]))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    kept = mask[:, 1:]
    return jnp.sum(jnp.where(kept, losses, 0.0)) / kept.sum()


@functools.partial(jax.jit, static_argnames=("decoder", "steps", "rate"))
def trained(
    decoder: pg.models.FunctionalDecoder,
    params: Any,
    tokens: Array,
    mask: Array,
    key: PRNGKeyArray,
    *,
    steps: int,
    rate: float,
) -> Any:
    """Parameters after so many batches of 64 of these rows, the rate falling to 0."""
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def step(carry: Any, key: PRNGKeyArray) -> Any:
        params, state = carry
        rows = jax.random.randint(key, (64,), 0, tokens.shape[0])
        slope = jax.grad(functools.partial(loss_of, decoder))(params, tokens[rows], mask[rows])
        update, state = optimizer.update(slope, state)
        return (optax.apply_updates(params, update), state), None

    carry = (params, optimizer.init(params))
    return jax.lax.scan(step, carry, jax.random.split(key, steps))[0][0]


def methods(
    config: Config, bits: int
) -> dict[str, tuple[Callable[[models.low_bit.Site], quantize.QuantResult], str | None]]:
    """Each method's quantiser of a matrix, and the importance its channels are scaled by."""
    options: dict[str, Any] = {
        "bits": bits,
        "group": config.group,
        "scale_dtype": jnp.bfloat16,
    }
    steer: dict[str, Any] = {"alpha": config.alpha}
    return {
        "plain rounding": (lambda s: quantize.rtn(s.weight, **options), None),
        "GPTQ": (lambda s: quantize.gptq(s.weight, s.hessian, **options), None),
        "GPTAQ": (
            lambda s: quantize.gptaq(s.weight, s.hessian, s.mismatch, **steer, **options),
            None,
        ),
        "FOEM": (
            lambda s: quantize.foem(s.weight, s.hessian, beta=config.beta, **options),
            None,
        ),
        "FOEM and GPTAQ": (
            lambda s: quantize.foem(
                s.weight, s.hessian, s.mismatch, beta=config.beta, **steer, **options
            ),
            None,
        ),
        "AWQ": (lambda s: quantize.clipped_rtn(s.weight, s.hessian, **options), "activations"),
        "QuantLRM": (lambda s: quantize.clipped_rtn(s.weight, s.hessian, **options), "updates"),
    }


def stored_bytes(params: Any, bits: int, group: int) -> int:
    """What packed matrices of these shapes should take, from bits, scales and zero points."""
    total = 0
    for name, layout in matrices.of(params).items():
        _, block, leaf = name.split("/")
        shape = params["layers"][block][leaf].shape
        ins = int(np.prod(shape[layout.lead : layout.lead + layout.ins]))
        rows = int(np.prod(shape)) // ins
        groups = ins // group
        # Zero points of a row are filled up to whole bytes, at 3 bits to three of them.
        total += rows * (ins * bits // 8 + 2 * groups + quantize.packed_width(groups, bits))
    return total


def run(config: Config) -> reproduction.Findings:
    """All methods at all widths on all decoders."""
    if config.quick:
        config = dataclasses.replace(
            config,
            hidden_size=32,
            num_layers=1,
            mlp_size=32,
            steps=20,
            tune_steps=5,
            calibration=12,
            test=24,
            bits=(3,),
        )
    tokens, mask = rows_of("train", 4096, seed=0)
    test_tokens, test_mask = rows_of("test", config.test, seed=0)
    decoder_config = pg.models.DecoderConfig(
        vocab_size=task.VOCAB_SIZE,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        num_heads=4,
        mlp_size=config.mlp_size,
        rope_theta=1000.0,
        max_length=tokens.shape[1],
    )
    decoder = pg.models.FunctionalDecoder(decoder_config)

    @jax.jit
    def perplexity(params: Any) -> Array:
        return jnp.exp(loss_of(decoder, params, test_tokens, test_mask))

    table: dict[str, dict[str, list[float]]] = {}
    wrong_bytes, gap = 0, 0.0
    sizes: dict[int, tuple[int, int]] = {}
    for seed in reproduction.track(range(config.seeds), "decoders"):
        keys = jax.random.split(jax.random.key(seed), 3)
        _, params = pg.models.init(decoder_config, keys[0])
        fit = functools.partial(trained, decoder)
        params = fit(params, tokens, mask, keys[1], steps=config.steps, rate=3e-3)
        # As stored, so that a weight either moves or does not.
        base = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)
        tuned = fit(base, tokens, mask, keys[2], steps=config.tune_steps, rate=3e-5)
        tuned = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), tuned)
        picked = np.random.default_rng(seed).permutation(tokens.shape[0])[: config.calibration]
        rows = tokens[picked]
        kept = rows != task.PAD
        moments = models.low_bit.layer_moments(decoder, base, rows, mask=kept)
        importances = {
            "activations": models.low_bit.activation_scales(moments),
            "updates": models.low_bit.finetune_importance(base, tuned),
        }
        full = float(perplexity(base))
        for bits in config.bits:
            column = f"perplexity, {bits} bits"
            table.setdefault("not quantised", {}).setdefault(column, []).append(full)
            expected = stored_bytes(base, bits, config.group)
            for name, (method, importance) in methods(config, bits).items():
                given = base
                if importance is not None:
                    given, _ = models.low_bit.scale_channels(
                        decoder,
                        base,
                        rows,
                        importances[importance],
                        bits=bits,
                        group=config.group,
                        mask=kept,
                    )
                found = models.low_bit.quantize_decoder(
                    decoder, given, rows, method, bits=bits, mask=kept
                )
                value = float(perplexity(found.params))
                dense = float(perplexity(models.low_bit.dense_params(found.params)))
                gap = max(gap, abs(value / dense - 1))
                wrong_bytes += found.bytes_after != expected
                sizes[bits] = (found.bytes_before, found.bytes_after)
                table.setdefault(name, {}).setdefault(column, []).append(value)
    rows_found = {n: {c: np.array(v) for c, v in row.items()} for n, row in table.items()}
    claims = []
    for bits in filter(lambda bits: bits < 4, config.bits):
        lead = _ratio(rows_found, "GPTQ", "plain rounding", bits)
        text = f"GPTQ is better than plain rounding at {bits} bits"
        seen = f"log-perplexity {reproduction.with_error(lead)}"
        claims.append(reproduction.Claim(text, bool(lead.mean() < 0), seen))
    claims += [
        reproduction.Claim(
            "packed matrices take the bytes of their bits, scales and zero points",
            wrong_bytes == 0,
            ", ".join(
                f"{bits} bits {after / 1024:.1f} KiB of {before / 1024:.1f}"
                for bits, (before, after) in sizes.items()
            ),
        ),
        reproduction.Claim(
            "the decoder on packed matrices is that on their dense forms",
            gap < 1e-4,
            f"perplexity within {gap:.1e} (below 1e-4)",
        ),
    ]
    for name, other in (
        ("GPTAQ", "GPTQ"),
        ("FOEM", "GPTQ"),
        ("FOEM and GPTAQ", "GPTQ"),
        ("AWQ", "plain rounding"),
        ("QuantLRM", "plain rounding"),
        ("QuantLRM", "AWQ"),
    ):
        leads = {bits: _ratio(rows_found, name, other, bits) for bits in config.bits}
        text = f"measured, not claimed: log-perplexity of {name} less that of {other}"
        seen = ", ".join(f"{b} bits {reproduction.with_error(x)}" for b, x in leads.items())
        claims.append(reproduction.Claim(text, True, seen))
    panels = {
        "log of perplexity over the unquantised model's": {
            name: reproduction.band(
                np.array(config.bits),
                np.stack([_ratio(rows_found, name, "not quantised", b) for b in config.bits], 1),
            )
            for name in rows_found
            if name != "not quantised"
        }
    }
    return reproduction.Findings(
        title=f"Held-out worked answers, groups of {config.group}",
        table=rows_found,
        claims=claims,
        panels=panels,
        x_label="bits",
    )


def _ratio(rows: dict[str, dict[str, np.ndarray]], name: str, other: str, bits: int) -> np.ndarray:
    column = f"perplexity, {bits} bits"
    return np.log(rows[name][column]) - np.log(rows[other][column])


def main(arguments: list[str] | None = None) -> int:
    """Runs the experiment from the command line."""
    return reproduction.main(
        "quantize_decoder", Config, run, description=__doc__, arguments=arguments
    )


if __name__ == "__main__":
    sys.exit(main())
