"""How sure an estimate is: Gaussian-process posteriors and what they are built from."""

from pgjax.uncertainty import gp
from pgjax.uncertainty.biv import (
    biev_variance,
    biv_variance,
    biv_weights,
    effective_batch_size,
    ggd_td_losses,
    min_ess_shift,
)
from pgjax.uncertainty.dictionary import (
    Dictionary,
    Projection,
    ald_init,
    ald_posterior,
    ald_update,
)
from pgjax.uncertainty.elliptical import (
    Ellipsoid,
    elliptical_bonus,
    elliptical_init,
    elliptical_update,
)
from pgjax.uncertainty.ggd import (
    gaussian_nll,
    ggd_kurtosis,
    ggd_linear_loss,
    ggd_nll,
    ggd_variance,
    risk_averse_weights,
    sample_ggd,
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
    "Ellipsoid",
    "GaussianPosterior",
    "Projection",
    "ald_init",
    "ald_posterior",
    "ald_update",
    "biev_variance",
    "biv_variance",
    "biv_weights",
    "effective_batch_size",
    "elliptical_bonus",
    "elliptical_init",
    "elliptical_update",
    "gaussian_kernel",
    "gaussian_nll",
    "ggd_kurtosis",
    "ggd_linear_loss",
    "ggd_nll",
    "ggd_td_losses",
    "ggd_variance",
    "gp",
    "linear_gp_posterior",
    "linear_kernel",
    "min_ess_shift",
    "quadratic_kernel",
    "risk_averse_weights",
    "sample_ggd",
    "weight_space_posterior",
]
