"""A checkpoint's directory: what its config.json says, and which tensor each parameter is in."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pgjax.models.config import DecoderConfig
from pgjax.models.interface import Params, abstract_params
from pgjax.models.pretrained.families import identify
from pgjax.models.pretrained.family import Family, Key, Leaf, axis_sizes
from pgjax.models.pretrained.layout import Sizes
from pgjax.models.pretrained.tensors import Tensor, Tensors, read_json

CONFIG = "config.json"
SCORE = "score.weight"
_HEAD = "lm_head.weight"


@dataclasses.dataclass
class Checkpoint:
    """An opened checkpoint.

    Attributes:
      file: its config.json.
      family, config, role: what that says; `role` is "causal", "sequence" or "base".
      tensors: the files.
      names: the tensors by the names that `family.keys` uses.
    """

    file: Path
    family: Family
    config: DecoderConfig
    role: str
    tensors: Tensors
    names: dict[str, Tensor]


def read_config(
    path: str | os.PathLike[str],
) -> tuple[Path, Family, str, dict[str, Any], DecoderConfig]:
    """config.json: its path, family, role, options as they are in the file, and what they mean."""
    directory = Path(path)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: is not a directory")
    file = directory / CONFIG
    if not file.is_file():
        adapter = " (it is an adapter, without the model)" if _is_adapter(directory) else ""
        raise FileNotFoundError(f"{directory}: has no {CONFIG}{adapter}")
    values = read_json(file)
    try:
        family, role, options = identify(values)
        return file, family, role, values, family.config(options)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


@contextlib.contextmanager
def open_checkpoint(path: str | os.PathLike[str]) -> Iterator[Checkpoint]:
    """A checkpoint whose files are closed afterwards."""
    file, family, role, _, config = read_config(path)
    with Tensors.of_directory(file.parent) as tensors:
        yield Checkpoint(file, family, config, role, tensors, _canonical(family, tensors))


def read_score(checkpoint: Checkpoint) -> np.ndarray:
    """The head of a `...ForSequenceClassification` with one label, f32[H]."""
    if checkpoint.role != "sequence":
        raise ValueError(f"{checkpoint.file}: is not of a model that scores sequences")
    key = Key("kernel", SCORE, "0:1 hidden -> hidden")
    if SCORE not in checkpoint.names:
        raise ValueError(f"{checkpoint.file.parent}: {SCORE} is missing")
    sizes = axis_sizes(checkpoint.config)
    tensor = _checked(checkpoint, key, SCORE, sizes)
    out = np.empty(checkpoint.config.hidden_size, np.float32)
    checkpoint.tensors.read(out, tensor, key.parsed, sizes, (slice(None),))
    return out


def leaves(tree: Params, path: Leaf = ()) -> dict[Leaf, Any]:
    """The leaves of a nested dict by their paths."""
    out: dict[Leaf, Any] = {}
    for name, value in tree.items():
        out |= leaves(value, (*path, name)) if isinstance(value, dict) else {(*path, name): value}
    return out


def plan(checkpoint: Checkpoint) -> tuple[dict[Leaf, Key], dict[Leaf, np.dtype]]:
    """For each parameter the key that is in the checkpoint and the dtype it is stored in.

    Raises ValueError for missing, surplus and misshapen tensors.
    """
    sizes, names = axis_sizes(checkpoint.config), checkpoint.names
    chosen: dict[Leaf, Key] = {}
    dtypes: dict[Leaf, np.dtype] = {}
    missing: list[str] = []
    used: dict[str, Tensor] = {}
    for path in leaves(abstract_params(checkpoint.config)):
        keys = [key for key in checkpoint.family.keys if key.path == path]
        assert keys, f"{checkpoint.family.name} has no key for {path}"
        for key in keys:
            wanted = [key.tensor(*at) for at in _indices(key, sizes)]
            if all(name in names for name in wanted):
                break
        else:
            key = keys[0]
            wanted = [key.tensor(*at) for at in _indices(key, sizes)]
            missing += [name for name in wanted if name not in names]
            continue
        chosen[path] = key
        found = {name: _checked(checkpoint, key, name, sizes) for name in wanted}
        used |= found
        dtypes[path] = _widest([tensor.floating() for tensor in found.values()])
    if missing:
        raise ValueError(
            f"{checkpoint.file.parent}: {_listed(missing)} missing for {checkpoint.file.name}"
        )
    _check_surplus(checkpoint, used)
    return chosen, dtypes


def _indices(key: Key, sizes: Sizes) -> Iterator[tuple[int, ...]]:
    return itertools.product(*(range(sizes[axis]) for axis in key.leading))


def _widest(dtypes: Sequence[np.dtype]) -> np.dtype:
    """A dtype that holds all of these exactly, as far as JAX has it."""
    wide = np.dtype(jax.numpy.result_type(*set(dtypes)))
    return np.dtype(jax.dtypes.canonicalize_dtype(wide))


def _checked(checkpoint: Checkpoint, key: Key, name: str, sizes: Sizes) -> Tensor:
    """A tensor, once its shape and dtype are found right."""
    tensor, shape = checkpoint.names[name], key.parsed.shape(sizes)
    if tensor.shape != shape:
        raise ValueError(
            f"{tensor.file}: {tensor.name} has shape {tensor.shape}, expected {shape} from "
            f"{checkpoint.file.name}"
        )
    tensor.floating()
    return tensor


def _check_surplus(checkpoint: Checkpoint, used: Mapping[str, Tensor]) -> None:
    """Raises ValueError for tensors that no parameter comes from."""
    surplus = []
    for name, tensor in checkpoint.names.items():
        if name in used or (name == SCORE and checkpoint.role == "sequence"):
            continue
        if any(re.fullmatch(pattern, name) for pattern in checkpoint.family.skipped):
            continue
        if name == _HEAD and checkpoint.config.tied_embeddings and checkpoint.role != "sequence":
            embedding = next(k for k in checkpoint.family.keys if k.leaf == "embedding").name
            if not checkpoint.tensors.equal(checkpoint.names[embedding], tensor):
                raise ValueError(
                    f"{tensor.file}: {tensor.name} differs from the embedding, but {CONFIG} says "
                    "tie_word_embeddings"
                )
            continue
        surplus.append(tensor.name)
    if surplus:
        raise ValueError(
            f"{checkpoint.file.parent}: {_listed(surplus)} in the files, but not in the model that "
            f"{checkpoint.file.name} describes"
        )


def _listed(names: Sequence[str]) -> str:
    verb = "is" if len(names) == 1 else "are"
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{', '.join(names[:5])}{more} {verb}"


def _canonical(family: Family, tensors: Tensors) -> dict[str, Tensor]:
    """The tensors by the names that the family's keys use."""
    bare = family.anchor in tensors and family.prefix + family.anchor not in tensors
    out: dict[str, Tensor] = {}
    for original, tensor in tensors.items():
        name = original
        for old, new in family.renamed.items():
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        if bare and name not in (_HEAD, SCORE):
            name = family.prefix + name
        if name in out:
            raise ValueError(f"{tensor.file}: {original} and {out[name].name} are the same tensor")
        out[name] = tensor
    return out


def _is_adapter(directory: Path) -> bool:
    return (directory / "adapter_config.json").is_file()
