"""Continuous batching beside static batches, on the same prompts and lengths, in one run.

Completions have geometric lengths of mean 1/8 of the longest, forced by a budget for each, so no
trained model is needed. Static: batches of S completions by `sampling.generate`, each until its
longest is done. Continuous: one call of `generate_continuous` with S slots. Exits with 1 where the
two sample different tokens or continuous batching is not `--limit` times as fast.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import harness
from pgjax import models, sampling
from pgjax.sampling.continuous import generate_continuous


def geometric_budgets(count: int, longest: int, *, seed: int) -> jax.Array:
    """Lengths in [1, longest], geometric with mean `longest / 8` where not cut."""
    lengths = np.random.default_rng(seed).geometric(8 / longest, size=count)
    return jnp.asarray(np.minimum(lengths, longest), jnp.int32)


def static_batches(
    decoder: models.FunctionalDecoder,
    params: Any,
    prompts: jax.Array,
    lengths: jax.Array,
    key: jax.Array,
    *,
    num_samples: int,
    num_slots: int,
    max_new_tokens: int,
    budgets: jax.Array,
) -> list[sampling.Samples]:
    """Batches of `num_slots` completions, one after the other."""
    size = num_slots // num_samples  # prompts in a batch
    return [
        sampling.generate(
            decoder,
            params,
            prompts[start : start + size],
            lengths[start : start + size],
            jax.random.fold_in(key, start),
            num_samples=num_samples,
            max_new_tokens=max_new_tokens,
            budgets=budgets[start * num_samples : (start + size) * num_samples],
        )
        for start in range(0, len(prompts), size)
    ]


def same_samples(options: dict[str, Any], arguments: tuple[Any, ...]) -> bool:
    """Whether both ways sample the same tokens of the first prompts, with one key."""
    decoder, params, prompts, lengths, key = arguments
    few = options["num_slots"] // options["num_samples"]
    options = {**options, "budgets": options["budgets"][: few * options["num_samples"]]}
    first = (decoder, params, prompts[:few], lengths[:few], key)
    continuous = generate_continuous(*first, **options)
    slots = options.pop("num_slots")
    assert slots % options["num_samples"] == 0
    static = sampling.generate(*first, **options)
    return bool(jnp.all(continuous.tokens == static.tokens))


def row(options: argparse.Namespace) -> tuple[harness.Row, bool]:
    """One comparison, and whether both ways sample the same."""
    config = models.DecoderConfig(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        num_layers=options.layers,
        num_heads=options.hidden // 32,
        mlp_size=3 * options.hidden,
        max_length=options.prompt + options.longest,
    )
    decoder, params = models.init(config, jax.random.key(0))
    rng = np.random.default_rng(1)
    num_prompts = options.requests // options.samples
    shape = (num_prompts, options.prompt)
    prompts = jnp.asarray(rng.integers(0, options.vocab, shape), jnp.int32)
    lengths = jnp.asarray(rng.integers(1, options.prompt + 1, num_prompts), jnp.int32)
    budgets = geometric_budgets(options.requests, options.longest, seed=2)
    arguments = (decoder, params, prompts, lengths, jax.random.key(3))
    sizes = {
        "num_samples": options.samples,
        "num_slots": options.slots,
        "max_new_tokens": options.longest,
        "budgets": budgets,
    }
    tokens = int(budgets.sum())

    def continuous() -> Any:
        return generate_continuous(*arguments, **sizes)

    def static() -> Any:
        return static_batches(*arguments, **sizes)

    for name, run in (("continuous", continuous), ("static", static)):
        steps = jax.tree.leaves([s.steps for s in _listed(run())])
        print(f"  {name}: {sum(map(int, steps))} steps for {tokens} tokens", file=sys.stderr)
    result = harness.paired(
        f"generate, {options.requests} completions, {options.slots} at a time",
        "static batches",
        continuous,
        static,
        runs=options.runs,
        shown=harness.rate(tokens, "tokens"),
        limit=1 / options.limit,
    )
    return result, same_samples(sizes, arguments)


def _listed(samples: Any) -> list[sampling.Samples]:
    return samples if isinstance(samples, list) else [samples]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.generation", description=__doc__
    )
    defaults: dict[str, tuple[Callable[[str], Any], Any, str]] = {
        "vocab": (int, 512, "tokens of the vocabulary"),
        "hidden": (int, 128, "width of the model"),
        "layers": (int, 2, "layers of the model"),
        "prompt": (int, 16, "longest prompt"),
        "longest": (int, 128, "longest completion"),
        "requests": (int, 256, "completions"),
        "samples": (int, 8, "completions of each prompt"),
        "slots": (int, 32, "completions under way at the same time"),
        "runs": (int, 3, "timed runs of each"),
        "limit": (float, 2.0, "how many times faster continuous batching has to be"),
    }
    for name, (kind, value, text) in defaults.items():
        parser.add_argument(f"--{name}", type=kind, default=value, help=f"{text}; {value}")
    options = parser.parse_args(arguments)
    if options.slots % options.samples or options.requests % options.slots:
        parser.error("slots has to be a multiple of samples, and requests one of slots")

    device = jax.devices()[0]
    print(f"jax {jax.__version__}, {device.platform}: {device.device_kind}")
    result, same = row(options)
    print(harness.table([result]))
    if not same:
        print("MISSED: continuous and static batching sampled different tokens")
    if not result.within_limit:
        print(f"MISSED: {1 / result.ratio:.2f} times as fast, expected {options.limit:g}")
    return 0 if same and result.within_limit else 1


if __name__ == "__main__":
    sys.exit(main())
