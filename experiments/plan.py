"""Whether a training step and a decoding step fit a mesh of accelerators, without having one.

Compiles the real update and the real decoding step for virtual devices, and prints what one device
holds, how many bytes it sends by each kind of collective, the FLOPs, and whether it all fits.

Compiled for CPUs: layouts, and what the compiler keeps for a while, differ on an accelerator; in
bfloat16 a CPU also holds float32 copies. Parameters, optimizer state, cache and what is sent do not
depend on that.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import sys
from typing import Any, Literal

from experiments.shared import command_line, runs
from experiments.shared.objectives import ObjectiveName
from experiments.shared.optimizers import OptimizerName


@dataclasses.dataclass(frozen=True)
class Config:
    """A model, a mesh and the size of a step."""

    model: str = "qwen3-8b"
    """A known name, or a directory with a config.json."""
    mesh: str = "fsdp=64,tensor=4"
    """Devices by axis; every size a number."""
    device: str = "h100"
    """The accelerator whose memory and FLOP/s are compared."""
    objective: ObjectiveName = "grpo"
    """What is trained by."""
    optimizer: OptimizerName = "adamw"
    """Whose state is kept."""
    rows: int = 256
    """Rows of a training step, over all devices."""
    length: int = 4096
    """Tokens of a row, prompt and completion."""
    microbatches: int = 1
    """Parts of a training step, one after the other."""
    prompt_length: int = 1024
    """Tokens of a row that are its prompt, in the cache once for all samples."""
    samples: int = 8
    """Completions of a prompt; rows / samples prompts are decoded together."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of activations, products and the sampler's parameters."""
    param_dtype: Literal["bfloat16", "float32"] = "float32"
    """Of the trained parameters and the optimizer's state."""
    remat: Literal["full", "dots"] | None = "full"
    """What the backward pass computes again."""
    skip: Literal["nothing", "update", "decode"] = "nothing"
    """Which of the two programs is left out."""
    out: pathlib.Path = pathlib.Path("results/plan")
    """Directory for numbers and figure."""


def check(config: Config) -> dict[str, int]:
    """The mesh's sizes; ValueError for what cannot be planned."""
    from experiments.planning.sizes import ACCELERATORS
    from pgjax import parallel

    sizes = parallel.parse_mesh(config.mesh)
    if not sizes or min(sizes.values()) < 1:
        raise ValueError(f"mesh: expected a size for every axis, got {config.mesh!r}")
    if config.device not in ACCELERATORS:
        raise ValueError(
            f"device: expected one of {', '.join(ACCELERATORS)}, got {config.device!r}"
        )
    for name in ("rows", "length", "microbatches", "prompt_length", "samples"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}: expected at least 1, got {getattr(config, name)}")
    if config.prompt_length >= config.length:
        raise ValueError(f"prompt_length: expected less than length {config.length}")
    ways = math.prod(sizes.get(axis, 1) for axis in parallel.BATCH_AXES) * config.microbatches
    if config.rows % ways:
        raise ValueError(
            f"rows: expected a multiple of data x fsdp x expert x microbatches = {ways}, "
            f"got {config.rows}"
        )
    if config.rows % config.samples:
        raise ValueError(f"rows: expected a multiple of samples {config.samples}")
    return sizes


def plan(config: Config) -> dict[str, Any]:
    """Compiles both programs; a tree of plain numbers."""
    from experiments.planning import programs, sizes
    from experiments.shared.objectives import make_objective
    from pgjax import parallel

    mesh = parallel.make_mesh(check(config))
    decoder = sizes.decoder_config(
        config.model,
        max_length=config.length,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        remat=config.remat,
    )
    total, active = sizes.count(decoder)
    tokens = config.rows * config.length
    heads = decoder.num_layers * decoder.num_heads * (decoder.head_dim or 0)
    found: dict[str, Any] = {
        "parameters": total,
        "active": active,
        "devices": mesh.size,
        # 2 forward, 4 backward, 2 more where the forward pass is run again.
        "update_flops": (8 if config.remat == "full" else 6)
        * (tokens * active + tokens * config.length * heads),
        "decode_flops": 2 * config.rows * (active + 2 * config.length * heads),
    }
    facts: dict[str, programs.Facts] = {}
    if config.skip != "update":
        print("compiling the update ...", file=sys.stderr, flush=True)
        facts["update"] = programs.update_facts(
            decoder,
            mesh,
            objective=make_objective(
                config.objective,
                (),
                aggregate=None,
                known={
                    "length": config.length,
                    "max_length": config.length,
                    "group_size": config.samples,
                    "steps": 1000,
                    "learning_rate": 1e-6,
                    "vocab_size": decoder.vocab_size,
                    "hidden_size": decoder.hidden_size,
                },
            ),
            samples=config.samples,
            optimizer=config.optimizer,
            rows=config.rows,
            length=config.length,
            microbatches=config.microbatches,
        )
    if config.skip != "decode":
        print("compiling the decoding step ...", file=sys.stderr, flush=True)
        facts["decode"] = programs.decode_facts(
            decoder,
            mesh,
            prompts=config.rows // config.samples,
            samples=config.samples,
            prompt_length=config.prompt_length,
            new_tokens=config.length - config.prompt_length,
        )
    for name, one in facts.items():
        found[name] = {**dataclasses.asdict(one), "total": one.total}
    found["prompts"], found["row_ways"] = config.rows // config.samples, parallel.row_ways(mesh)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Plans from the command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    config = command_line.parse(Config, "plan", description=__doc__, arguments=arguments)
    try:
        devices = math.prod(check(config).values())
        # Before the first computation, which settles how many devices there are.
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={devices}"
        os.environ["JAX_PLATFORMS"] = "cpu"
        runs.spare_threads()
        found = plan(config)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from experiments.planning import report

    report.report(config, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
