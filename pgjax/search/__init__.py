"""Search without gradients: by function values in a space, by best-first orders on a graph."""

from pgjax.search import frontier, hashset
from pgjax.search.astar import a_star
from pgjax.search.best_first import SearchResult
from pgjax.search.consensus import (
    ConsensusRun,
    cbo_step,
    consensus_gradient,
    consensus_point,
    hopping_step,
    run_cbo,
    run_hopping,
)
from pgjax.search.qstar import q_star

__all__ = [
    "ConsensusRun",
    "SearchResult",
    "a_star",
    "cbo_step",
    "consensus_gradient",
    "consensus_point",
    "frontier",
    "hashset",
    "hopping_step",
    "q_star",
    "run_cbo",
    "run_hopping",
]
