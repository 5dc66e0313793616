"""Rotary positions and the published ways to stretch them beyond the trained length."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pgjax import _checks

SCALINGS = (None, "linear", "dynamic", "llama3", "yarn")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotary:
    """Frequencies of a rotary embedding: `theta^(-2i/D)` for i in [0, D/2), possibly rescaled.

    Attributes:
      theta: base of the frequencies.
      scaling: None: as above. "linear": all frequencies divided by `factor` (Chen et al., 2023,
        arXiv:2306.15595). "dynamic": the base grows with the position beyond
        `original_max_length`, see `rotary_tables`. "llama3": wavelengths above
        `original_max_length / low_freq_factor` are divided by `factor`, those below
        `original_max_length / high_freq_factor` kept, in between interpolated (Llama 3.1). "yarn":
        between `beta_slow` and `beta_fast` rotations over the original length a linear ramp from
        divided to kept frequencies, and a temperature on the scores (Peng et al., 2023,
        arXiv:2309.00071).
      factor: how many times longer rows are to become; at least 1.
      original_max_length: length in tokens that was trained; needed by all scalings but "linear".
      low_freq_factor, high_freq_factor: of "llama3".
      beta_fast, beta_slow: of "yarn".
      attention_factor: multiplies cosine and sine under "yarn"; None: `0.1 log(factor) + 1`, or
        the quotient of that with `mscale` and `mscale_all_dim` in front of the logarithm.
      truncate: whether "yarn" rounds the ends of its ramp outwards to whole frequencies.
      mscale, mscale_all_dim: see `attention_factor`.
    """

    theta: float = 10_000.0
    scaling: str | None = None
    factor: float = 1.0
    original_max_length: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True
    mscale: float | None = None
    mscale_all_dim: float | None = None

    def __post_init__(self) -> None:
        _checks.one_of("scaling", self.scaling, SCALINGS)
        _checks.in_range("rope_theta", self.theta, 0.0, np.inf, low_open=True, high_open=True)
        _checks.in_range("factor", self.factor, 1.0, np.inf, high_open=True)
        if self.scaling in ("dynamic", "llama3", "yarn"):
            if self.original_max_length is None:
                raise ValueError(
                    f"original_max_length: {self.scaling!r} scaling needs it, got None"
                )
            _checks.in_range("original_max_length", self.original_max_length, 1)
        if self.scaling == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor: expected less than high_freq_factor {self.high_freq_factor}, "
                f"got {self.low_freq_factor}"
            )


def inverse_frequencies(rotary: Rotary, head_dim: int) -> np.ndarray:
    """Radians per token of each pair of features, float32[head_dim / 2].

    "dynamic" gives those of positions within the original length.
    """
    steps = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    plain = (1.0 / np.power(np.float32(rotary.theta), steps)).astype(np.float32)
    if rotary.scaling in (None, "dynamic"):
        return plain
    if rotary.scaling == "linear":
        return plain / np.float32(rotary.factor)
    assert rotary.original_max_length is not None
    if rotary.scaling == "llama3":
        return _llama3(plain, rotary, rotary.original_max_length)
    return _yarn(plain, rotary, rotary.original_max_length, head_dim)


def _llama3(plain: np.ndarray, rotary: Rotary, length: int) -> np.ndarray:
    low, high = rotary.low_freq_factor, rotary.high_freq_factor
    rotations = length * plain / (2 * math.pi)  # over the original length
    kept = np.clip((rotations - low) / (high - low), 0.0, 1.0)
    return ((1 - kept) * plain / rotary.factor + kept * plain).astype(np.float32)


def _yarn(plain: np.ndarray, rotary: Rotary, length: int, head_dim: int) -> np.ndarray:
    def index_of(rotations: float) -> float:
        """The (fractional) feature pair that turns this often over the original length."""
        return (
            head_dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(rotary.theta))
        )

    low, high = index_of(rotary.beta_fast), index_of(rotary.beta_slow)
    if rotary.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    return (plain / rotary.factor * ramp + plain * (1 - ramp)).astype(np.float32)


def attention_factor(rotary: Rotary) -> float:
    """What cosine and sine are multiplied by: 1 except under "yarn"."""
    if rotary.scaling != "yarn":
        return 1.0
    if rotary.attention_factor is not None:
        return rotary.attention_factor

    def of(scale: float) -> float:
        return 1.0 if rotary.factor <= 1 else 0.1 * scale * math.log(rotary.factor) + 1.0

    if rotary.mscale and rotary.mscale_all_dim:
        return of(rotary.mscale) / of(rotary.mscale_all_dim)
    return of(1.0)


def rotary_tables(
    positions: Int[Array, "*batch"], rotary: Rotary, *, head_dim: int
) -> tuple[Float[Array, "*batch half"], Float[Array, "*batch half"]]:
    """Cosine and sine of position times frequency, float32.

    Under "dynamic" scaling a position p beyond the original length L turns with the base

        theta · (factor · (p + 1) / L - (factor - 1))^(D / (D - 2)),

    the one that the row had when p was its newest token. So a token's rotation never depends on
    what comes after it, and a learner that sees whole rows agrees with a sampler that sees them
    grow; transformers does the same while it generates, and rescales all positions by the row's
    length when it is given whole rows.

    Source: Su et al., "RoFormer", 2021, arXiv:2104.09864; dynamic scaling: bloc97 and emozilla,
    2023.
    """
    positions = positions.astype(jnp.float32)[..., None]
    if rotary.scaling == "dynamic":
        assert rotary.original_max_length is not None
        length = rotary.original_max_length
        grown = jnp.maximum(positions + 1, length) * (rotary.factor / length) - (rotary.factor - 1)
        base = rotary.theta * grown ** (head_dim / (head_dim - 2))
        exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
        angles = positions / jnp.power(base, exponents)
    else:
        angles = positions * inverse_frequencies(rotary, head_dim)
    scale = attention_factor(rotary)
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(
    x: Float[Array, "*batch heads D"],
    tables: tuple[Float[Array, "*positions half"], Float[Array, "*positions half"]],
) -> Float[Array, "*batch heads D"]:
    """Rotates feature i together with feature i + D/2, as Llama and its relatives do.

        out[i] = x[i]·cos - x[i+D/2]·sin,   out[i+D/2] = x[i+D/2]·cos + x[i]·sin

    Args:
      x: queries or keys.
      tables: from `rotary_tables`; their leading axes broadcast against `batch`.

    Returns:
      the rotated array, in the dtype of `x`; the arithmetic is float32.
    """
    cos, sin = (table[..., None, :] for table in tables)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
