"""The decoder's layers as NNX modules; each parameter carries the logical names of its axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pgjax.models import functional
from pgjax.models.config import DecoderConfig

# (query, key, value) -> (attended, whatever the caller wants back, such as a cache)
Attend = Callable[[Array, Array, Array], tuple[Array, Any]]

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
    "relu": jax.nn.relu,
}


def kernel(
    config: DecoderConfig,
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    *,
    fan_in: int,
    scale: float = 1.0,
) -> nnx.Param:
    """A parameter drawn from a normal distribution, see `DecoderConfig.init_stddev`."""
    stddev = scale * (config.init_stddev or fan_in**-0.5)
    draws = jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param((stddev * draws).astype(config.param_dtype), axes=axes)


def norm_scale(config: DecoderConfig, size: int, axis: str) -> nnx.Param:
    """The scale of an RMSNorm, ones."""
    return nnx.Param(jnp.ones(size, config.param_dtype), axes=(axis,))


class Attention(nnx.Module):
    """The projections around grouped-query attention; who attends to what is the caller's."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs) -> None:
        assert config.head_dim is not None and config.num_kv_heads is not None
        hidden, heads, dim = config.hidden_size, config.num_heads, config.head_dim
        kv_heads = config.num_kv_heads
        self.config = config
        self.query = kernel(
            config, rngs, (hidden, heads, dim), ("embed", "heads", "head_dim"), fan_in=hidden
        )
        self.key = kernel(
            config, rngs, (hidden, kv_heads, dim), ("embed", "kv_heads", "head_dim"), fan_in=hidden
        )
        self.value = kernel(
            config, rngs, (hidden, kv_heads, dim), ("embed", "kv_heads", "head_dim"), fan_in=hidden
        )
        self.output = kernel(
            config,
            rngs,
            (heads, dim, hidden),
            ("heads", "head_dim", "embed"),
            fan_in=heads * dim,
            scale=(2 * config.num_layers) ** -0.5,
        )
        if config.qk_norm:
            self.query_norm = norm_scale(config, dim, "head_dim")
            self.key_norm = norm_scale(config, dim, "head_dim")

    def __call__(
        self, x: Float[Array, "*batch H"], rotary: tuple[Array, Array], attend: Attend
    ) -> tuple[Float[Array, "*batch H"], Any]:
        query, key, value = (
            jnp.einsum("...h,hnd->...nd", x, weight[...].astype(x.dtype))
            for weight in (self.query, self.key, self.value)
        )
        if self.config.qk_norm:
            epsilon = self.config.norm_epsilon
            query = functional.rms_norm(query, self.query_norm[...], epsilon=epsilon)
            key = functional.rms_norm(key, self.key_norm[...], epsilon=epsilon)
        query, key = functional.rotate(query, rotary), functional.rotate(key, rotary)
        attended, extra = attend(query, key, value)
        return jnp.einsum("...nd,ndh->...h", attended, self.output[...].astype(x.dtype)), extra


class MLP(nnx.Module):
    """Two projections with an activation between them, optionally gated by a third."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs) -> None:
        hidden, inner = config.hidden_size, config.mlp_size
        self.config = config
        if config.gated:
            self.gate = kernel(config, rngs, (hidden, inner), ("embed", "mlp"), fan_in=hidden)
        self.up = kernel(config, rngs, (hidden, inner), ("embed", "mlp"), fan_in=hidden)
        self.down = kernel(
            config,
            rngs,
            (inner, hidden),
            ("mlp", "embed"),
            fan_in=inner,
            scale=(2 * config.num_layers) ** -0.5,
        )

    def __call__(self, x: Float[Array, "*batch H"]) -> Float[Array, "*batch H"]:
        activation = _ACTIVATIONS[self.config.activation]
        inner = x @ self.up[...].astype(x.dtype)
        if self.config.gated:
            inner = activation(x @ self.gate[...].astype(x.dtype)) * inner
        else:
            inner = activation(inner)
        return inner @ self.down[...].astype(x.dtype)


class Layer(nnx.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        self.attention_norm = norm_scale(config, config.hidden_size, "embed")
        self.attention = Attention(config, rngs)
        self.mlp_norm = norm_scale(config, config.hidden_size, "embed")
        self.mlp = MLP(config, rngs)

    def __call__(
        self, x: Float[Array, "*batch H"], rotary: tuple[Array, Array], attend: Attend
    ) -> tuple[Float[Array, "*batch H"], Any]:
        epsilon = self.config.norm_epsilon
        normed = functional.rms_norm(x, self.attention_norm[...], epsilon=epsilon)
        attended, extra = self.attention(normed, rotary, attend)
        x = x + attended
        normed = functional.rms_norm(x, self.mlp_norm[...], epsilon=epsilon)
        return x + self.mlp(normed), extra
