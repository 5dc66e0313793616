"""Device meshes and sharding rules: where arrays live, apart from the code that uses them."""

from pgjax.parallel.mesh import AXES, make_mesh, parse_mesh
from pgjax.parallel.program import Collective, collectives
from pgjax.parallel.sharding import (
    BATCH_AXES,
    DEFAULT_RULES,
    batch_sharding,
    constrain_batch,
    replicated,
    row_ways,
    shard,
    shard_like,
    shardings,
    shardings_like,
    spec_for,
)

__all__ = [
    "AXES",
    "BATCH_AXES",
    "DEFAULT_RULES",
    "Collective",
    "batch_sharding",
    "collectives",
    "constrain_batch",
    "make_mesh",
    "parse_mesh",
    "replicated",
    "row_ways",
    "shard",
    "shard_like",
    "shardings",
    "shardings_like",
    "spec_for",
]
