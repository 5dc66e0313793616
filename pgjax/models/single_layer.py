"""One attention layer and one position-wise ReLU network: a construction for what they can express.

A sequence of n tokens with d features and one-hot positions; every head writes a slot of its own:

    Z_i = (x_i, head_1(i), ..., head_H(i), e_i),   Y_i = W_2 relu(W_1 Z_i + b_1) + b_2

Let head h of n look at token h alone, whatever the content. Then Z_i is the flattened sequence and
its position, up to `2 (n - 1) exp(-β) max|x|`, and the second layer, which approximates any
continuous function of that, makes the whole approximate any continuous map of sequences. Without
positions only maps that commute with permutations of the tokens can be reached.

Source: claim of Gumaan, Universal approximation theorem for a single-layer transformer, 2025, arXiv
2507.10581; the construction is made here.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from pgjax import _checks

AttentionParams = dict[str, Array]
SingleLayerParams = dict[str, Any]


def routing_attention_params(*, tokens: int, features: int, beta: float = 30.0) -> AttentionParams:
    """Attention of as many heads as tokens, in which head h looks at token h.

    Its score of token j is `β 1[j = h]`, so that this token's weight is `e^β / (e^β + n - 1)`.

    Args:
      tokens: n, at least 1.
      features: d, at least 1.
      beta: at least 0; 0 averages over all tokens.

    Returns:
      `query` f32[n, d + n, n], `query_bias` f32[n, n], `key` f32[n, d + n, n], `value`
      f32[n, d + n, d]; the first axis is the head.

    Raises:
      ValueError: a number out of range.
    """
    _sizes(tokens=tokens, features=features)
    _checks.in_range("beta", beta, 0)
    position = jnp.concatenate([jnp.zeros((features, tokens)), jnp.eye(tokens)])
    content = jnp.eye(features + tokens, features)
    return {
        "query": jnp.zeros((tokens, features + tokens, tokens)),
        "query_bias": beta * jnp.eye(tokens),
        "key": jnp.broadcast_to(position, (tokens, *position.shape)),
        "value": jnp.broadcast_to(content, (tokens, *content.shape)),
    }


def single_layer_init(
    key: PRNGKeyArray,
    *,
    tokens: int,
    features: int,
    width: int,
    outputs: int = 1,
    heads: int | None = None,
    positions: bool = True,
) -> SingleLayerParams:
    """Random parameters: `attention` as in `routing_attention_params`, `hidden` and `output`.

    Args:
      key: of the draws, normal with variance 1 over the number of inputs; biases of the hidden
        layer are normal with variance 1, so that kinks lie all over the domain.
      tokens, features, outputs: n, d and the size of Y_i, at least 1.
      width: of the hidden layer, at least 1.
      heads: at least 1; None for n.
      positions: static; whether tokens know where they are.

    Raises:
      ValueError: a number out of range.
    """
    count = tokens if heads is None else heads
    _sizes(tokens=tokens, features=features, width=width, outputs=outputs, heads=count)
    inputs = features + tokens * positions
    slots = inputs + count * features
    keys = jax.random.split(key, 6)

    def normal(key: PRNGKeyArray, *shape: int) -> Array:
        return jax.random.normal(key, shape) / math.sqrt(shape[-2])

    return {
        "attention": {
            "query": normal(keys[0], count, inputs, tokens),
            "query_bias": jnp.zeros((count, tokens)),
            "key": normal(keys[1], count, inputs, tokens),
            "value": normal(keys[2], count, inputs, features),
        },
        "hidden": {
            "kernel": normal(keys[3], slots, width),
            "bias": jax.random.normal(keys[4], (width,)),
        },
        "output": {"kernel": normal(keys[5], width, outputs), "bias": jnp.zeros(outputs)},
    }


def attention_weights(
    attention: AttentionParams, x: Float[Array, "*batch n d"], *, positions: bool = True
) -> Float[Array, "*batch H n n"]:
    """Softmax over the last axis of `<q_i, k_j>`, of each head; rows sum to 1.

    Args:
      attention: from `routing_attention_params`, or trained.
      x: tokens.
      positions: static; appends one-hot positions to the tokens.

    Raises:
      ValueError: x of rank below 2, or of another size than the parameters are for.
    """
    inputs = _inputs(attention, x, positions)
    query = jnp.einsum("...nf,hfk->...hnk", inputs, attention["query"], precision="highest")
    query = query + attention["query_bias"][:, None]
    key = jnp.einsum("...nf,hfk->...hnk", inputs, attention["key"], precision="highest")
    scores = jnp.einsum("...hik,...hjk->...hij", query, key, precision="highest")
    return jax.nn.softmax(scores, axis=-1)


def attention_slots(
    attention: AttentionParams, x: Float[Array, "*batch n d"], *, positions: bool = True
) -> Float[Array, "*batch n Z"]:
    """`Z_i = (x_i, head_1(i), ..., head_H(i), e_i)`, without the last part if not `positions`.

    Args, raises: as `attention_weights`.
    """
    inputs = _inputs(attention, x, positions)
    weights = attention_weights(attention, x, positions=positions)
    value = jnp.einsum("...nf,hfv->...hnv", inputs, attention["value"], precision="highest")
    heads = jnp.einsum("...hij,...hjv->...ihv", weights, value, precision="highest")
    heads = heads.reshape(*heads.shape[:-2], -1)
    size = x.shape[-1]
    return jnp.concatenate([inputs[..., :size], heads, inputs[..., size:]], axis=-1)


def hidden_units(
    hidden: dict[str, Array], slots: Float[Array, "*batch Z"]
) -> Float[Array, "*batch W"]:
    """`relu(W_1 z + b_1)`.

    Raises:
      ValueError: slots of another size than the kernel is for.
    """
    if slots.shape[-1:] != hidden["kernel"].shape[:1]:
        raise ValueError(
            f"slots: expected last axis {hidden['kernel'].shape[0]}, got shape {slots.shape}"
        )
    return jax.nn.relu(jnp.matmul(slots, hidden["kernel"], precision="highest") + hidden["bias"])


def single_layer_apply(
    params: SingleLayerParams, x: Float[Array, "*batch n d"], *, positions: bool = True
) -> Float[Array, "*batch n O"]:
    """The whole layer: attention, then the ReLU network at each position.

    Args:
      params: from `single_layer_init`.
      x: tokens.
      positions: static, as at `single_layer_init`.

    Raises:
      ValueError: as `attention_weights`.
    """
    slots = attention_slots(params["attention"], x, positions=positions)
    units = hidden_units(params["hidden"], slots)
    output = params["output"]
    return jnp.matmul(units, output["kernel"], precision="highest") + output["bias"]


def random_feature_fit(
    units: Float[Array, "N W"], targets: Float[Array, "N O"], *, ridge: float = 1e-6
) -> dict[str, Array]:
    """The output layer of least squares: `min Σ ‖u W + b - y‖² / N + ridge s ‖W‖²`.

    The unit s of the ridge is the mean square of the units less their means, b is free.

    Args:
      units: of the hidden layer, N examples.
      targets: `y`.
      ridge: above 0. In float32, much below 1e-6 rounding may make the system indefinite: NaN.

    Returns:
      `kernel` [W, O] and `bias` [O], as in `single_layer_init`.

    Raises:
      ValueError: wrong ranks or lengths, a ridge not above 0.
    """
    _checks.rank("units", units, 2)
    _checks.rank("targets", targets, 2)
    _checks.floating(units=units, targets=targets)
    _checks.in_range("ridge", ridge, 0, low_open=True)
    count = jnp.shape(units)[0]
    if count < 1 or jnp.shape(targets)[0] != count:
        raise ValueError(
            f"targets: expected one row for each of units, {jnp.shape(units)}, "
            f"got shape {jnp.shape(targets)}"
        )
    wide = jnp.promote_types(jnp.result_type(units, targets), jnp.float32)
    u, y = jnp.asarray(units, wide), jnp.asarray(targets, wide)
    u_mean, y_mean = u.mean(0), y.mean(0)
    u, y = u - u_mean, y - y_mean
    gram = jnp.matmul(u.T, u, precision="highest") / count
    size = jnp.trace(gram)
    gram = gram + ridge * jnp.where(size > 0, size, 1.0) * jnp.eye(gram.shape[0], dtype=wide)
    along = jnp.matmul(u.T, y, precision="highest") / count
    kernel = jax.scipy.linalg.solve(gram, along, assume_a="pos")
    return {"kernel": kernel, "bias": y_mean - jnp.matmul(u_mean, kernel, precision="highest")}


def _inputs(attention: AttentionParams, x: Array, positions: bool) -> Array:
    if jnp.ndim(x) < 2:
        raise ValueError(f"x: expected [..., tokens, features], got shape {jnp.shape(x)}")
    tokens, features = x.shape[-2:]
    wanted = attention["key"].shape[1]
    got = features + tokens * positions
    if got != wanted or (positions and tokens != attention["key"].shape[2]):
        raise ValueError(
            f"x: expected {wanted} numbers a token{', one-hot position included' * positions}, "
            f"got {got} from shape {x.shape}"
        )
    _checks.floating(x=x)
    wide = jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))
    if not positions:
        return wide
    where = jnp.broadcast_to(jnp.eye(tokens, dtype=wide.dtype), (*x.shape[:-1], tokens))
    return jnp.concatenate([wide, where], axis=-1)


def _sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")
