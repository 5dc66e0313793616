"""What experiments tell optimizers about a decoder's parameters."""

from __future__ import annotations

from typing import Any

import jax
import optax


def matrix_axes(params: Any) -> Any:
    """Which axes of each parameter are a matrix's input and output, for Muon; None: use Adam.

    The layers' projections are matrices, stacked along their first axis (experts' along the second
    as well); the heads of an attention projection are one matrix together. Embeddings, the output
    head, norms and adapters are left to Adam.
    """

    def of(path: Any, x: Any) -> Any:
        keys = [getattr(entry, "key", None) for entry in path]
        if "layers" not in keys or keys[-1] is None or x.ndim < 3:
            return None
        if "attention" in keys and x.ndim == 4:
            inputs, outputs = ((1, 2), (3,)) if keys[-1] == "output" else ((1,), (2, 3))
            return optax.contrib.MuonDimensionNumbers(inputs, outputs)
        if str(keys[-1]).endswith("bias"):
            return None
        return optax.contrib.MuonDimensionNumbers((x.ndim - 2,), (x.ndim - 1,))

    return jax.tree_util.tree_map_with_path(of, params)
