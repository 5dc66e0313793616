"""What a decoder is, as one frozen dataclass: a model family is a mapping onto these fields."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from pgjax import _checks

ACTIVATIONS = ("silu", "gelu", "relu")
REMAT_POLICIES = (None, "full", "dots")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A decoder-only transformer: RMSNorm pre-norm, rotary positions, grouped-query attention.

    Attributes:
      vocab_size: V.
      hidden_size: H, width of the residual stream.
      num_layers: L.
      num_heads: query heads.
      num_kv_heads: key and value heads; divides `num_heads`. None: `num_heads`.
      head_dim: D, even. None: `hidden_size / num_heads`.
      mlp_size: width inside the MLP.
      activation: "silu", "gelu" (its tanh approximation) or "relu".
      gated: the MLP is `down(activation(gate(x)) · up(x))`; otherwise `down(activation(up(x)))`.
      rope_theta: base of the rotary frequencies.
      norm_epsilon: added to the mean square in RMSNorm.
      tied_embeddings: the unembedding is the embedding, transposed.
      logit_soft_cap: c in `c · tanh(logits / c)`; None: no cap.
      qk_norm: RMSNorm over `head_dim` of queries and keys, before the rotation.
      max_length: longest row, prompt and completion together.
      init_stddev: of every kernel's normal initialisation; None: `1/sqrt(fan-in)` (for the
        embedding `1/sqrt(hidden_size)`). Kernels that write to the residual stream are scaled by
        `1/sqrt(2 · num_layers)` on top (GPT-2; Radford et al., 2019).
      dtype: of activations and matmul inputs. Norm statistics, softmax and logits are float32.
      param_dtype: of the parameters.
      remat: what the backward pass recomputes in each layer. None: nothing; "full": everything
        but the layer's input; "dots": everything but products with the parameters. On CPUs "full"
        is also the fastest for small models, since writing and reading back what would be kept
        costs more than computing it again.
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
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-6
    tied_embeddings: bool = False
    logit_soft_cap: float | None = None
    qk_norm: bool = False
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
        if self.head_dim % 2:
            raise ValueError(f"head_dim: expected an even number (rotary), got {self.head_dim}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads: expected a divisor of num_heads {self.num_heads}, "
                f"got {self.num_kv_heads}"
            )
        _checks.one_of("activation", self.activation, ACTIVATIONS)
        _checks.one_of("remat", self.remat, REMAT_POLICIES)
        _positive("rope_theta", self.rope_theta)
        _positive("norm_epsilon", self.norm_epsilon)
        if self.logit_soft_cap is not None:
            _positive("logit_soft_cap", self.logit_soft_cap)
        if self.init_stddev is not None:
            _positive("init_stddev", self.init_stddev)
        for name in ("dtype", "param_dtype"):
            dtype = jnp.dtype(getattr(self, name))
            if not jnp.issubdtype(dtype, jnp.floating):
                raise ValueError(f"{name}: expected a floating dtype, got {dtype}")
            set_field(self, name, dtype)


def _positive_integer(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected a positive int, got {value!r}")


def _positive(name: str, value: Any) -> None:
    if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: expected a positive finite number, got {value!r}")
