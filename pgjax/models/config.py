"""What a decoder is, as frozen dataclasses: a model family is a mapping onto these fields."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from pgjax import _checks
from pgjax.models.rotary import Rotary

DEFAULT_THETA = 10_000.0
ACTIVATIONS = ("silu", "gelu", "gelu_exact", "relu", "clamped_swiglu")
NORMS = ("rms", "layer")
QK_NORMS = (False, "head", "projection")
REMAT_POLICIES = (None, "full", "dots")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionKind:
    """How the layers of one kind see positions.

    Attributes:
      window: a query at position q sees keys at q - window < k <= q; None: all up to q.
      rotary: how queries and keys are rotated; None: not at all.
    """

    window: int | None = None
    rotary: Rotary | None = dataclasses.field(default_factory=Rotary)

    def __post_init__(self) -> None:
        if self.window is not None:
            _positive_integer("window", self.window)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """A mixture of experts in place of each layer's MLP; dropless top-k routing.

    Attributes:
      num_experts: E.
      experts_per_token: k.
      expert_size: width inside an expert.
      normalize_weights: whether the chosen experts' softmax weights are renormalised to sum 1
        (which equals a softmax over the chosen logits).
      router_bias: whether the router has a bias.
      expert_bias: whether the experts' projections have biases.
      shared_size: width of an MLP that every token also passes; None: there is none.
      shared_gate: whether that MLP's output is multiplied by `sigmoid(x · shared_router)`.
    """

    num_experts: int
    experts_per_token: int
    expert_size: int
    normalize_weights: bool
    router_bias: bool = False
    expert_bias: bool = False
    shared_size: int | None = None
    shared_gate: bool = False

    def __post_init__(self) -> None:
        for name in ("num_experts", "experts_per_token", "expert_size"):
            _positive_integer(name, getattr(self, name))
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token: expected at most num_experts {self.num_experts}, "
                f"got {self.experts_per_token}"
            )
        if self.shared_size is not None:
            _positive_integer("shared_size", self.shared_size)
        elif self.shared_gate:
            raise ValueError("shared_gate: needs a shared MLP, but shared_size is None")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A decoder-only transformer: pre-norm, causal grouped-query attention, MLP or experts.

    Attributes:
      vocab_size: V.
      hidden_size: H, width of the residual stream.
      num_layers: L.
      num_heads: query heads.
      num_kv_heads: key and value heads; divides `num_heads`. None: `num_heads`.
      head_dim: D, even where positions are rotated. None: `hidden_size / num_heads`.
      mlp_size: width inside the MLP (unused where `moe` is given).
      activation: "silu", "gelu" (its tanh approximation), "gelu_exact", "relu", or
        "clamped_swiglu": `(clip(u, -7, 7) + 1) · g · sigmoid(1.702 g)` with g at most 7 (gpt-oss).
      gated: the MLP is `down(activation(gate(x)) · up(x))`; otherwise `down(activation(up(x)))`.
      rope_theta: base of the rotary frequencies, where `attention_kinds` are not given.
      norm: "rms" for RMSNorm, "layer" for LayerNorm with bias.
      norm_epsilon: added to the mean square (or variance).
      norm_scale_offset: the norms multiply by `offset + scale`; 1 in Gemma.
      post_norms: norms also on the outputs of attention and MLP, before they are added.
      tied_embeddings: the unembedding is the embedding, transposed.
      embedding_scale: multiplies the embeddings, rounded to `dtype` first; None: 1.
      learned_positions: a learned embedding of each position is added and nothing is rotated.
      logit_soft_cap: c in `c · tanh(logits / c)`; None: no cap.
      attention_soft_cap: the same for attention scores.
      attention_sinks: one learned logit per head joins each softmax and takes weight from it.
      query_scale: multiplies queries; None: `head_dim^-0.5`.
      qk_norm: RMSNorm of queries and keys before the rotation: False; "head" (or True): over each
        head's features; "projection": over all heads' features together.
      qkv_bias, output_bias, mlp_bias: which projections have biases.
      attention_kinds: the kinds of attention there are; (): one, full attention with `rope_theta`.
      layer_kinds: the kind of each layer, an index into `attention_kinds`; (): all of kind 0.
      moe: makes every layer's MLP a mixture of experts.
      max_length: longest row, prompt and completion together.
      init_stddev: of every kernel's normal initialisation; None: `1/sqrt(fan-in)` (for the
        embedding `1/sqrt(hidden_size)`). Kernels that write to the residual stream are scaled by
        `1/sqrt(2 · num_layers)` on top (GPT-2; Radford et al., 2019).
      dtype: of activations and matmul inputs. Norm statistics, softmax and logits are float32.
      param_dtype: of the parameters.
      remat: what the backward pass recomputes in each layer. None: nothing; "full": everything
        but the layer's input; "dots": everything but products with the parameters and what
        attention gave. On CPUs None is the slowest for small models, since writing and reading
        back what would be kept costs more than computing it again.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mlp_size: int
    activation: str = "silu"
    gated: bool = True
    rope_theta: float = DEFAULT_THETA
    norm: str = "rms"
    norm_epsilon: float = 1e-6
    norm_scale_offset: float = 0.0
    post_norms: bool = False
    tied_embeddings: bool = False
    embedding_scale: float | None = None
    learned_positions: bool = False
    logit_soft_cap: float | None = None
    attention_soft_cap: float | None = None
    attention_sinks: bool = False
    query_scale: float | None = None
    qk_norm: bool | str = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    attention_kinds: tuple[AttentionKind, ...] = ()
    layer_kinds: tuple[int, ...] = ()
    moe: MoEConfig | None = None
    max_length: int
    init_stddev: float | None = 0.02
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str | None = None

    def __post_init__(self) -> None:
        set_field = object.__setattr__  # frozen: derived defaults are filled once, here
        if self.num_kv_heads is None:
            set_field(self, "num_kv_heads", self.num_heads)
        for name in (
            *("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads"),
            *("mlp_size", "max_length"),
        ):
            _positive_integer(name, getattr(self, name))
        if self.head_dim is None:
            if self.hidden_size % self.num_heads:
                raise ValueError(
                    f"num_heads: expected a divisor of hidden_size {self.hidden_size} where "
                    f"head_dim is None, got {self.num_heads}"
                )
            set_field(self, "head_dim", self.hidden_size // self.num_heads)
        _positive_integer("head_dim", self.head_dim)
        assert self.head_dim is not None and self.num_kv_heads is not None
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads: expected a divisor of num_heads {self.num_heads}, "
                f"got {self.num_kv_heads}"
            )
        if self.qk_norm is True:
            set_field(self, "qk_norm", "head")
        for name, options in (
            ("activation", ACTIVATIONS),
            ("norm", NORMS),
            ("qk_norm", QK_NORMS),
            ("remat", REMAT_POLICIES),
        ):
            _checks.one_of(name, getattr(self, name), options)
        if self.activation == "clamped_swiglu" and not self.gated:
            raise ValueError("gated: expected True with activation 'clamped_swiglu', got False")
        for name in ("rope_theta", "norm_epsilon"):
            _positive(name, getattr(self, name))
        for name in (
            *("logit_soft_cap", "attention_soft_cap", "query_scale", "embedding_scale"),
            "init_stddev",
        ):
            if getattr(self, name) is not None:
                _positive(name, getattr(self, name))
        self._check_kinds()
        for name in ("dtype", "param_dtype"):
            dtype = jnp.dtype(getattr(self, name))
            if not jnp.issubdtype(dtype, jnp.floating):
                raise ValueError(f"{name}: expected a floating dtype, got {dtype}")
            set_field(self, name, dtype)

    @property
    def kinds(self) -> tuple[AttentionKind, ...]:
        """The kinds of attention, the default one filled in."""
        rotary = None if self.learned_positions else Rotary(theta=self.rope_theta)
        return self.attention_kinds or (AttentionKind(rotary=rotary),)

    @property
    def kind_indices(self) -> tuple[int, ...]:
        """For each layer the index of its kind."""
        return self.layer_kinds or (0,) * self.num_layers

    def _check_kinds(self) -> None:
        for name in ("attention_kinds", "layer_kinds"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.attention_kinds and self.rope_theta != DEFAULT_THETA:
            raise ValueError(
                "rope_theta: where attention_kinds are given it belongs into their rotary, "
                f"got {self.rope_theta}"
            )
        used = self.kind_indices
        if len(used) != self.num_layers:
            raise ValueError(
                f"layer_kinds: expected one for each of {self.num_layers} layers, got {len(used)}"
            )
        if set(used) != set(range(len(self.kinds))):
            raise ValueError(
                f"layer_kinds: expected each index below {len(self.kinds)}, the number of "
                f"attention_kinds, and no other, got {sorted(set(used))}"
            )
        assert self.head_dim is not None
        if any(kind.rotary is not None for kind in self.kinds):
            if self.learned_positions:
                raise ValueError("attention_kinds: expected no rotary with learned_positions")
            if self.head_dim % 2:
                raise ValueError(f"head_dim: expected an even number (rotary), got {self.head_dim}")


def _positive_integer(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected a positive int, got {value!r}")


def _positive(name: str, value: Any) -> None:
    if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: expected a positive finite number, got {value!r}")
