"""The decoder's layers as NNX modules; each parameter carries the logical names of its axes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from pgjax.models import decoding, functional, moe
from pgjax.models.config import DecoderConfig, MoEConfig
from pgjax.parallel.sharding import row_ways

# (query, key, value, sinks) -> (attended, whatever the caller wants back, such as a cache)
Attend = Callable[[Array, Array, Array, Array | None], tuple[Array, Any]]
# Router logits and chosen experts of one layer; None where there is no mixture.
LayerRouting = tuple[Array, Array] | None


def value(param: nnx.Param) -> Any:
    """What a parameter holds: an array, or a pytree that stands for one (see `linear`)."""
    return param.get_value() if hasattr(param, "get_value") else param.value


def kernel(
    config: DecoderConfig,
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    *,
    fan_in: int,
    scale: float = 1.0,
) -> nnx.Param:
    """A parameter drawn from a normal distribution, see `DecoderConfig.init_stddev`."""
    stddev = scale * (config.init_stddev or fan_in**-0.5)
    draws = jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param((stddev * draws).astype(config.param_dtype), axes=axes)


def zeros(config: DecoderConfig, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    """A bias."""
    return nnx.Param(jnp.zeros(shape, config.param_dtype), axes=axes)


def norm_scale(config: DecoderConfig, size: int, axis: str) -> nnx.Param:
    """The scale of a norm that does nothing but normalise."""
    start = 1.0 - config.norm_scale_offset
    return nnx.Param(jnp.full(size, start, config.param_dtype), axes=(axis,))


def _residual_scale(config: DecoderConfig) -> float:
    return (2 * config.num_layers) ** -0.5


def _projected(
    module: nnx.Module, x: Array, names: tuple[str, ...], *, biased: bool
) -> list[Array]:
    outs = decoding.project(x, *(value(getattr(module, name)) for name in names))
    if not biased:
        return outs
    biases = [value(getattr(module, f"{name}_bias")) for name in names]
    return [out + bias.astype(out.dtype) for out, bias in zip(outs, biases, strict=True)]


class Attention(nnx.Module):
    """The projections around grouped-query attention; who attends to what is the caller's."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs) -> None:
        assert config.head_dim is not None and config.num_kv_heads is not None
        hidden, heads, dim = config.hidden_size, config.num_heads, config.head_dim
        kv_heads = config.num_kv_heads
        self.config = config
        for name, count, axis in (
            ("query", heads, "heads"),
            ("key", kv_heads, "kv_heads"),
            ("value", kv_heads, "kv_heads"),
        ):
            shape, axes = (hidden, count, dim), ("embed", axis, "head_dim")
            setattr(self, name, kernel(config, rngs, shape, axes, fan_in=hidden))
            if config.qkv_bias:
                setattr(self, f"{name}_bias", zeros(config, shape[1:], axes[1:]))
        self.output = kernel(
            config,
            rngs,
            (heads, dim, hidden),
            ("heads", "head_dim", "embed"),
            fan_in=heads * dim,
            scale=_residual_scale(config),
        )
        if config.output_bias:
            self.output_bias = zeros(config, (hidden,), ("embed",))
        if config.qk_norm == "head":
            self.query_norm = norm_scale(config, dim, "head_dim")
            self.key_norm = norm_scale(config, dim, "head_dim")
        elif config.qk_norm == "projection":
            self.query_norm = norm_scale(config, heads * dim, "heads")
            self.key_norm = norm_scale(config, kv_heads * dim, "kv_heads")
        if config.attention_sinks:
            self.sinks = zeros(config, (heads,), ("heads",))

    def __call__(self, x: Float[Array, "*batch H"], attend: Attend) -> tuple[Array, Any]:
        names = ("query", "key", "value")
        query, key, values = _projected(self, x, names, biased=self.config.qkv_bias)
        if self.config.qk_norm:
            query = self._normed(query, self.query_norm)
            key = self._normed(key, self.key_norm)
        sinks = value(self.sinks) if self.config.attention_sinks else None
        attended, extra = attend(query, key, values, sinks)
        (out,) = decoding.project(attended, value(self.output), in_axes=2)
        if self.config.output_bias:
            out += value(self.output_bias).astype(out.dtype)
        return out, extra

    def _normed(self, x: Array, scale: nnx.Param) -> Array:
        shape = x.shape
        if self.config.qk_norm == "projection":
            x = x.reshape(*shape[:-2], -1)
        return functional.rms_norm(
            x,
            value(scale),
            epsilon=self.config.norm_epsilon,
            scale_offset=self.config.norm_scale_offset,
        ).reshape(shape)


class MLP(nnx.Module):
    """Two projections with an activation between them, optionally gated by a third."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs) -> None:
        hidden, inner = config.hidden_size, config.mlp_size
        self.config = config
        for name in ("gate", "up") if config.gated else ("up",):
            axes = ("embed", "mlp")
            setattr(self, name, kernel(config, rngs, (hidden, inner), axes, fan_in=hidden))
            if config.mlp_bias:
                setattr(self, f"{name}_bias", zeros(config, (inner,), ("mlp",)))
        self.down = kernel(
            config,
            rngs,
            (inner, hidden),
            ("mlp", "embed"),
            fan_in=inner,
            scale=_residual_scale(config),
        )
        if config.mlp_bias:
            self.down_bias = zeros(config, (hidden,), ("embed",))

    def __call__(self, x: Float[Array, "*batch H"]) -> Float[Array, "*batch H"]:
        activation = self.config.activation
        if self.config.gated:
            gate, up = self._projected(x, "gate", "up")
            inner = functional.gated(activation, gate, up)
        else:
            inner = functional.activated(activation, *self._projected(x, "up"))
        return self._projected(inner, "down")[0]

    def _projected(self, x: Array, *names: str) -> list[Array]:
        return _projected(self, x, names, biased=self.config.mlp_bias)


class MoE(nnx.Module):
    """A router, the experts, and optionally an MLP that every token passes beside them."""

    def __init__(self, config: DecoderConfig, sizes: MoEConfig, rngs: nnx.Rngs) -> None:
        hidden, inner, experts = config.hidden_size, sizes.expert_size, sizes.num_experts
        self.config, self.sizes = config, sizes
        self.router = kernel(config, rngs, (hidden, experts), ("embed", "expert"), fan_in=hidden)
        if sizes.router_bias:
            self.router_bias = zeros(config, (experts,), ("expert",))
        into, out = ("expert", "embed", "mlp"), ("expert", "mlp", "embed")
        residual = _residual_scale(config)
        self.gate = kernel(config, rngs, (experts, hidden, inner), into, fan_in=hidden)
        self.up = kernel(config, rngs, (experts, hidden, inner), into, fan_in=hidden)
        shape = (experts, inner, hidden)
        self.down = kernel(config, rngs, shape, out, fan_in=inner, scale=residual)
        if sizes.expert_bias:
            self.gate_bias = zeros(config, (experts, inner), ("expert", "mlp"))
            self.up_bias = zeros(config, (experts, inner), ("expert", "mlp"))
            self.down_bias = zeros(config, (experts, hidden), ("expert", "embed"))
        if sizes.shared_size is not None:
            width, axes = sizes.shared_size, ("embed", "mlp")
            self.shared_gate_proj = kernel(config, rngs, (hidden, width), axes, fan_in=hidden)
            self.shared_up = kernel(config, rngs, (hidden, width), axes, fan_in=hidden)
            self.shared_down = kernel(
                config, rngs, (width, hidden), ("mlp", "embed"), fan_in=width, scale=residual
            )
            if sizes.shared_gate:
                self.shared_router = kernel(config, rngs, (hidden,), ("embed",), fan_in=hidden)

    def __call__(
        self,
        x: Float[Array, "*batch H"],
        experts: Int[Array, "*batch k"] | None,
        mesh: Mesh | None = None,
    ) -> tuple[Float[Array, "*batch H"], LayerRouting]:
        config, sizes = self.config, self.sizes
        rows = x.reshape(-1, x.shape[-1])
        # The choice is discrete, so rounding of its logits is kept as small as it can be.
        logits = jnp.matmul(
            rows, value(self.router).astype(x.dtype), preferred_element_type=jnp.float32
        )
        if sizes.router_bias:
            logits += value(self.router_bias).astype(jnp.float32)
        matrices = {name: value(getattr(self, name)) for name in ("gate", "up", "down")}
        mixture: Any = moe.mixture
        if mesh is not None and mesh.size == 1:
            mesh = None
        spread_rows = mesh is not None and x.shape[0] % row_ways(mesh) == 0
        if mesh is not None and moe.spreads(mesh, tuple(matrices.values())):
            mixture = functools.partial(moe.spread_mixture, mesh=mesh, spread_rows=spread_rows)
        if experts is None:
            own = mesh if spread_rows else None
            chosen = moe.choose(logits, sizes.experts_per_token, mesh=own)
        else:
            chosen = experts.reshape(-1, sizes.experts_per_token)
        out = mixture(
            rows,
            chosen,
            moe.routing_weights(logits, chosen, normalize=sizes.normalize_weights),
            **matrices,
            combine=lambda gate, up: functional.gated(config.activation, gate, up),
            biases=(value(self.gate_bias), value(self.up_bias), value(self.down_bias))
            if sizes.expert_bias
            else None,
        )
        if sizes.shared_size is not None:
            out += self._shared(rows)
        batch = x.shape[:-1]
        routing = (logits.reshape(*batch, -1), chosen.reshape(*batch, -1))
        return out.reshape(x.shape), routing

    def _shared(self, rows: Array) -> Array:
        weights = value(self.shared_gate_proj), value(self.shared_up)
        gate, up = decoding.project(rows, *weights)
        inner = functional.gated(self.config.activation, gate, up)
        (out,) = decoding.project(inner, value(self.shared_down))
        if self.sizes.shared_gate:
            out *= jax.nn.sigmoid(rows @ value(self.shared_router).astype(rows.dtype))[:, None]
        return out


class Layer(nnx.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        add_norm(self, config, "attention_norm")
        self.attention = Attention(config, rngs)
        add_norm(self, config, "mlp_norm")
        if config.moe is None:
            self.mlp = MLP(config, rngs)
        else:
            self.moe = MoE(config, config.moe, rngs)
        if config.post_norms:
            add_norm(self, config, "attention_post_norm")
            add_norm(self, config, "mlp_post_norm")

    def __call__(
        self,
        x: Float[Array, "*batch H"],
        attend: Attend,
        experts: Int[Array, "*batch k"] | None = None,
        mesh: Mesh | None = None,
    ) -> tuple[Float[Array, "*batch H"], Any, LayerRouting]:
        update, extra = self.attention(self._normed(x, "attention_norm"), attend)
        if self.config.post_norms:
            update = self._normed(update, "attention_post_norm")
        x = x + update
        normed = self._normed(x, "mlp_norm")
        routing: LayerRouting = None
        if self.config.moe is None:
            update = self.mlp(normed)
        else:
            update, routing = self.moe(normed, experts, mesh)
        if self.config.post_norms:
            update = self._normed(update, "mlp_post_norm")
        return x + update, extra, routing

    def _normed(self, x: Array, name: str) -> Array:
        return normed(self, self.config, x, name)


def add_norm(module: nnx.Module, config: DecoderConfig, name: str) -> None:
    """Gives `module` the parameters of a norm over the residual stream."""
    setattr(module, name, norm_scale(config, config.hidden_size, "embed"))
    if config.norm == "layer":
        setattr(module, f"{name}_bias", zeros(config, (config.hidden_size,), ("embed",)))


def normed(module: nnx.Module, config: DecoderConfig, x: Array, name: str) -> Array:
    """`x` through the norm whose parameters `module` holds under `name`."""
    scale = value(getattr(module, name))
    if config.norm == "layer":
        bias = value(getattr(module, f"{name}_bias"))
        return functional.layer_norm(x, scale, bias, epsilon=config.norm_epsilon)
    return functional.rms_norm(
        x, scale, epsilon=config.norm_epsilon, scale_offset=config.norm_scale_offset
    )
