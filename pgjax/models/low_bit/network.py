"""A decoder quantised layer by layer, each layer seeing what the quantised ones before it give."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pgjax import _checks, _paths
from pgjax.models import matrices
from pgjax.models.interface import FunctionalDecoder, Params
from pgjax.models.low_bit import trace
from pgjax.models.low_bit.packed import packed
from pgjax.models.quantization import Int8Matrix
from pgjax.quantize import core
from pgjax.quantize.hessian import quadratic_error
from pgjax.quantize.obq import QuantResult

STAGES = (
    ("attention/query", "attention/key", "attention/value"),
    ("attention/output",),
    ("mlp/gate", "mlp/up"),
    ("mlp/down",),
)
"""Matrices that read the same input, in the order in which they are quantised."""


class Site(NamedTuple):
    """One matrix that is to be quantised, and what calibration says about its input.

    Attributes:
      name: such as "layers/mlp/up".
      layer: its index.
      weight: `[out, in]`.
      hessian: `input_hessian` behind the layers quantised so far.
      mismatch: `input_mismatch` to the network before any was.
    """

    name: str
    layer: int
    weight: Float[Array, "r c"]
    hessian: Float[Array, "c c"]
    mismatch: Float[Array, "c c"]


class Quantized(NamedTuple):
    """A quantised decoder.

    Attributes:
      params: with `PackedMatrix` leaves, for the decoder's functions.
      errors: each matrix's `½ tr (W - Q) H (W - Q)ᵀ`, `[L]`, by name.
      bytes_before, bytes_after: of the quantised matrices, scales and zero points included.
    """

    params: Params
    errors: dict[str, np.ndarray]
    bytes_before: int
    bytes_after: int


def quantize_decoder(
    decoder: FunctionalDecoder,
    params: Params,
    tokens: Int[Array, "B T"],
    method: Callable[[Site], QuantResult],
    *,
    bits: int,
    mask: Bool[Array, "B T"] | None = None,
    targets: Sequence[str] = ("*",),
    scale_dtype: Any = jnp.bfloat16,
    act_order: bool = False,
    batch_size: int | None = None,
) -> Quantized:
    """Quantises the layers' matrices in the order in which inputs pass them.

    Query, key and value first; the output projection sees their quantised attention, the MLP what
    that adds up to, and the next layer all of it. Embeddings, norms and biases stay.

    Args:
      decoder: with dense layers, no mixture of experts.
      params: the decoder's, arrays.
      tokens: calibration rows.
      method: a layer's quantiser, for instance
        `lambda site: gptq(site.weight, site.hessian, bits=3, group=32, scale_dtype=jnp.bfloat16)`.
      bits: those the method quantises to.
      mask: tokens that count; None: all.
      targets: globs of paths such as "layers/mlp/*" among the layers' matrices.
      scale_dtype: scales are stored in; the method's, or the stored matrix is another one.
      act_order: whether the method reorders columns.
      batch_size: rows run at once, a divisor of B; None: all.

    Raises:
      ValueError: a mixture of experts, parameters that are no arrays, a pattern that matches
        nothing, shapes that do not fit, a method that returns another shape.
    """
    mask = _check_calibration(decoder, tokens, mask, batch_size)
    layouts = matrices.of(params)
    targets = _paths.sequence_of_patterns("targets", targets)
    _paths.check_patterns("targets", targets, layouts, "matrices")
    chosen = {n for n in layouts if any(_paths.matches(p, n) for p in targets)}
    for name, leaf in _paths.named_leaves(params, is_leaf=matrices.is_leaf).items():
        if not isinstance(leaf, jax.Array | np.ndarray):
            raise ValueError(f"{name}: expected a JAX array, got {type(leaf).__name__}")
    full = given = trace.embedded(decoder, params, tokens)
    count = decoder.config.num_layers
    done: dict[str, list[Any]] = {name: [] for name in chosen}
    errors: dict[str, list[float]] = {name: [] for name in chosen}
    for index in range(count):
        whole = jax.tree.map(lambda x, i=index: x[i], params["layers"])
        now = whole
        run = functools.partial(
            trace.moments,
            decoder=decoder,
            kind=decoder.config.kind_indices[index],
            batch_size=batch_size,
        )
        for stage in STAGES:
            names = [n for n in stage if f"layers/{n}" in chosen]
            if not names:
                continue
            moments = run(params, whole, now, full, given, mask)
            hessian, mismatch = moments[stage[0]]
            for short in names:
                name = f"layers/{short}"
                ins, outs = _axes(_at(whole, short), matrices.LAYOUTS[short])
                weight = jnp.asarray(_at(whole, short), jnp.float32)
                weight = weight.reshape(math.prod(ins), math.prod(outs)).T
                result = method(Site(name, index, weight, hessian, mismatch))
                if result.codes.shape != weight.shape:
                    raise ValueError(
                        f"method: expected a result of shape {weight.shape} for {name}, got "
                        f"{result.codes.shape}"
                    )
                matrix = packed(
                    result,
                    bits=bits,
                    ins=ins,
                    outs=outs,
                    scale_dtype=scale_dtype,
                    act_order=act_order,
                )
                # Dense, so that one program serves every stage and every number of bits.
                now = _replaced(now, short, matrix.dense(_at(whole, short).dtype))
                done[name].append(matrix)
                errors[name].append(float(quadratic_error(weight, result.q, hessian)))
        if index + 1 < count:
            forward = functools.partial(
                trace.outputs,
                decoder=decoder,
                kind=decoder.config.kind_indices[index],
                batch_size=batch_size,
            )
            full, given = forward(params, whole, full), forward(params, now, given)
    layers = params["layers"]
    stacks = {name: jax.tree.map(lambda *x: jnp.stack(x), *parts) for name, parts in done.items()}
    before = core.num_bytes([_at(layers, n.removeprefix("layers/")) for n in stacks])
    for name, matrix in stacks.items():
        layers = _replaced(layers, name.removeprefix("layers/"), matrix)
    return Quantized(
        {**params, "layers": layers},
        {name: np.array(values) for name, values in errors.items()},
        before,
        core.num_bytes(list(stacks.values())),
    )


def layer_moments(
    decoder: FunctionalDecoder,
    params: Params,
    tokens: Int[Array, "B T"],
    *,
    mask: Bool[Array, "B T"] | None = None,
    batch_size: int | None = None,
) -> list[dict[str, Float[Array, "c c"]]]:
    """`input_hessian` of every matrix's input, layer by layer, with nothing quantised.

    Args:
      decoder, params, tokens, mask, batch_size: as `quantize_decoder`.

    Returns:
      for each layer, by the first name of each of `STAGES`.
    """
    mask = _check_calibration(decoder, tokens, mask, batch_size)
    x = trace.embedded(decoder, params, tokens)
    found = []
    for index, kind in enumerate(decoder.config.kind_indices):
        layer = jax.tree.map(lambda leaf, i=index: leaf[i], params["layers"])
        options: Any = {"decoder": decoder, "kind": kind, "batch_size": batch_size}
        both = trace.moments(params, layer, layer, x, x, mask, **options)
        found.append({name: pair[0] for name, pair in both.items()})
        x = trace.outputs(params, layer, x, **options)
    return found


def dense_params(params: Params) -> Params:
    """The parameters with every packed or 8-bit matrix multiplied out."""

    def dense(leaf: Any) -> Any:
        return leaf.dense() if isinstance(leaf, Int8Matrix) else leaf

    return jax.tree.map(dense, params, is_leaf=lambda x: isinstance(x, Int8Matrix))


def _check_calibration(
    decoder: FunctionalDecoder, tokens: Any, mask: Any, batch_size: int | None
) -> Array:
    if decoder.config.moe is not None:
        raise ValueError("decoder: expected dense layers, got a mixture of experts")
    _checks.rank("tokens", tokens, 2)
    _checks.integer(tokens=tokens)
    _checks.same_shape(tokens=tokens, mask=mask)
    _checks.boolean(mask=mask)
    rows = tokens.shape[0]
    if batch_size is not None and (batch_size < 1 or rows % batch_size):
        raise ValueError(f"batch_size: expected a divisor of {rows} rows, got {batch_size}")
    return jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask)


def _axes(leaf: Array, layout: matrices.Layout) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Input and output axes of one layer's matrix."""
    return tuple(leaf.shape[: layout.ins]), tuple(leaf.shape[layout.ins :])


def _at(tree: Mapping[str, Any], path: str) -> Any:
    for part in path.split("/"):
        tree = tree[part]
    return tree


def _replaced(tree: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    head, _, rest = path.partition("/")
    return {**tree, head: _replaced(tree[head], rest, value) if rest else value}
