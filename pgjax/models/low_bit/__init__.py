"""Decoders in 2 to 8 bits: `pgjax.quantize` applied layer by layer, packed weights as leaves."""

from pgjax.models.low_bit.fold import activation_scales, finetune_importance, scale_channels
from pgjax.models.low_bit.network import (
    Quantized,
    Site,
    dense_params,
    layer_moments,
    quantize_decoder,
)
from pgjax.models.low_bit.packed import PackedMatrix, packed

__all__ = [
    "PackedMatrix",
    "Quantized",
    "Site",
    "activation_scales",
    "dense_params",
    "finetune_importance",
    "layer_moments",
    "packed",
    "quantize_decoder",
    "scale_channels",
]
