"""Coefficients of odd quintics `p(s) = a s + b s³ + c s⁵`, iterated towards the sign function.

A set is a tuple of triples, one a step; a step beyond the last repeats it. Each step acts on the
singular values of a matrix: `X ← (a I + b A + c A²) X` with `A = X Xᵀ`.
"""

from __future__ import annotations

from collections.abc import Sequence

from pgjax import _checks

Triple = tuple[float, float, float]

KELLER: tuple[Triple, ...] = ((3.4445, -4.7750, 2.0315),)
"""Steepest at zero rather than convergent: five steps take [0.01, 1] into [0.68, 1.14]. Jordan et
al., Muon, 2024."""

DION: tuple[Triple, ...] = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
"""Five steps take [0.01, 1] into [0.978, 1.032]. Cesista and Jiacheng; used in Dion."""

CUBIC: tuple[Triple, ...] = ((1.5, -0.5, 0.0),)
"""Newton-Schulz, quadratically convergent to 1 from a good start."""

QUINTIC: tuple[Triple, ...] = ((1.875, -1.25, 0.375),)
"""The same to the third order."""

_POLAR_EXPRESS: tuple[Triple, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)

POLAR_EXPRESS_5: tuple[Triple, ...] = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
"""Polar Express for exactly five steps, a safety of 1.02 inside; start from `X / (1.02 ‖X‖_F)`."""


def polar_express(*, steps: int = 8, safety: float = 1.01) -> tuple[Triple, ...]:
    """The minimax-optimal quintics for singular values in [0.001, 1].

    All but the classic quintic are divided by (safety, safety³, safety⁵), so that rounding cannot
    push a singular value beyond where the next one still contracts.

    Args:
      steps: at least 1; beyond seven, it is the classic quintic.
      safety: at least 1; start from `X / (safety ‖X‖_F)`.

    Source: Amsel et al., The Polar Express, 2025, arXiv 2505.16932.
    """
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    _checks.in_range("safety", safety, 1)
    safe = [(a / safety, b / safety**3, c / safety**5) for a, b, c in _POLAR_EXPRESS]
    return take([*safe, *QUINTIC], steps)


def take(coefficients: Sequence[Triple], steps: int | None) -> tuple[Triple, ...]:
    """The first `steps` triples, the last repeated as needed; None: as many as there are.

    Raises:
      ValueError: no triple, rows of another length, steps below 1.
    """
    rows = [tuple(float(value) for value in row) for row in coefficients]
    if not rows or any(len(row) != 3 for row in rows):
        raise ValueError(f"coefficients: expected rows (a, b, c), got {coefficients!r}")
    steps = len(rows) if steps is None else steps
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps: expected an integer of at least 1, got {steps!r}")
    padded = rows + [rows[-1]] * (steps - len(rows))
    return tuple((a, b, c) for a, b, c in padded[:steps])
