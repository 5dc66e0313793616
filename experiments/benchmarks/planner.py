"""The planner's memory beside what a training step really takes, on one CPU device of Linux.

`python -m experiments.benchmarks.planner` plans a step, compiles it, then makes its state and batch
and takes the step; measured is how far the process' resident memory rises above what it was with
the program compiled and nothing else. A quarter of a gigabyte of state, a minute.
"""

from __future__ import annotations

import ctypes
import gc
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import pgjax as pg
from experiments.benchmarks import harness
from experiments.planning import programs
from experiments.shared import optimizers
from experiments.shared.objectives import make_objective

SAMPLES = 4
MMAP_THRESHOLD = -3  # glibc's M_MMAP_THRESHOLD


def resident(what: str) -> int:
    """Bytes of this process' memory: now (VmRSS), or the most since `forget` (VmHWM)."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return 1024 * int(line.split()[1])
    raise ValueError(f"/proc/self/status: no {what}; this needs Linux")


def forget() -> None:
    """Frees what is not used, and starts VmHWM anew."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def compared(dtype: str, *, rows: int = 16, length: int = 512) -> harness.Row:
    """One GRPO step of a 40M decoder with AdamW."""
    # Or threads' freed buffers stay with glibc, a tenth of all that is resident here.
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 128 * 1024)
    config = pg.models.DecoderConfig(
        vocab_size=8192, hidden_size=512, num_layers=8, num_heads=8, num_kv_heads=4,
        mlp_size=2048, max_length=length, remat="full", dtype=dtype,
    )  # fmt: skip
    objective = make_objective("grpo", (), aggregate=None, known={"max_length": length})
    planned = programs.update_facts(
        config,
        pg.parallel.make_mesh("data=1", devices=jax.devices()[:1]),
        objective=objective,
        optimizer="adamw",
        rows=rows,
        length=length,
        samples=SAMPLES,
        microbatches=1,
    )
    transform = optimizers.make("adamw", optax.constant_schedule(1e-6), weight_decay=0.0)
    decoder = pg.models.FunctionalDecoder(config)
    update: Any = pg.train.make_update(
        pg.train.language_model_outputs(decoder), objective, transform, group_size=SAMPLES
    )
    rng = np.random.default_rng(0)
    shapes = {"decoder": pg.models.abstract_params(config)}

    def state() -> pg.train.TrainState:
        params = jax.tree.map(
            lambda x: jnp.asarray(0.02 * rng.normal(size=x.shape).astype(np.float32)), shapes
        )
        return pg.train.init(params, transform, jax.random.key(0))

    def batch() -> pg.Rollout:
        return pg.Rollout(
            tokens=jnp.asarray(rng.integers(0, config.vocab_size, (rows, length)), jnp.int32),
            mask=jnp.ones((rows, length), bool),
            behavior_logprobs=jnp.full((rows, length), -9.0),
            rewards=jnp.asarray(rng.normal(size=rows), jnp.float32),
            group_ids=jnp.arange(rows) // SAMPLES,
        )

    step = update.lower(state(), batch()).compile()
    forget()
    before = resident("VmRSS")
    held = jax.block_until_ready((state(), batch()))
    forget()
    jax.block_until_ready(step(*held))
    measured = resident("VmHWM") - before
    ratio = planned.total / measured
    return harness.Row(
        name=f"a training step's memory, 40M parameters, {rows} x {length} tokens, {dtype}",
        peer="measured",
        ours=f"{planned.total / 1e6:.0f} MB",
        theirs=f"{measured / 1e6:.0f} MB",
        ratio=max(ratio, 1 / ratio),
        limit=1.1,
    )


def rows() -> list[harness.Row]:
    """In both dtypes."""
    return [compared(dtype) for dtype in ("float32", "bfloat16")]


def main(arguments: list[str] | None = None) -> int:
    return harness.main("planner", __doc__, rows, arguments)


if __name__ == "__main__":
    sys.exit(main())
