"""From a checkpoint's directory to a decoder, its parameters and, where it has one, its head."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from pgjax.models.config import DecoderConfig
from pgjax.models.interface import FunctionalDecoder, Params, abstract_params
from pgjax.models.pretrained.checkpoint import (
    Checkpoint,
    leaves,
    open_checkpoint,
    plan,
    read_score,
)
from pgjax.models.pretrained.family import Key, Leaf, axis_sizes
from pgjax.models.pretrained.layout import Sizes
from pgjax.parallel import DEFAULT_RULES, shardings
from pgjax.parallel.sharding import Rules

_ALIGNMENT = 64  # bytes; CPU devices take over arrays that begin at a multiple of it, as they are


def load(
    path: str | os.PathLike[str],
    *,
    mesh: Mesh | None = None,
    rules: Rules = DEFAULT_RULES,
    dtype: Any = None,
    param_dtype: Any = None,
    max_length: int | None = None,
    remat: str | None = None,
) -> tuple[FunctionalDecoder, Params]:
    """A decoder and its parameters from a checkpoint in Hugging Face's format.

    The files are read in pieces straight into one device's part of one parameter after the other.
    So a process holds no more than that on the host, and where the host is the device, which takes
    the memory over, nothing beside the parameters. Under several processes each reads what its own
    devices need; all of them call this function.

    Families: llama (SmolLM2 is one), mistral, qwen2, qwen3, smollm3, qwen2_moe, qwen3_moe, olmoe,
    gpt_oss, gemma2, gemma3_text (and the language model of gemma3), gpt2. An option of config.json
    that changes the model and is not supported is an error, never ignored. Dropout is not applied.

    Args:
      path: a directory with config.json and safetensors files, as `save_pretrained` writes it or
        as it is on the hub.
      mesh: where the parameters go, see `pgjax.parallel`; None: the default device.
      rules: mesh axes of each logical axis.
      dtype: of activations and products; None: `param_dtype`.
      param_dtype: of the parameters; None: as stored.
      max_length: longest row; None: what config.json says. With learned positions at most that.
      remat: see `DecoderConfig`.

    Returns:
      the decoder and its parameters. The decoder's `param_dtype` is that of most of them, where
      the checkpoint has several.

    Raises:
      FileNotFoundError: no directory, no config.json, no weights, or an index that lists a file
        that is not there.
      ValueError: an unknown architecture or option, quantised weights, layers that differ from
        each other in more than their attention; missing or surplus tensors, a wrong shape, a dtype
        that is not floating; a file that is truncated, a pickle or a Git LFS pointer. Each names
        the file and what in it.
    """
    options = _Run(mesh, rules, dtype, param_dtype, max_length, remat)
    with open_checkpoint(path) as checkpoint:
        if checkpoint.role == "sequence":
            raise ValueError(
                f"{checkpoint.file}: is of a model that scores sequences and has no language "
                "model's head; use load_reward_model"
            )
        return _load(checkpoint, options)


def load_reward_model(
    path: str | os.PathLike[str],
    *,
    mesh: Mesh | None = None,
    rules: Rules = DEFAULT_RULES,
    dtype: Any = None,
    param_dtype: Any = None,
    max_length: int | None = None,
    remat: str | None = None,
) -> tuple[FunctionalDecoder, Params, dict[str, jax.Array]]:
    """A reward model from a checkpoint of one of transformers' `...ForSequenceClassification`.

        reward = score_head_apply(head, decoder.apply(params, tokens), lengths)

    Args: as those of `load`.

    Returns:
      the decoder, its parameters, and those of the head for `models.score_head_apply`, float32.
      There is no unembedding: the decoder's configuration says `tied_embeddings`, and its `logits`
      mean nothing.

    Raises:
      FileNotFoundError, ValueError: as `load`; and where the checkpoint is not of such a model, or
        has more than one label.
    """
    options = _Run(mesh, rules, dtype, param_dtype, max_length, remat)
    with open_checkpoint(path) as checkpoint:
        head = {
            "kernel": jax.device_put(read_score(checkpoint)),
            "bias": jax.device_put(np.zeros((), np.float32)),
        }
        checkpoint.config = dataclasses.replace(checkpoint.config, tied_embeddings=True)
        return *_load(checkpoint, options), head


@dataclasses.dataclass(frozen=True)
class _Run:
    mesh: Mesh | None
    rules: Rules
    dtype: Any
    param_dtype: Any
    max_length: int | None
    remat: str | None


def _load(checkpoint: Checkpoint, run: _Run) -> tuple[FunctionalDecoder, Params]:
    keys, dtypes = plan(checkpoint)
    if run.param_dtype is not None:
        if not jax.numpy.issubdtype(run.param_dtype, jax.numpy.floating):
            raise ValueError(f"param_dtype: expected a floating dtype, got {run.param_dtype}")
        dtypes = dict.fromkeys(dtypes, jax.dtypes.canonicalize_dtype(run.param_dtype))
    config = _configured(checkpoint, run, dtypes)
    # A decoder gathers its layers by the default rules; by others the compiler decides.
    decoder = FunctionalDecoder(config, run.mesh if run.rules == DEFAULT_RULES else None)
    shapes = abstract_params(config)
    placed: dict[Leaf, Any] = {}
    if run.mesh is not None:
        axes = decoder.logical_axes()
        placed = leaves(shardings(axes, run.mesh, rules=run.rules, shapes=shapes))
    sizes = axis_sizes(checkpoint.config)
    params: Params = {}
    for path, shape in leaves(shapes).items():
        branch = params
        for name in path[:-1]:
            branch = branch.setdefault(name, {})
        reader = _Reader(checkpoint, keys[path], sizes, dtypes[path], shape.shape)
        branch[path[-1]] = reader.array(placed.get(path))
    return decoder, params


def _configured(
    checkpoint: Checkpoint, run: _Run, dtypes: Mapping[Leaf, np.dtype]
) -> DecoderConfig:
    """The decoder's configuration: the file's, and how it is to be run."""
    shapes = leaves(abstract_params(checkpoint.config))
    weight: dict[np.dtype, int] = {}
    for path, dtype in dtypes.items():
        weight[dtype] = weight.get(dtype, 0) + int(np.prod(shapes[path].shape))
    param_dtype = max(weight, key=lambda dtype: weight[dtype])
    length, limit = run.max_length, checkpoint.config.max_length
    if length is not None and length > limit and checkpoint.config.learned_positions:
        raise ValueError(
            f"max_length: {checkpoint.file} has learned positions for {limit} tokens, got {length}"
        )
    return dataclasses.replace(
        checkpoint.config,
        param_dtype=param_dtype,
        dtype=param_dtype if run.dtype is None else run.dtype,
        max_length=limit if length is None else length,
        remat=run.remat,
    )


@dataclasses.dataclass
class _Reader:
    """Reads any slice of one parameter."""

    checkpoint: Checkpoint
    key: Key
    sizes: Sizes
    dtype: np.dtype
    shape: tuple[int, ...]

    def array(self, sharding: Any) -> jax.Array:
        """The parameter, in each device's memory the part that belongs there."""
        if sharding is None:
            return jax.device_put(self.part((slice(None),) * len(self.shape)))
        devices: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
        for device, index in sharding.addressable_devices_indices_map(self.shape).items():
            bounds = tuple(s.indices(n)[:2] for s, n in zip(index, self.shape, strict=True))
            devices.setdefault(bounds, []).append(device)
        parts = []
        for bounds, holders in devices.items():
            part = self.part(tuple(slice(*bound) for bound in bounds))
            # One part at a time waits on the host for its devices.
            parts += jax.block_until_ready([jax.device_put(part, device) for device in holders])
            del part
        return jax.make_array_from_single_device_arrays(self.shape, sharding, parts)

    def part(self, index: tuple[slice, ...]) -> np.ndarray:
        """A slice of the parameter, read from the files."""
        bounds = [slice_.indices(n)[:2] for slice_, n in zip(index, self.shape, strict=True)]
        out = aligned([stop - start for start, stop in bounds], self.dtype)
        leading = len(self.key.leading)
        rest = tuple(slice(*bound) for bound in bounds[leading:])
        for at in itertools.product(*(range(*bound) for bound in bounds[:leading])):
            here = tuple(i - start for i, (start, _) in zip(at, bounds, strict=False))
            tensor = self.checkpoint.names[self.key.tensor(*at)]
            self.checkpoint.tensors.read(out[here], tensor, self.key.parsed, self.sizes, rest)
        return out


def aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array that a CPU device takes over without a copy."""
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)
