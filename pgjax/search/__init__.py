"""Search by function values, without gradients."""

from pgjax.search.consensus import (
    ConsensusRun,
    cbo_step,
    consensus_gradient,
    consensus_point,
    hopping_step,
    run_cbo,
    run_hopping,
)

__all__ = [
    "ConsensusRun",
    "cbo_step",
    "consensus_gradient",
    "consensus_point",
    "hopping_step",
    "run_cbo",
    "run_hopping",
]
