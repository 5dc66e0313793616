"""Rotary positions and kinds of attention, from config.json's words and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pgjax.models.config import AttentionKind, DecoderConfig
from pgjax.models.pretrained.options import Options
from pgjax.models.rotary import Rotary

SLIDING, FULL = "sliding_attention", "full_attention"

_YARN = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")


def take_rotary(options: Options, *, theta: float, max_length: int) -> Rotary:
    """The one rotary embedding of all layers.

    It is under `rope_parameters`, or in older files under `rope_theta` and `rope_scaling`.

    Args:
      theta: the family's default.
      max_length: `max_position_embeddings`.
    """
    scaling = options.take("rope_scaling", default=None)
    parameters = scaling or options.take("rope_parameters", default=None) or {}
    theta = options.take("rope_theta", default=theta)
    original = options.take("original_max_position_embeddings", default=None)
    rotation = options.take("partial_rotary_factor", default=None)
    if original is not None:
        parameters = {**parameters, "original_max_position_embeddings": original}
    if rotation is not None:
        parameters = {"partial_rotary_factor": rotation, **parameters}
    return rotary(parameters, theta=theta, max_length=max_length)


def rotary(parameters: Mapping[str, Any], *, theta: float, max_length: int) -> Rotary:
    """What one dict of rope parameters says; ValueError where it is not supported."""
    if not isinstance(parameters, Mapping):
        raise ValueError(f"rope_parameters: expected an object, got {parameters!r}")
    options = Options(parameters, {})
    try:
        fields = _fields(options, theta, max_length)
        options.finish()
        return Rotary(**fields)
    except ValueError as error:
        raise ValueError(f"rope_parameters: {error}") from error


def _fields(options: Options, theta: float, max_length: int) -> dict[str, Any]:
    kind = options.take("rope_type", "type", default="default")
    fields: dict[str, Any] = {"theta": float(_number(options, "rope_theta", theta))}
    options.only("partial_rotary_factor", 1.0, None, why="all of a head's features are rotated")
    original = options.take("original_max_position_embeddings", default=None) or max_length
    if kind == "default":
        return fields
    if kind not in ("linear", "dynamic", "llama3", "yarn"):
        raise ValueError(
            f"rope_type {kind!r} is not supported; default, linear, dynamic, llama3, yarn are"
        )
    if kind == "yarn" and options.take("factor", default=None) is None:
        factor = max_length / original
    else:
        factor = float(_number(options, "factor"))
    fields |= {"scaling": kind, "factor": factor}
    if kind == "dynamic":
        fields["original_max_length"] = max_length
    elif kind != "linear":
        fields["original_max_length"] = original
    if kind == "llama3":
        for name in ("low_freq_factor", "high_freq_factor"):
            fields[name] = float(_number(options, name))
    if kind == "yarn":
        for name in _YARN:
            value = options.take(name, default=None)
            # As in transformers, 0 or null rotations are the default ones.
            if value is not None and not (name.startswith("beta") and not value):
                fields[name] = value
    return fields


def _number(options: Options, name: str, *default: float) -> float:
    value = options.take(name, default=default[0]) if default else options.take(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name}: expected a number, got {value!r}")
    return value


def scaling_options(value: Rotary) -> dict[str, Any] | None:
    """`rope_scaling` of a rotary embedding; None where it has no scaling."""
    if value.scaling is None:
        return None
    out: dict[str, Any] = {"rope_type": value.scaling, "factor": value.factor}
    if value.scaling in ("llama3", "yarn"):
        out["original_max_position_embeddings"] = value.original_max_length
    if value.scaling == "llama3":
        out["low_freq_factor"] = value.low_freq_factor
        out["high_freq_factor"] = value.high_freq_factor
    if value.scaling == "yarn":
        fields = {name: getattr(value, name) for name in _YARN}
        out.update((name, field) for name, field in fields.items() if field is not None)
    return out


def rope_options(value: Rotary | None) -> dict[str, Any]:
    """The options that `take_rotary` reads, in the words that transformers of all ages reads."""
    value = value or Rotary()
    return {"rope_theta": value.theta, "rope_scaling": scaling_options(value)}


def layer_types(options: Options, default: Sequence[bool]) -> list[bool]:
    """For each layer whether its attention slides.

    Args:
      default: where the file does not list `layer_types`.
    """
    types = options.take("layer_types", default=None)
    if types is None:
        return list(default)
    if not isinstance(types, list) or len(types) < len(default):
        raise ValueError(
            f"layer_types: expected one for each of {len(default)} layers, got {types}"
        )
    for kind in types:
        if kind not in (SLIDING, FULL):
            raise ValueError(f"layer_types: {kind!r} is not supported; {SLIDING} and {FULL} are")
    return [kind == SLIDING for kind in types[: len(default)]]


def window(options: Options, sliding: Sequence[bool]) -> list[int | None]:
    """Each layer's window."""
    size = options.take("sliding_window")
    if any(sliding) and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise ValueError(
            f"sliding_window: expected a positive int for sliding layers, got {size!r}"
        )
    return [size if slides else None for slides in sliding]


def kinds(per_layer: Sequence[AttentionKind]) -> dict[str, Any]:
    """The configuration's fields for these layers."""
    distinct = tuple(dict.fromkeys(per_layer))
    return {
        "attention_kinds": distinct,
        "layer_kinds": tuple(distinct.index(kind) for kind in per_layer),
    }


def per_layer(config: DecoderConfig) -> list[AttentionKind]:
    """Each layer's kind of attention."""
    return [config.kinds[index] for index in config.kind_indices]


def common_rotary(config: DecoderConfig) -> Rotary | None:
    """A rotary embedding of the configuration's layers; None where no layer has one."""
    found = [kind.rotary for kind in per_layer(config) if kind.rotary is not None]
    return found[0] if found else None


def common_window(config: DecoderConfig) -> int | None:
    """A window of the configuration's layers; None where no layer has one."""
    found = [kind.window for kind in per_layer(config) if kind.window is not None]
    return found[0] if found else None


def type_options(config: DecoderConfig) -> dict[str, Any]:
    """`sliding_window` and `layer_types`."""
    return {
        "sliding_window": common_window(config),
        "layer_types": [FULL if k.window is None else SLIDING for k in per_layer(config)],
    }
