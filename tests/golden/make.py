"""Writes the golden files: `python tests/golden/make.py`, with torch and transformers installed."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from golden import cases


def empty(case: str):
    """transformers' model of a case as it is drawn, float32 on the CPU."""
    import torch
    import transformers

    prefix, options = cases.CASES[case]
    config = getattr(transformers, f"{prefix}Config")(**options)
    head = "GPT2LMHeadModel" if prefix == "GPT2" else f"{prefix.removesuffix('Text')}ForCausalLM"
    torch.manual_seed(0)
    return getattr(transformers, head)(config)


def opened(directory: str | Path):
    """transformers' model in a directory."""
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", dtype=torch.float32
    ).eval()


def write(directory: str | Path, config: str, shapes: dict[str, list[int]]) -> None:
    """A checkpoint's directory with the weights that follow from the names."""
    from safetensors.numpy import save_file

    (Path(directory) / "config.json").write_text(config)
    file = Path(directory) / "model.safetensors"
    save_file(cases.weights(shapes), file, metadata={"format": "pt"})


def build(case: str, directory: str | Path) -> tuple[str, dict[str, list[int]]]:
    """A case's config.json and tensors' shapes as transformers writes them, and the directory."""
    from safetensors.numpy import load_file

    empty(case).save_pretrained(directory)
    text = (Path(directory) / "config.json").read_text()
    tensors = load_file(Path(directory) / "model.safetensors")
    shapes = {name: list(value.shape) for name, value in sorted(tensors.items())}
    write(directory, text, shapes)
    return text, shapes


def logits(model) -> np.ndarray:
    import torch

    rows = torch.from_numpy(cases.tokens()).long()
    mask = torch.arange(rows.shape[1]) < torch.tensor(cases.LENGTHS)[:, None]
    with torch.no_grad():
        return model(input_ids=rows, attention_mask=mask.long(), use_cache=False).logits.numpy()


def main() -> None:
    for case in cases.CASES:
        with tempfile.TemporaryDirectory() as directory:
            text, shapes = build(case, directory)
            values = logits(opened(directory)).astype(np.float32)
        np.savez_compressed(
            cases.DIRECTORY / f"{case}.npz",
            config=np.array(text),
            shapes=np.array(json.dumps(shapes)),
            logits=values,
        )
        print(f"{case}: {len(shapes)} tensors, logits up to {np.abs(values).max():.3g}")


if __name__ == "__main__":
    main()
