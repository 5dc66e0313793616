"""Channel scales of a whole decoder, folded into its norms and matrices.

The function of the unquantised decoder stays what it is; only what rounding does to it changes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pgjax import _checks, _paths
from pgjax.models import matrices
from pgjax.models.config import DecoderConfig
from pgjax.models.interface import FunctionalDecoder, Params
from pgjax.models.low_bit.network import STAGES, layer_moments
from pgjax.quantize import channels, finetune_signal

_NORMS = {"attention/query": "attention_norm", "mlp/gate": "mlp_norm"}


def finetune_importance(
    base: Params, tuned: Params, *, ratio: float = 10.0
) -> dict[str, Float[Array, "L c"]]:
    """QuantLRM's importance of every input channel from parameters before and after fine-tuning.

    Matrices that read the same input share one importance: that of the query, of the gate (of the
    up projection where there is no gate), of the output and of the down projection.

    Args:
      base, tuned: parameters of a decoder, as they are stored: exact zeros of the difference
        count, so both in the dtype that was trained (bfloat16, say).
      ratio: R of `protect_ends`.

    Returns:
      `[L, in]` by the first name of each of `network.STAGES`.

    Raises:
      ValueError: trees that differ in structure or shapes, no positive difference, R below 1.

    Source: QuantLRM, 2026, arXiv:2602.02581.
    """
    deltas = finetune_signal.update_sizes(base["layers"], tuned["layers"])
    flat = {
        name: value
        for name, value in _paths.named_leaves(deltas).items()
        if name in matrices.LAYOUTS
    }
    stats = finetune_signal.update_stats(flat)
    found = {}
    for stage in STAGES:
        name = next(n for n in stage if n in flat)
        layout = matrices.LAYOUTS[name]

        def of_layer(delta: Array, ins: int = layout.ins) -> Array:
            size = math.prod(delta.shape[:ins])
            rows = delta.reshape(size, -1).T
            return finetune_signal.channel_importance(rows, stats, ratio=ratio)

        found[stage[0]] = jax.vmap(of_layer)(flat[name])
    return found


def activation_scales(moments: list[dict[str, Array]]) -> dict[str, Float[Array, "L c"]]:
    """The root mean square of every input channel, as an importance, from `layer_moments`."""
    return {
        name: jnp.stack([channels.hessian_importance(layer[name] / 2) for layer in moments])
        for name in moments[0]
    }


def scale_channels(
    decoder: FunctionalDecoder,
    params: Params,
    tokens: Int[Array, "B T"],
    importance: Mapping[str, Float[Array, "L c"]],
    *,
    bits: int,
    group: int | None = 128,
    n_grid: int = 20,
    mask: Array | None = None,
    scale_dtype: Any = jnp.bfloat16,
    batch_size: int | None = None,
) -> tuple[Params, dict[str, np.ndarray]]:
    """The decoder with its matrices scaled by the powers of the importance that round best.

    Each search is `channels.channel_search` on the outputs of the matrices that share an input.
    The inverse goes into the norm before query, key and value or before gate and up, into the
    value for the output projection (averaged over query heads that share one), and into up for
    down. Down stays as it is where the MLP is not homogeneous in up: without a gate unless the
    activation is a ReLU, and with "clamped_swiglu".

    Args:
      decoder, params, tokens, mask, batch_size: as `quantize_decoder`.
      importance: positive, by the first name of each of `network.STAGES`; stages left out are not
        scaled.
      bits, group, scale_dtype: of the grid that will be used.
      n_grid: exponents tried.

    Returns:
      params: of the same function.
      ratios: the exponents, `[L]` by stage.

    Raises:
      ValueError: an unknown stage, shapes that do not fit, and as `quantize_decoder`.

    Source: Lin et al., "AWQ", 2023, arXiv:2306.00978.
    """
    config = decoder.config
    known = [stage[0] for stage in STAGES]
    for name in importance:
        _checks.one_of("importance", name, known)
    moments = layer_moments(decoder, params, tokens, mask=mask, batch_size=batch_size)
    done, ratios = [], {name: [] for name in known if name in importance}  # type: ignore[var-annotated]
    for index, moment in enumerate(moments):
        layer: Any = jax.tree.map(lambda x, i=index: x[i], params["layers"])
        for stage in STAGES:
            first = stage[0]
            if first not in ratios or (first == "mlp/down" and not _homogeneous(config)):
                continue
            rows = [_rows(layer, name) for name in stage if _has(layer, name)]
            if importance[first].shape[0] != config.num_layers:
                raise ValueError(
                    f"importance: expected {config.num_layers} layers for {first}, got shape "
                    f"{importance[first].shape}"
                )
            found = channels.channel_search(
                jnp.concatenate(rows),
                moment[first] / 2,
                importance[first][index],
                bits=bits,
                group=group,
                n_grid=n_grid,
                scale_dtype=scale_dtype,
            )
            ratios[first].append(float(found.ratio))
            layer = _folded(layer, stage, found.scale, config)
        done.append(layer)
    layers = jax.tree.map(lambda *x: jnp.stack(x), *done)
    return {**params, "layers": layers}, {n: np.array(r) for n, r in ratios.items() if r}


def _folded(layer: Any, stage: tuple[str, ...], scale: Array, config: DecoderConfig) -> Any:
    """One layer with the inputs of a stage divided by the scale and its matrices multiplied."""
    block, first = stage[0].split("/")
    part = dict(layer[block])
    if stage[0] in _NORMS:
        layer = _divided_norm(layer, _NORMS[stage[0]], scale, config)
        for name in [n.split("/")[1] for n in stage if n.split("/")[1] in part]:
            part[name] = _times(part[name], scale.reshape(-1, *[1] * (part[name].ndim - 1)))
    elif first == "output":
        heads, dim, _ = part["output"].shape
        kv_heads = part["value"].shape[1]
        shared = scale.reshape(kv_heads, heads // kv_heads, dim).mean(1)  # [kv_heads, dim]
        part["value"] = _times(part["value"], 1 / shared)
        if "value_bias" in part:
            part["value_bias"] = _times(part["value_bias"], 1 / shared)
        repeated = jnp.repeat(shared, heads // kv_heads, axis=0)
        part["output"] = _times(part["output"], repeated[..., None])
    else:
        part["up"] = _times(part["up"], 1 / scale)
        if "up_bias" in part:
            part["up_bias"] = _times(part["up_bias"], 1 / scale)
        part["down"] = _times(part["down"], scale[:, None])
    return {**layer, block: part}


def _divided_norm(layer: Any, name: str, scale: Array, config: DecoderConfig) -> Any:
    offset = config.norm_scale_offset if config.norm == "rms" else 0.0
    old = layer[name]
    new = ((offset + old.astype(jnp.float32)) / scale - offset).astype(old.dtype)
    changed = {**layer, name: new}
    if config.norm == "layer":
        changed[f"{name}_bias"] = _times(layer[f"{name}_bias"], 1 / scale)
    return changed


def _homogeneous(config: DecoderConfig) -> bool:
    """Whether dividing up's outputs divides down's inputs."""
    return config.activation != "clamped_swiglu" if config.gated else config.activation == "relu"


def _has(layer: Any, name: str) -> bool:
    block, leaf = name.split("/")
    return leaf in layer[block]


def _rows(layer: Any, name: str) -> Array:
    """A matrix of one layer as `[out, in]`."""
    block, leaf = name.split("/")
    weight = layer[block][leaf]
    size = math.prod(weight.shape[: matrices.LAYOUTS[name].ins])
    return weight.astype(jnp.float32).reshape(size, -1).T


def _times(x: Array, factor: Array) -> Array:
    return (x.astype(jnp.float32) * factor).astype(x.dtype)
