"""Zolotarev's iteration for the polar factor: a float64 reference, on the host."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pgjax import _checks


def zolo(x: Float[Array, "*b m n"]) -> Float[Array, "*b m n"]:
    """The polar factor of wide, concrete float64 matrices.

    With singular values in [l, 1], one step multiplies U by the best rational approximation of
    `1/|s|` there, of degree (2r, 2r+1) in s; two steps bring any l to 1 within rounding.

    Raises:
      ValueError: another dtype, a traced array.

    Source: Nakatsukasa and Freund, Zolo-PD, SIAM Review 2016.
    """
    if x.dtype != jnp.float64:
        raise ValueError(f"x: 'zolo' needs float64, got {x.dtype}")
    if not _checks.is_concrete(x):
        raise ValueError("x: 'zolo' chooses its degree by looking at x, so it cannot be traced")
    flat = np.asarray(x).reshape(-1, *x.shape[-2:])
    return jnp.asarray(np.stack([_one(matrix.T).T for matrix in flat]).reshape(x.shape))


# Zolotarev's degree that brings a condition number to 1 in two steps (in one, up to 2).
_DEGREES = (
    (1.001, 2), (1.01, 3), (1.1, 4), (1.2, 5), (1.5, 6), (2.0, 8),
    (6.5, 2), (180.0, 3), (1.5e4, 4), (2e6, 5), (1e9, 6), (3e12, 7),
)  # fmt: skip


def _one(x: np.ndarray) -> np.ndarray:
    """Zolo-PD of a tall matrix; each term of the sum is independent of the others."""
    from scipy import special

    values = np.linalg.svd(x, compute_uv=False)
    if values[0] == 0:
        return np.zeros_like(x)
    u = x / values[0]
    low = max(values[-1] / values[0], np.finfo(np.float64).eps)
    identity = np.eye(x.shape[1])
    for _ in range(2):
        condition = 1 / low
        if condition <= 1 + 1e-15:
            break
        degree = next((r for bound, r in _DEGREES if condition <= bound), 8)
        # Modulus √(1 - low²): scipy takes its square, and K near 1 by the complement.
        parameter = 1 - low**2
        quarter = special.ellipkm1(low**2)
        points = np.arange(1, 2 * degree + 1) * quarter / (2 * degree + 1)
        sn, cn, _, _ = special.ellipj(points, parameter)
        c = low**2 * (sn / cn) ** 2
        odd, even = c[0::2], c[1::2]
        weight = np.array(
            [-np.prod(odd[j] - even) / np.prod(np.delete(odd[j] - odd, j)) for j in range(degree)]
        )

        def scalar(s: float, odd: np.ndarray = odd, weight: np.ndarray = weight) -> float:
            return float(s + s * np.sum(weight / (s * s + odd)))

        # U (UᵀU + c I)⁻¹ from a QR decomposition of [U; √c I]: UᵀU would square the condition.
        added = np.zeros_like(u)
        for w, o in zip(weight, odd, strict=True):
            q, _ = np.linalg.qr(np.concatenate([u, np.sqrt(o) * identity]))
            added += w / np.sqrt(o) * q[: len(u)] @ q[len(u) :].T
        u = (u + added) / scalar(1.0)
        low = min(scalar(low) / scalar(1.0), 1.0)
    return 1.5 * u - 0.5 * u @ (u.T @ u)
