"""Peak memory of loading a checkpoint, on one device and by four processes.

`python -m experiments.benchmarks.checkpoint_loading` writes a checkpoint of 2 GiB in several files
into a temporary directory and loads it in fresh processes. On CPU devices the parameters
themselves are in the host's memory, so one device can do no better than the checkpoint's size, and
each of four processes that share it (fsdp=4) no better than a quarter. It prints both peaks,
everything included, Python and JAX too, and exits with 1 where they are above 115% and 40%.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np

ONE_DEVICE_LIMIT, PER_PROCESS_LIMIT, PROCESSES = 1.15, 0.40, 4

# 2.06 GiB in bfloat16.
LARGE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What one process reports, in bytes.

    Attributes:
      before: peak before loading, that of Python and JAX.
      peak: peak afterwards.
      held: size of the parameters on the process's devices.
      seconds: of loading.
    """

    before: int
    peak: int
    held: int
    seconds: float


def write_checkpoint(directory: pathlib.Path, sizes: dict[str, int], *, file_bytes: int) -> int:
    """A Llama of these sizes with values that are not all the same; returns the files' bytes."""
    from pgjax.models.pretrained import writing
    from pgjax.models.pretrained.families import named
    from pgjax.models.pretrained.family import axis_sizes

    family = named("llama")
    values = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **sizes}
    config = family.config(values)
    axes = axis_sizes(config)
    dtype = np.dtype(jax.numpy.bfloat16)
    planned = [
        writing.Planned(
            key.tensor(*((layer,) if key.leading else ())), dtype, key.parsed.shape(axes)
        )
        for layer in range(config.num_layers)
        for key in family.keys
        if not key.name.endswith(("bias", "sinks")) and (key.leading or layer == 0)
    ]
    block = np.random.default_rng(0).normal(size=2**16).astype(dtype)

    def tensor(plan: writing.Planned) -> np.ndarray:
        return np.resize(block, plan.shape)

    files = writing.sharded(planned, file_bytes)
    for name, part in zip(writing.file_names(len(files)), files, strict=True):
        writing.write_file(directory / name, part, tensor, {"format": "pt"})
    if len(files) > 1:
        writing.write_index(directory, files)
    writing.write_json(directory / "config.json", values)
    return sum(plan.size for plan in planned)


def load_in_processes(directory: pathlib.Path, count: int) -> list[Loaded]:
    """Loads the checkpoint in `count` fresh processes that share it; raises if one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    running = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "experiments.benchmarks.checkpoint_loading"),
                *("--child", str(directory), str(index), str(count), str(port)),
            ],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=pathlib.Path(__file__).parents[2],
        )
        for index in range(count)
    ]
    outputs = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise RuntimeError(f"exit codes {[process.returncode for process in running]}")
    return [Loaded(**json.loads(output.splitlines()[-1])) for output in outputs]


def peak_bytes() -> int:
    """The process's largest resident memory so far."""
    status = pathlib.Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _child(directory: str, index: int, count: int, port: int) -> None:
    from pgjax import parallel
    from pgjax.models import pretrained

    mesh: Any = None
    if count > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", count, index)
        mesh = parallel.make_mesh(f"fsdp={count}")
    jax.block_until_ready(jax.numpy.zeros(1))
    before, start = peak_bytes(), time.perf_counter()
    _, params = pretrained.load(directory, mesh=mesh)
    leaves = jax.block_until_ready(jax.tree.leaves(params))
    held = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
    seconds = time.perf_counter() - start
    print(json.dumps(dataclasses.asdict(Loaded(before, peak_bytes(), held, seconds))))


def _line(name: str, loaded: list[Loaded], size: int, limit: float) -> bool:
    peak = max(one.peak for one in loaded)
    before = max(one.before for one in loaded)
    seconds = max(one.seconds for one in loaded)
    fine = peak <= limit * size
    print(
        f"{name}: peak {peak / 2**20:.0f} MiB ({peak / size:.1%} of the checkpoint, limit "
        f"{limit:.0%}), of which {before / 2**20:.0f} MiB before loading; {seconds:.1f} s; "
        f"{'ok' if fine else 'MISSED'}"
    )
    return fine


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.checkpoint_loading", description=__doc__
    )
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        directory, *numbers = options.child
        _child(directory, *map(int, numbers))
        return 0
    with tempfile.TemporaryDirectory() as name:
        directory = pathlib.Path(name)
        size = write_checkpoint(directory, LARGE, file_bytes=2**29)
        count = len(list(directory.glob("*.safetensors")))
        print(f"checkpoint: {size / 2**20:.0f} MiB in {count} files")
        one = _line("one device", load_in_processes(directory, 1), size, ONE_DEVICE_LIMIT)
        shared = load_in_processes(directory, PROCESSES)
        many = _line(f"each of {PROCESSES} processes", shared, size, PER_PROCESS_LIMIT)
    return 0 if one and many else 1


if __name__ == "__main__":
    raise SystemExit(main())
