"""Generation and training of language models beside transformers, and against the hardware.

With torch and transformers installed the same weights generate and train in both, in turn, in one
run; times are ratios (ours / theirs, below 1 is faster). Beside the matrix products of decoding
alone, laid out as the decoder's loop has them, the ratio is above 1: what all else costs. On an
accelerator it also prints model FLOPs utilisation of the training step and the share of the memory
bandwidth that decoding reaches. Facts about the compiled training step of a 1.5B-parameter model
come last. The difference is the share of tokens that are not the same (logits that tie but for
rounding make some) or that of the losses. Exits with 1 where a limit is missed.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from experiments.benchmarks import harness
from pgjax import models, objectives, sampling, train
from pgjax.models import decoding
from pgjax.types import Rollout

# Dense bfloat16 FLOP/s and bytes/s of memory, from the makers' data sheets.
PEAKS = {
    "H100": (989e12, 3.35e12),
    "H200": (989e12, 4.8e12),
    "A100": (312e12, 2.04e12),
    "TPU v4": (275e12, 1.23e12),
    "TPU v5 lite": (197e12, 0.82e12),
    "TPU v5": (459e12, 2.77e12),
    "TPU v6": (918e12, 1.64e12),
}


@dataclasses.dataclass(frozen=True)
class Size:
    """A model and how much of it is run; `limit_*` bound ours / theirs."""

    config: dict[str, Any]
    new_tokens: int
    rows: int
    length: int
    limit_decode: float
    limit_train: float


SIZES = {
    "10M": Size(
        config={
            "vocab_size": 4096,
            "hidden_size": 256,
            "num_layers": 10,
            "num_heads": 8,
            "num_kv_heads": 4,
            "head_dim": 32,
            "mlp_size": 768,
        },
        new_tokens=64,
        rows=8,
        length=256,
        limit_decode=0.2,
        limit_train=1.0,
    ),
    "300M": Size(
        config={
            "vocab_size": 32_000,
            "hidden_size": 1024,
            "num_layers": 16,
            "num_heads": 16,
            "num_kv_heads": 8,
            "head_dim": 64,
            "mlp_size": 4096,
        },
        new_tokens=32,
        rows=4,
        length=128,
        limit_decode=1.0,
        limit_train=1.0,
    ),
}
BATCH, PROMPT = 16, 32
LARGE: dict[str, Any] = {  # Qwen2.5-1.5B's
    "vocab_size": 151_936,
    "hidden_size": 1536,
    "num_layers": 28,
    "num_heads": 12,
    "num_kv_heads": 2,
    "head_dim": 128,
    "mlp_size": 8960,
    "tied_embeddings": True,
    "qkv_bias": True,
}


def decoder_of(size: Size, **changes: Any) -> tuple[models.FunctionalDecoder, Any]:
    config = models.DecoderConfig(**size.config, max_length=1024, norm_epsilon=1e-5, **changes)
    return models.init(config, jax.random.key(0))


def count(params: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(params))


def generator(size: Size, decoder: Any, params: Any) -> Callable[[], Any]:
    rng = np.random.default_rng(0)
    prompts = jnp.asarray(rng.integers(1, size.config["vocab_size"], (BATCH, PROMPT)), jnp.int32)
    lengths = jnp.full(BATCH, PROMPT, jnp.int32)

    def run() -> Any:
        return sampling.generate(
            decoder,
            params,
            prompts,
            lengths,
            jax.random.key(0),
            num_samples=1,
            max_new_tokens=size.new_tokens,
            temperature=0.0,
        ).tokens

    return run


def products(size: Size) -> Callable[[], Any]:
    """The matrix products of decoding as many tokens and nothing else: no attention, no prompts."""
    sizes = size.config
    width, inner, layers = sizes["hidden_size"], sizes["mlp_size"], sizes["num_layers"]
    heads = sizes["num_heads"] * sizes["head_dim"]
    both = 2 * sizes["num_kv_heads"] * sizes["head_dim"]
    shapes = [(width, heads + both), (heads, width), (width, 2 * inner), (inner, width)]
    rng = np.random.default_rng(0)

    def matrix(shape: tuple[int, int]) -> Array:  # [out, in], as the decoder's loop has them
        return jnp.asarray(rng.normal(size=shape[::-1]) / shape[0] ** 0.5, jnp.float32)

    matrices = [[matrix(shape) for shape in shapes] for _ in range(layers)]
    head, x = matrix((width, sizes["vocab_size"])), matrix((width, BATCH))

    @jax.jit
    def run(matrices: Any, head: Array, x: Array) -> Array:
        def token(x: Array, _: None) -> tuple[Array, Array]:
            for attention, out, gated, down in matrices:
                mixed = decoding.few_rows(x, attention)
                kept = mixed[:, :heads] + mixed[:, heads:].max(-1, keepdims=True)
                gate, up = jnp.split(
                    decoding.few_rows(decoding.few_rows(kept, out), gated), 2, axis=-1
                )
                x = decoding.few_rows(jnp.maximum(gate, up), down)
                x = x * jax.lax.rsqrt(1e-6 + jnp.mean(x**2, -1, keepdims=True))  # stays finite
            best = decoding.few_rows(x, head).max(-1, keepdims=True)
            return x + 1e-6 * best, best

        return jax.lax.scan(token, x, None, size.new_tokens)[1]

    return lambda: run(matrices, head, x)


def trainer(size: Size, decoder: Any, params: Any) -> Callable[[], Any]:
    """One optimizer step of maximum likelihood: forward, backward, AdamW."""
    optimizer = optax.adamw(1e-4)
    state = train.init({"decoder": jax.tree.map(jnp.copy, params)}, optimizer, jax.random.key(0))
    update = train.make_update(
        train.language_model_outputs(decoder),
        objectives.supervised(),
        optimizer,
        state_shardings=train.shardings(state),
    )
    rng = np.random.default_rng(1)
    shape = (size.rows, size.length)
    tokens = jnp.asarray(rng.integers(0, size.config["vocab_size"], shape), jnp.int32)
    batch = train.demonstrations(tokens, jnp.ones(shape, bool).at[:, 0].set(False))
    held = [state]

    def run() -> Any:
        held[0], metrics = update(held[0], batch)
        return metrics["loss"]

    return run


class Peer:
    """transformers' model of the same weights."""

    def __init__(self, size: Size, decoder: Any, params: Any) -> None:
        import torch
        import transformers

        self.torch = torch
        with tempfile.TemporaryDirectory() as directory:
            path = pathlib.Path(directory) / "model"
            models.save_pretrained(path, decoder, params, family="llama")
            self.model = transformers.AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.float32
            )
        rng = np.random.default_rng(0)
        self.prompts = torch.tensor(rng.integers(1, size.config["vocab_size"], (BATCH, PROMPT)))
        rng = np.random.default_rng(1)
        shape = (size.rows, size.length)
        self.rows = torch.tensor(rng.integers(0, size.config["vocab_size"], shape))
        self.size = size
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=1e-4)

    def generate(self) -> Any:
        self.model.eval()
        with self.torch.no_grad():
            return self.model.generate(
                self.prompts,
                attention_mask=self.torch.ones_like(self.prompts),
                max_new_tokens=self.size.new_tokens,
                min_new_tokens=self.size.new_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            ).numpy()

    def step(self) -> Any:
        self.model.train()
        self.optimizer.zero_grad()
        loss = self.model(self.rows, labels=self.rows).loss
        loss.backward()
        self.optimizer.step()
        return loss.item()


def beside_transformers(name: str, runs: int) -> list[harness.Row]:
    """Generation and a training step of one size in both libraries."""
    size = SIZES[name]
    # Attention's weights are computed again in the backward pass, as torch's fused kernel does.
    decoder, params = decoder_of(size, remat="dots")
    peer = Peer(size, decoder, params)
    million = f"{count(params) / 1e6:.0f}M"
    ours = generator(size, decoder, params)
    found, expected = np.asarray(ours()), peer.generate()
    generate = f"generate, {million} parameters, {BATCH} prompts, {size.new_tokens} new tokens"
    shown = harness.rate(BATCH * size.new_tokens, "tokens")
    step = trainer(size, decoder, params)
    return [
        harness.paired(
            generate,
            "transformers",
            ours,
            peer.generate,
            runs=runs,
            shown=shown,
            max_abs_error=float((found != expected).mean()),
            limit=size.limit_decode,
        ),
        harness.paired(
            generate, "its matrix products alone", ours, products(size), runs=runs, shown=shown
        ),
        harness.paired(
            f"training step, {million} parameters, {size.rows} x {size.length} tokens",
            "transformers + torch",
            step,
            peer.step,
            max_abs_error=abs(float(step()) - peer.step()),
            runs=runs,
            shown=harness.milliseconds,
            limit=size.limit_train,
        ),
    ]


def beside_the_hardware(name: str, peaks: tuple[float, float], runs: int) -> list[harness.Row]:
    """Shares of the peaks, as `theirs / ours`: 1 would be all of them; there is no limit."""
    flops, bandwidth = peaks
    size = SIZES[name]
    size = dataclasses.replace(size, rows=64 if name == "10M" else 32, length=1024)
    decoder, params = decoder_of(size, dtype=jnp.bfloat16, remat="dots")
    step = trainer(size, decoder, params)
    seconds = _alone(step, runs)
    tokens, layers = size.rows * size.length, size.config["num_layers"]
    attention = 6 * layers * size.length * size.config["num_heads"] * size.config["head_dim"]
    needed = tokens * (6 * (count(params) - params["embedding"].size) + attention)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    run = generator(size, decoder, half)
    each = _alone(run, runs) / size.new_tokens
    read = 2 * (count(params) - params["embedding"].size)
    return [
        harness.Row(
            name=f"training step, {name}, bf16, {size.rows} x {size.length} tokens",
            peer="peak FLOP/s",
            ours=f"{harness.milliseconds(seconds)}, {tokens / seconds:,.0f} tokens/s",
            theirs=f"{100 * needed / seconds / flops:.1f}% of peak",
            ratio=seconds / (needed / flops),
        ),
        harness.Row(
            name=f"decoding step, {name}, bf16, {BATCH} sequences",
            peer="peak bandwidth",
            ours=f"{harness.milliseconds(each)}, {BATCH / each:,.0f} tokens/s",
            theirs=f"{100 * read / each / bandwidth:.1f}% of peak",
            ratio=each / (read / bandwidth),
        ),
    ]


def _alone(run: Callable[[], Any], runs: int) -> float:
    for _ in range(2):
        jax.block_until_ready(run())
    seconds = []
    for _ in range(runs):
        started = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds))


def compiled_step(rows: int, length: int) -> tuple[str, int]:
    """The optimised program of a GRPO gradient at 1.5B parameters, and its temporary bytes."""
    config = models.DecoderConfig(
        **LARGE, max_length=8192, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, remat="full"
    )
    decoder = models.FunctionalDecoder(config)
    outputs, objective = train.language_model_outputs(decoder), objectives.grpo()
    shape: Any = jax.ShapeDtypeStruct
    batch = Rollout(
        tokens=shape((rows, length), jnp.int32),
        mask=shape((rows, length), jnp.bool_),
        behavior_logprobs=shape((rows, length), jnp.float32),
        rewards=shape((rows,), jnp.float32),
        group_ids=shape((rows,), jnp.int32),
    )

    def loss(params: Any, batch: Rollout) -> Any:
        prepared = objective.prepare(batch)
        out = outputs({"decoder": params}, prepared, objective.needs)
        return objective.loss(out, prepared)[0]

    params = models.abstract_params(config)
    compiled = jax.jit(jax.grad(loss)).lower(params, batch).compile()
    memory: Any = compiled.memory_analysis()
    return str(compiled.as_text()), int(memory.temp_size_in_bytes)


def largest_of_vocabulary(text: str, vocabulary: int) -> int:
    """Elements per vocabulary entry of the largest array with the vocabulary as an axis."""
    largest = 0
    for dims in re.findall(r"\w+\[([\d,]+)\]", text):
        sizes = [int(n) for n in dims.split(",")]
        if vocabulary in sizes:
            largest = max(largest, math.prod(sizes) // vocabulary)
    return largest


def program_rows() -> list[harness.Row]:
    rows, lengths = 2, (2048, 4096, 8192)  # below, what does not depend on the length leads
    facts = [compiled_step(rows, length) for length in lengths]
    tokens = rows * lengths[-1]
    widest = largest_of_vocabulary(facts[-1][0], LARGE["vocab_size"])
    sizes = [size for _, size in facts]
    growth = (sizes[2] - sizes[1]) / max(sizes[1] - sizes[0], 1)
    return [
        harness.Row(
            name=f"1.5B step, {rows} x {lengths[-1]} tokens: rows of the widest array [., V]",
            peer="tokens (a [B, T, V] buffer)",
            ours=f"{widest:,}",
            theirs=f"{tokens:,}",
            # The embedding's gradient is [V, H]; anything of B·T rows would be logits.
            ratio=widest / tokens,
            limit=0.5,
        ),
        harness.Row(
            name="— temporary memory from 4096 to 8192 tokens",
            peer="from 2048 to 4096",
            ours=f"{(sizes[2] - sizes[1]) / 2**20:,.0f} MiB more",
            theirs=f"{(sizes[1] - sizes[0]) / 2**20:,.0f} MiB more",
            ratio=growth,
            limit=2.2,
        ),
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.language_models", description=__doc__
    )
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--runs", type=int, default=5, help="runs of each, in turn; default: 5")
    parser.add_argument(
        "--no-program", action="store_true", help="leave out the compiled 1.5B step"
    )
    parser.add_argument("--out", type=pathlib.Path, help="also write the rows to this JSON file")
    options = parser.parse_args(arguments)
    device = jax.devices()[0]
    print(f"jax {jax.__version__}, {device.platform}: {device.device_kind}")
    rows: list[harness.Row] = []
    for name in options.sizes:
        print(f"  {name} …", file=sys.stderr, flush=True)
        if device.platform == "cpu":
            try:
                rows += beside_transformers(name, options.runs)
            except ImportError as error:
                print(f"  beside transformers: left out, {error}", file=sys.stderr)
        else:
            peaks = next((p for key, p in PEAKS.items() if key in device.device_kind), None)
            if peaks is None:
                print(f"  no known peaks for {device.device_kind}", file=sys.stderr)
                continue
            rows += beside_the_hardware(name, peaks, options.runs)
    if not options.no_program:
        print("  1.5B …", file=sys.stderr, flush=True)
        rows += program_rows()
    return harness.finish(rows, options.out, device.device_kind)


if __name__ == "__main__":
    sys.exit(main())
