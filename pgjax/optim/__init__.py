"""Optax transformations and schedules; nothing here knows of reinforcement learning.

A matrix optimizer is `matrix_transform` of an oracle (`oracles`), a power of the dual norm, a
shape factor and a `momentum`; `by_role` and `route` say which leaves get it.
"""

from pgjax.optim import coefficients, oracles
from pgjax.optim.combine import MatrixState, matrix_transform
from pgjax.optim.dion import Dion2State, DionState, scale_by_dion, scale_by_dion2
from pgjax.optim.layout import Layout, layout_of
from pgjax.optim.matrix import (
    MatrixSpec,
    center_rows,
    dual_scale,
    from_canonical,
    inner,
    nonfinite_leaves,
    row_normalize,
    shape_factor,
    to_canonical,
)
from pgjax.optim.momentum import DisplacementState, MomentumState, add_displacement, momentum
from pgjax.optim.muon import muon, scale_by_muon
from pgjax.optim.oracles import Oracle
from pgjax.optim.polar import inverse_sqrt, polar
from pgjax.optim.polar_grad import (
    polar_grad,
    polar_grad_with_adam,
    polar_heavy_ball,
    scale_by_polar,
)
from pgjax.optim.roles import Role, default_roles, default_specs, per_head_specs
from pgjax.optim.routing import by_role, describe, route, with_adam
from pgjax.optim.scion import scion, scion_lmo
from pgjax.optim.shampoo import ShampooState, SoapState, scale_by_shampoo, scale_by_soap
from pgjax.optim.snr import (
    GradientMoments,
    SnrState,
    gradient_moments,
    gradient_moments_from_norms,
    scale_by_gradient_snr,
    snr_factor,
)
from pgjax.optim.symmetry import (
    Rates,
    hybrid_update,
    left_spectral,
    orient,
    right_spectral,
    row_norm_update,
    symmetry_stack,
    unorient,
)

__all__ = [
    "Dion2State",
    "DionState",
    "DisplacementState",
    "GradientMoments",
    "Layout",
    "MatrixSpec",
    "MatrixState",
    "MomentumState",
    "Oracle",
    "Rates",
    "Role",
    "ShampooState",
    "SnrState",
    "SoapState",
    "add_displacement",
    "by_role",
    "center_rows",
    "coefficients",
    "default_roles",
    "default_specs",
    "describe",
    "dual_scale",
    "from_canonical",
    "gradient_moments",
    "gradient_moments_from_norms",
    "hybrid_update",
    "inner",
    "inverse_sqrt",
    "layout_of",
    "left_spectral",
    "matrix_transform",
    "momentum",
    "muon",
    "nonfinite_leaves",
    "oracles",
    "orient",
    "per_head_specs",
    "polar",
    "polar_grad",
    "polar_grad_with_adam",
    "polar_heavy_ball",
    "right_spectral",
    "route",
    "row_norm_update",
    "row_normalize",
    "scale_by_dion",
    "scale_by_dion2",
    "scale_by_gradient_snr",
    "scale_by_muon",
    "scale_by_polar",
    "scale_by_shampoo",
    "scale_by_soap",
    "scion",
    "scion_lmo",
    "shape_factor",
    "snr_factor",
    "symmetry_stack",
    "to_canonical",
    "unorient",
    "with_adam",
]
