"""All families; which one a config.json is of, and which one a configuration fits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pgjax.models.config import DecoderConfig
from pgjax.models.pretrained import dense, gemma, gpt2, mixtures
from pgjax.models.pretrained.family import Family, Misfit

FAMILIES: tuple[Family, ...] = (
    dense.LLAMA,
    dense.MISTRAL,
    dense.QWEN2,
    dense.QWEN3,
    dense.SMOLLM3,
    mixtures.QWEN2_MOE,
    mixtures.QWEN3_MOE,
    mixtures.OLMOE,
    mixtures.GPT_OSS,
    gemma.GEMMA2,
    gemma.GEMMA3,
    gpt2.GPT2,
)


def named(name: str) -> Family:
    """The family of a model_type; ValueError where there is none."""
    for family in FAMILIES:
        if family.name == name:
            return family
    known = ", ".join(family.name for family in FAMILIES)
    raise ValueError(f"family: expected one of {known}, got {name!r}")


def identify(values: Mapping[str, Any]) -> tuple[Family, str, dict[str, Any]]:
    """The family of a config.json, the class of the model ("causal", "sequence" or "base"), and
    the options of the language model among the file's; ValueError where it is not known."""
    kind, classes = values.get("model_type"), values.get("architectures") or []
    name = classes[0] if isinstance(classes, list) and classes else None
    if kind == gemma.CONDITIONAL and name in (None, gemma.CONDITIONAL_CLASS):
        return gemma.GEMMA3, "causal", gemma.text_part(values)
    for family in FAMILIES:
        roles = {family.causal: "causal", family.sequence: "sequence", family.base: "base"}
        if kind == family.name or (kind is None and name in roles):
            if name is None:
                return family, "causal", dict(values)
            if name in roles:
                return family, roles[name], dict(values)
    known = "; ".join(f"{family.name} ({family.causal})" for family in FAMILIES)
    raise ValueError(
        f"architecture {name!r} of model_type {kind!r} is not known; known are {known}"
    )


def infer(config: DecoderConfig) -> tuple[Family, dict[str, Any]]:
    """The first family that expresses a configuration, and its options.

    Raises:
      ValueError: no family does; it says what the nearest ones lack.
    """
    misfits = []
    for family in FAMILIES:
        try:
            return family, family.options(config)
        except Misfit as misfit:
            misfits.append(misfit)
    misfits.sort(key=lambda misfit: misfit.count)
    nearest = "; ".join(str(misfit) for misfit in misfits[:3])
    raise ValueError(f"decoder: no family has this configuration; the nearest: {nearest}")
