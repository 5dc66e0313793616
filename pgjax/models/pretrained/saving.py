"""From a decoder and its parameters to a directory that transformers loads."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pgjax.models.config import DecoderConfig
from pgjax.models.interface import FunctionalDecoder, Params, abstract_params
from pgjax.models.pretrained.checkpoint import CONFIG, leaves, read_config
from pgjax.models.pretrained.families import identify, infer, named
from pgjax.models.pretrained.family import Family, Key, Leaf, axis_sizes, differences
from pgjax.models.pretrained.tensors import read_json
from pgjax.models.pretrained.writing import (
    Planned,
    appearing,
    dtype_name,
    file_names,
    sharded,
    write_file,
    write_index,
    write_json,
)

_GENERATION = "generation_config.json"
# What a tokenizer may consist of; copied from the source as it is.
_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates"),
)
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def save(
    path: str | os.PathLike[str],
    decoder: FunctionalDecoder,
    params: Params,
    *,
    family: str | None = None,
    source: str | os.PathLike[str] | None = None,
    max_shard_bytes: int = 5 * 2**30,
    dtype: Any = None,
    extra_config: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint in Hugging Face's format, which `load` and transformers read.

    Parameters that are spread over devices are gathered one layer of one parameter at a time.
    Under several processes all call this function; the first one writes. Everything is written
    into a directory of another name that is renamed at the end, so that what is at `path` is
    whole at any time.

    Args:
      path: the directory to write.
      decoder: what the parameters are of.
      params: arrays; what stands for a matrix, such as a low-rank update, is to be merged before.
      family: transformers' model_type, see `load`; None: that of `source` if it fits, else the
        first that does.
      source: the directory the model was loaded from. Its tokenizer, chat template and
        generation_config.json are copied, and where its config.json describes this decoder, its
        options are kept.
      max_shard_bytes: size of a file, unless one tensor is larger.
      dtype: to store; None: that of each parameter.
      extra_config: options for config.json, token ids say. They must not change the model.
      overwrite: whether to replace a directory that has a config.json. Another one that is not
        empty is never replaced.

    Raises:
      FileExistsError: `path` exists and is not to be replaced.
      ValueError: parameters of other names or shapes than the decoder's, leaves that are not
        arrays; a configuration that the family, or none, expresses (it says why); an unknown
        family; `extra_config` that would make another model.
    """
    target, state = Path(path), leaves(params)
    _check_params(decoder.config, state)
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes: expected at least 1, got {max_shard_bytes}")
    chosen, options = _options(decoder.config, family, source, extra_config or {})
    dtypes = {
        leaf: np.dtype(value.dtype if dtype is None else dtype) for leaf, value in state.items()
    }
    plan = _plan(chosen, decoder.config, state, dtypes)
    files = sharded(list(plan), max_shard_bytes)
    options["torch_dtype"] = _most_common(list(plan)).name
    options.pop("dtype", None)
    gather = _Gatherer(state, axis_sizes(decoder.config), plan)
    error: Exception | None = None
    try:
        if jax.process_index() == 0:
            _check_target(target, overwrite)
            with appearing(target) as directory:
                _write(directory, files, gather, options, None if source is None else Path(source))
    except Exception as caught:
        error = caught
    if jax.process_count() > 1:
        gather.rest()  # the other processes' part in it, or after an error the first one's
        elsewhere = _error_of_first(error is None)
        error = error or elsewhere
    if error is not None:
        raise error


def _write(
    directory: Path,
    files: Sequence[Sequence[Planned]],
    gather: _Gatherer,
    options: Mapping[str, Any],
    source: Path | None,
) -> None:
    for name, tensors in zip(file_names(len(files)), files, strict=True):
        write_file(directory / name, tensors, gather, {"format": "pt"})
    if len(files) > 1:
        write_index(directory, files)
    write_json(directory / CONFIG, options)
    if source is not None:
        _copy(source, directory)
    if not (directory / _GENERATION).exists():
        ids = {name: options[name] for name in _TOKEN_IDS if options.get(name) is not None}
        write_json(directory / _GENERATION, {"_from_model_config": True, **ids})


def _check_target(target: Path, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target}: is a file")
    if target.exists() and any(target.iterdir()):
        if not (target / CONFIG).is_file():
            raise FileExistsError(f"{target}: is neither empty nor a checkpoint to overwrite")
        if not overwrite:
            raise FileExistsError(f"{target}: is not empty; see overwrite")


def _error_of_first(fine: bool) -> Exception | None:
    """Waits for all processes; an error where the first one did not write everything."""
    from jax.experimental import multihost_utils

    if bool(multihost_utils.broadcast_one_to_all(np.array(fine))):
        return None
    return RuntimeError("save: the first process could not write the checkpoint; see its error")


def _check_params(config: DecoderConfig, state: Mapping[Leaf, Any]) -> None:
    wanted = leaves(abstract_params(config))
    for path in sorted(wanted.keys() | state.keys()):
        where = "/".join(path)
        if path not in state:
            raise ValueError(f"params: {where} is missing")
        if path not in wanted:
            raise ValueError(f"params: {where} is not a parameter of this decoder")
        value = state[path]
        if not isinstance(value, jax.Array | np.ndarray):
            raise ValueError(
                f"params: {where} is a {type(value).__name__}, expected an array; merge what "
                "stands for a matrix before saving"
            )
        if tuple(value.shape) != wanted[path].shape:
            raise ValueError(
                f"params: {where} has shape {tuple(value.shape)}, expected {wanted[path].shape}"
            )


def _options(
    config: DecoderConfig,
    family: str | None,
    source: str | os.PathLike[str] | None,
    extra: Mapping[str, Any],
) -> tuple[Family, dict[str, Any]]:
    """The family, and what config.json is to say."""
    chosen = None if family is None else named(family)
    origin: dict[str, Any] = {}
    if source is not None:
        file, theirs, role, origin, described = read_config(source)
        same = not differences(config, described)
        if same and role == "causal" and chosen in (None, theirs) and "text_config" not in origin:
            return theirs, _merged(theirs, config, origin, extra)
        if chosen is None:
            with contextlib.suppress(ValueError):
                theirs.options(config)
                chosen = theirs
        origin = identify(read_json(file))[2]
    if chosen is None:
        chosen, options = infer(config)
    else:
        try:
            options = chosen.options(config)
        except ValueError as error:
            raise ValueError(f"decoder: {error}") from error
    # Without these transformers would take its own defaults for the ids of special tokens.
    ids = {name: origin.get(name) for name in _TOKEN_IDS}
    return chosen, _merged(chosen, config, {**options, **ids}, extra)


def _merged(
    family: Family, config: DecoderConfig, options: Mapping[str, Any], extra: Mapping[str, Any]
) -> dict[str, Any]:
    merged = {**options, **extra}
    try:
        changed = differences(config, family.config(merged))
    except ValueError as error:
        raise ValueError(f"extra_config: {error}") from error
    if changed:
        raise ValueError(f"extra_config: would change the model from {', '.join(changed)}")
    return merged


# Each tensor with the parts of parameters in it: a key, and the indices of its leading axes.
_Plan = dict[Planned, list[tuple[Key, tuple[int, ...]]]]


def _plan(
    family: Family, config: DecoderConfig, state: Mapping[Leaf, Any], dtypes: Mapping[Leaf, Any]
) -> _Plan:
    """The tensors in the order of the layers."""
    named_sizes = axis_sizes(config)
    parts: dict[str, list[tuple[Key, tuple[int, ...]]]] = {}
    order: dict[str, tuple[int, int]] = {}
    done: set[Leaf] = set()
    for position, key in enumerate(family.keys):
        if key.path not in state or key.path in done:
            continue
        done.add(key.path)
        for at in itertools.product(*(range(named_sizes[axis]) for axis in key.leading)):
            name = key.tensor(*at)
            parts.setdefault(name, []).append((key, at))
            order.setdefault(name, (at[0] if at else -1, position))
    missing = ["/".join(path) for path in state if path not in done]
    assert not missing, f"{family.name} has no key for {missing}"
    out: _Plan = {}
    for name in sorted(parts, key=lambda name: order[name]):
        (key, _), *others = parts[name]
        shape = key.parsed.shape(named_sizes)
        assert all(other.parsed.shape(named_sizes) == shape for other, _ in others)
        dtype = np.dtype(jax.numpy.result_type(*(dtypes[k.path] for k, _ in parts[name])))
        dtype_name(dtype)
        out[Planned(name, dtype, shape)] = parts[name]
    return out


def _most_common(tensors: list[Planned]) -> np.dtype:
    weight: dict[np.dtype, int] = {}
    for tensor in tensors:
        weight[tensor.dtype] = weight.get(tensor.dtype, 0) + tensor.size
    return max(weight, key=lambda dtype: weight[dtype])


class _Gatherer:
    """The values of one tensor after the other, from parameters on any devices."""

    def __init__(self, state: Mapping[Leaf, Any], named_sizes: Any, plan: _Plan) -> None:
        self._state, self._sizes, self._plan = state, named_sizes, plan
        self._pending = list(reversed(plan))
        self._held: tuple[tuple[Leaf, int | None], np.ndarray] | None = None

    def rest(self) -> None:
        """Takes part in the gathering of all tensors that are left."""
        while self._pending:
            self(self._pending[-1])

    def __call__(self, tensor: Planned) -> np.ndarray:
        assert self._pending.pop() is tensor
        out = np.empty(tensor.shape, tensor.dtype)
        for key, at in self._plan[tensor]:
            values = self._layer(key.path, at[0] if at else None)
            key.parsed.view(out, self._sizes)[...] = values[at[1:]]
        return out

    def _layer(self, path: Leaf, layer: int | None) -> np.ndarray:
        """One layer of a parameter, on the host; the last one is kept for its other experts."""
        if self._held is None or self._held[0] != (path, layer):
            self._held = None
            value = self._state[path]
            self._held = (path, layer), _on_host(value if layer is None else value[layer])
        return self._held[1]


def _on_host(value: Any) -> np.ndarray:
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(value, tiled=True))
    return np.asarray(value)


def _copy(source: Path, directory: Path) -> None:
    for name in (*_TOKENIZER, _GENERATION):
        if (source / name).is_dir():
            shutil.copytree(source / name, directory / name)
        elif (source / name).is_file():
            shutil.copyfile(source / name, directory / name)
