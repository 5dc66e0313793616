"""A model family: one mapping between config.json and `DecoderConfig`, and one map of keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from pgjax.models.config import DecoderConfig
from pgjax.models.pretrained import rope
from pgjax.models.pretrained.layout import Layout, Sizes, parse
from pgjax.models.pretrained.options import Options

Leaf = tuple[str, ...]
"""Path of a parameter in the tree."""

# Fields that say how a decoder is run or drawn, not which function it is.
_RUNTIME = ("max_length", "init_stddev", "dtype", "param_dtype", "remat")


@dataclasses.dataclass(frozen=True)
class Key:
    """Where a parameter lies in a checkpoint.

    Attributes:
      leaf: the parameter's path, joined with "/".
      name: of the tensor, with "{layer}" and "{expert}" where there is one for each.
      layout: the tensor's axes and the parameter's; see `Layout`.
    """

    leaf: str
    name: str
    layout: str

    @property
    def path(self) -> Leaf:
        return tuple(self.leaf.split("/"))

    @property
    def parsed(self) -> Layout:
        return parse(self.layout)

    @property
    def leading(self) -> tuple[str, ...]:
        """The parameter's leading axes, each index of which is in a tensor of its own."""
        return tuple(axis for axis in ("layer", "expert") if f"{{{axis}}}" in self.name)

    def tensor(self, *leading: int) -> str:
        """The name of the tensor at these indices of the leading axes."""
        return self.name.format(**dict(zip(self.leading, leading, strict=True)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What one `model_type` of transformers is here.

    Attributes:
      name: the model_type.
      causal, sequence, base: transformers' classes with a language model's head, with a head for
        whole sequences (None: there is none), and without a head.
      prefix: of all names but the heads' in `keys`; a checkpoint of the base class has none.
      anchor: a tensor every checkpoint has, without the prefix.
      defaults: options that a config.json may leave out, as in transformers.
      theta: default base of the rotary frequencies.
      read: the fields of `DecoderConfig` (those of `_RUNTIME` but `max_length` aside); raises
        ValueError for what is not supported.
      write: the options for a configuration; whether they are right is found by reading them.
        ValueError where there are none.
      keys: of several for one parameter the first whose tensors are all there counts, and the
        first is what is saved.
      skipped: regular expressions of whole names that may be in a checkpoint and are not read:
        buffers that follow from the configuration, towers of other modalities.
      renamed: beginnings of names that mean others.
      harmless: options of this family beside `options.HARMLESS`.
    """

    name: str
    causal: str
    sequence: str | None
    base: str
    prefix: str = "model."
    anchor: str = "embed_tokens.weight"
    defaults: Mapping[str, Any]
    theta: float = 10_000.0
    read: Callable[[Options, float], dict[str, Any]]
    write: Callable[[DecoderConfig], dict[str, Any]]
    keys: tuple[Key, ...]
    skipped: tuple[str, ...] = ()
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    harmless: frozenset[str] = frozenset()

    def config(self, values: Mapping[str, Any]) -> DecoderConfig:
        """The configuration that a config.json describes; ValueError where it cannot be had."""
        options = Options(values, self.defaults)
        options.only("quantization_config", None, why="quantised weights cannot be read")
        options.only("tie_encoder_decoder", False, None, why="there is no encoder")
        fields = self.read(options, self.theta)
        options.finish(self.harmless)
        return DecoderConfig(**fields)

    def options(self, config: DecoderConfig) -> dict[str, Any]:
        """A config.json for a configuration; `Misfit` where the family cannot express it."""
        values = {"model_type": self.name, "architectures": [self.causal]}
        try:
            values |= self.write(config)
            found = self.config(values)
        except ValueError as error:
            raise Misfit(f"{self.name}: {error}", len(_FIELDS)) from error
        if fields := differences(config, found):
            raise Misfit(f"{self.name} has no {', '.join(fields)}", len(fields))
        return values


class Misfit(ValueError):
    """A configuration that a family cannot express; `count` says in how many fields."""

    def __init__(self, message: str, count: int) -> None:
        super().__init__(message)
        self.count = count


_FIELDS = tuple(
    field.name
    for field in dataclasses.fields(DecoderConfig)
    if field.name not in (*_RUNTIME, "rope_theta", "layer_kinds")
)


def differences(wanted: DecoderConfig, found: DecoderConfig) -> list[str]:
    """The fields, with their wanted values, in which two decoders are different functions."""
    names = list(_FIELDS)
    if wanted.moe is not None and found.moe is not None:
        names.remove("mlp_size")
    if wanted.learned_positions and found.learned_positions:
        names.append("max_length")
    out = []
    for name in names:
        value = _meaning(wanted, name)
        if value != _meaning(found, name):
            out.append(f"{name} {_shown(value)}")
    return out


def _meaning(config: DecoderConfig, name: str) -> Any:
    if name == "attention_kinds":
        return rope.per_layer(config)
    if name == "query_scale":
        assert config.head_dim is not None
        return config.query_scale or config.head_dim**-0.5
    return getattr(config, name)


def _shown(value: Any) -> str:
    if isinstance(value, list):  # of the layers' kinds of attention
        return f"({', '.join(map(_shown, dict.fromkeys(value)))})"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: f.default for f in dataclasses.fields(value)}
        given = {n: getattr(value, n) for n in fields if getattr(value, n) != fields[n]}
        return f"{type(value).__name__}({', '.join(f'{n}={_shown(v)}' for n, v in given.items())})"
    return repr(value)


def axis_sizes(config: DecoderConfig) -> Sizes:
    """The named axes of all layouts."""
    assert config.num_kv_heads is not None and config.head_dim is not None
    named = {
        "vocab": config.vocab_size,
        "position": config.max_length,
        "hidden": config.hidden_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "all_heads": config.num_heads * config.head_dim,
        "all_kv_heads": config.num_kv_heads * config.head_dim,
        "inner": config.mlp_size,
        "layer": config.num_layers,
    }
    if config.moe is not None:
        named |= {
            "expert": config.moe.num_experts,
            "inner": config.moe.expert_size,
            "shared": config.moe.shared_size or 0,
        }
    return named
