"""The small heads beside a model, in files of their own."""

from __future__ import annotations

import json
import os
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array

from pgjax import parallel
from pgjax.models.pretrained.layout import parse
from pgjax.models.pretrained.tensors import Tensors, read_header, read_metadata
from pgjax.models.pretrained.writing import Planned, replace_file, write_file

KINDS = ("value", "score")
_METADATA = "pgjax_head"
_NAMES = ("bias", "kernel")


def save_head(path: str | os.PathLike[str], params: dict[str, Array], *, kind: str) -> None:
    """Writes a head's parameters to `value_head.safetensors` or `score_head.safetensors`.

    The file's own metadata say which head it is, as JSON. In a job of several processes all of
    them call it, and the first writes.

    Args:
      path: a directory, that of the model say; made where there is none.
      params: `kernel` [H] and `bias` [], from `value_head_init` or `score_head_init`.
      kind: "value" for values of tokens, "score" for scores of sequences.

    Raises:
      ValueError: another kind, other names, shapes or dtypes.
    """
    file = _file(path, kind)
    if sorted(params) != sorted(_NAMES):
        raise ValueError(f"params: expected kernel and bias, got {', '.join(sorted(params))}")
    values = parallel.fetch({name: params[name] for name in _NAMES})
    if values["kernel"].ndim != 1 or values["bias"].ndim != 0:
        shapes = {name: value.shape for name, value in values.items()}
        raise ValueError(f"params: expected kernel [H] and bias [], got {shapes}")
    metadata = {
        "format": "pt",
        _METADATA: json.dumps({"kind": kind, "hidden_size": values["kernel"].size}),
    }
    if not parallel.is_first():
        return
    tensors = [Planned(name, value.dtype, value.shape) for name, value in values.items()]
    replace_file(
        file,
        lambda temporary: write_file(temporary, tensors, lambda t: values[t.name], metadata),
    )


def load_head(path: str | os.PathLike[str], *, kind: str) -> dict[str, Array]:
    """The head's parameters that `save_head` wrote.

    Args:
      path: the directory.
      kind: "value" or "score".

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: another kind, or a file that is not such a head's.
    """
    file = _file(path, kind)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: is missing")
    found = {tensor.name: tensor for tensor in read_header(file)}
    try:
        metadata = json.loads(read_metadata(file)[_METADATA])
        if metadata["kind"] != kind:
            raise ValueError(f"is a {metadata['kind']} head")
        shapes = {"bias": (), "kernel": (metadata["hidden_size"],)}
        if {name: tensor.shape for name, tensor in found.items()} != shapes:
            raise ValueError(f"has {', '.join(sorted(found))} of other shapes than {shapes}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: is not a {kind} head ({error})") from error
    out: dict[str, Array] = {}
    with Tensors(found.values()) as tensors:
        for name, tensor in found.items():
            value = np.empty(tensor.shape, tensor.floating())
            layout = parse("one -> one" if not tensor.shape else "hidden -> hidden")
            sizes = {"one": 1, "hidden": value.size}
            tensors.read(value.reshape(-1), tensor, layout, sizes, (slice(None),))
            out[name] = jax.device_put(value)
    return out


def _file(path: str | os.PathLike[str], kind: str) -> Path:
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    return Path(path) / f"{kind}_head.safetensors"
