"""Adapters in the file format of Hugging Face PEFT."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pgjax import _paths, parallel
from pgjax.models import matrices
from pgjax.models.config import DecoderConfig
from pgjax.models.lora.adapters import Adapter, is_adapter

_MODULES = {
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/output": "self_attn.o_proj",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
}
_PATHS = {module: path for path, module in _MODULES.items()}

# Fields that change nothing about the forward pass of a loaded adapter.
_IRRELEVANT = {
    *("auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "task_type"),
    *("peft_version", "peft_type", "r", "lora_alpha", "target_modules", "use_rslora"),
    *("rank_pattern", "alpha_pattern", "lora_dropout", "init_lora_weights", "megatron_core"),
    *("exclude_modules", "qalora_group_size", "loftq_config", "eva_config", "corda_config"),
    *("lora_ga_config", "runtime_config", "layers_pattern", "ensure_weight_tying"),
}

_NAME = re.compile(
    r"^base_model\.model\.(?:.+\.)?layers\.(\d+)\.(.+)\.lora_(A|B)(?:\.default)?\.weight$"
)


def save_peft(
    directory: str | pathlib.Path,
    adapters: Mapping[str, Any],
    *,
    base_model: str | None = None,
    config: DecoderConfig | None = None,
) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`, which PEFT loads.

    The names are those of models whose projections are modules of their own, as in Llama,
    Mistral, Qwen, Gemma and OLMo.

    Args:
      directory: made where it does not exist.
      adapters: of one decoder, `{"layers": ...}`.
      base_model: name or path of the base model, as a note to others.
      config: of the base; with it, a base whose projections are fused is refused.

    Raises:
      ValueError: a base such as GPT-2, no adapters, one whose matrix has no such module (an
        expert's, say), or both scaling rules.
    """
    if config is not None and config.learned_positions:
        raise ValueError(
            "config: GPT-2 has query, key and value in one module (c_attn), for which adapters of "
            "each cannot be saved; merge them instead"
        )
    named = _named_adapters(adapters)
    rules = {adapter.rule for adapter in named.values()}
    if len(rules) > 1:
        raise ValueError(f"adapters: PEFT has one scaling rule for all, got {sorted(rules)}")
    tensors: dict[str, np.ndarray] = {}
    for path, adapter in named.items():
        layers, rank = adapter.a.shape[0], adapter.rank
        a = jnp.reshape(adapter.a, (layers, -1, rank)).swapaxes(1, 2)
        b = jnp.reshape(adapter.b, (layers, rank, -1)).swapaxes(1, 2)
        for part, stack in zip("AB", parallel.fetch((a, b)), strict=True):
            for layer in range(layers):
                name = f"model.layers.{layer}.{_MODULES[path]}.lora_{part}.weight"
                tensors[f"base_model.model.{name}"] = np.ascontiguousarray(stack[layer])
    modules = {path: _MODULES[path].rsplit(".", 1)[1] for path in named}
    ranks = {modules[path]: adapter.rank for path, adapter in named.items()}
    alphas = {modules[path]: _number(adapter.alpha) for path, adapter in named.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {m: r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {m: a for m, a in alphas.items() if a != alpha},
        "target_modules": sorted(ranks),
        "use_rslora": rules == {"rank_stabilized"},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    if not parallel.is_first():
        return
    from safetensors.numpy import save_file

    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    (directory / "adapter_config.json").write_text(json.dumps(described, indent=2) + "\n")


def load_peft(
    directory: str | pathlib.Path, params: Mapping[str, Any], *, dtype: Any = jnp.float32
) -> dict[str, Any]:
    """Adapters from a directory that PEFT (or `save_peft`) wrote.

    Args:
      directory: with `adapter_config.json` and `adapter_model.safetensors`.
      params: the base's, or `models.abstract_params(config)`; for the shapes.
      dtype: of the adapters.

    Returns:
      a tree as `lora.init` makes it.

    Raises:
      FileNotFoundError: a missing file, naming it.
      ValueError: an adapter of another kind (DoRA, trained biases, embeddings, modules saved
        whole, fused projections, ...), naming the feature; ranks that differ between layers of
        one module; tensors that are missing or do not fit.
    """
    directory = pathlib.Path(directory)
    config = _read_config(directory / "adapter_config.json")
    parts = _read_tensors(directory / "adapter_model.safetensors")
    layouts = matrices.of(params)
    leaves = _paths.named_leaves(params, is_leaf=matrices.is_leaf)
    adapters: dict[str, Any] = {}
    for module in sorted({module for _, module, _ in parts}):
        if module not in _PATHS or f"layers/{_PATHS[module]}" not in layouts:
            raise ValueError(
                f"adapter: layers.*.{module} is none of the base's modules "
                f"{', '.join(m for p, m in _MODULES.items() if f'layers/{p}' in layouts)}"
            )
        path = f"layers/{_PATHS[module]}"
        shape, layout = tuple(leaves[path].shape), layouts[path]
        split = layout.lead + layout.ins
        stacks = {}
        for part in "AB":
            found = {layer: x for (layer, m, p), x in parts.items() if (m, p) == (module, part)}
            if sorted(found) != list(range(shape[0])):
                raise ValueError(
                    f"adapter: expected lora_{part} of {module} for layers 0 to {shape[0] - 1}, "
                    f"got {sorted(found)}"
                )
            if len({x.shape for x in found.values()}) > 1:
                raise ValueError(f"adapter: lora_{part} of {module} differs in shape over layers")
            stacks[part] = jnp.stack([found[layer] for layer in range(shape[0])])
        rank, alpha = _rank_and_alpha(config, module, shape[0])
        wanted = {
            "A": (shape[0], rank, int(np.prod(shape[1:split]))),
            "B": (shape[0], int(np.prod(shape[split:])), rank),
        }
        for part, stack in stacks.items():
            if stack.shape != wanted[part]:
                raise ValueError(
                    f"adapter: lora_{part} of {module} has shape {stack.shape[1:]}, expected "
                    f"{wanted[part][1:]}"
                )
        adapter = Adapter(
            a=stacks["A"].swapaxes(1, 2).reshape(*shape[:split], rank).astype(dtype),
            b=stacks["B"].swapaxes(1, 2).reshape(shape[0], rank, *shape[split:]).astype(dtype),
            alpha=float(alpha),
            rule="rank_stabilized" if config.get("use_rslora") else "standard",
        )
        family, leaf = _PATHS[module].split("/")
        adapters.setdefault(family, {})[leaf] = adapter
    return {"layers": adapters}


def _named_adapters(adapters: Mapping[str, Any]) -> dict[str, Adapter]:
    named = {}
    flat = jax.tree_util.tree_leaves_with_path(dict(adapters), is_leaf=is_adapter)
    for path, adapter in flat:
        name = _paths.joined(path)
        short = name.removeprefix("layers/")
        if not is_adapter(adapter) or short == name or short not in _MODULES:
            raise ValueError(
                f"adapters: {name} has no PEFT module; expected adapters of "
                f"{', '.join(f'layers/{p}' for p in _MODULES)}"
            )
        named[short] = adapter
    if not named:
        raise ValueError("adapters: expected at least one, got none")
    return named


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else float(value)


def _read_config(path: pathlib.Path) -> dict[str, Any]:
    config = json.loads(path.read_text())
    if config.get("peft_type") != "LORA":
        raise ValueError(f"peft_type: expected LORA, got {config.get('peft_type')!r}")
    for field, value in config.items():
        neutral = value in (None, False, [], {}) or (field, value) == ("bias", "none")
        if field not in _IRRELEVANT and not neutral:
            raise ValueError(f"{field}: adapters with {field}={value!r} are not supported")
    return config


def _read_tensors(path: pathlib.Path) -> dict[tuple[int, str, str], Any]:
    """Each tensor by layer, module and "A" or "B"."""
    from safetensors.flax import load_file

    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    parts = {}
    for name, tensor in load_file(path).items():
        match = _NAME.match(name)
        if match is None:
            raise ValueError(
                f"adapter: tensor {name} is not supported; expected lora_A and lora_B of modules "
                "in model.layers"
            )
        layer, module, part = match.groups()
        parts[int(layer), module, part] = tensor
    if not parts:
        raise ValueError(f"adapter: no tensors in {path}")
    return parts


def _rank_and_alpha(config: Mapping[str, Any], module: str, layers: int) -> tuple[int, float]:
    found = {
        (
            _by_pattern(config.get("rank_pattern"), f"model.layers.{i}.{module}", config["r"]),
            _by_pattern(config.get("alpha_pattern"), f"model.layers.{i}.{module}", alpha),
        )
        for i in range(layers)
        for alpha in [config.get("lora_alpha", 8)]
    }
    if len(found) > 1:
        raise ValueError(
            f"rank_pattern, alpha_pattern: rank and alpha of {module} differ over layers, which is "
            "not supported"
        )
    return next(iter(found))


def _by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's rule: the first regular expression that matches the end of the module's name."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default
