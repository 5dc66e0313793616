"""Low-rank adapters: trained instead of a decoder's matrices, which stay frozen."""

from pgjax.models.lora.adapters import (
    SCALINGS,
    Adapter,
    attach,
    attached,
    init,
    is_adapter,
    logical_axes,
    merge,
)
from pgjax.models.lora.peft import load_peft, save_peft

__all__ = [
    "SCALINGS",
    "Adapter",
    "attach",
    "attached",
    "init",
    "is_adapter",
    "load_peft",
    "logical_axes",
    "merge",
    "save_peft",
]
