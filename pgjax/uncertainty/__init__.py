"""How sure an estimate is: Gaussian-process posteriors and what they are built from."""

from pgjax.uncertainty import gp
from pgjax.uncertainty.dictionary import (
    Dictionary,
    Projection,
    ald_init,
    ald_posterior,
    ald_update,
)
from pgjax.uncertainty.gp import (
    GaussianPosterior,
    gaussian_kernel,
    linear_gp_posterior,
    linear_kernel,
    quadratic_kernel,
    weight_space_posterior,
)

__all__ = [
    "Dictionary",
    "GaussianPosterior",
    "Projection",
    "ald_init",
    "ald_posterior",
    "ald_update",
    "gaussian_kernel",
    "gp",
    "linear_gp_posterior",
    "linear_kernel",
    "quadratic_kernel",
    "weight_space_posterior",
]
