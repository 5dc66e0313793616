"""Every family of checkpoints: logits as transformers gave them, packing, saving."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from golden import cases, make

from pgjax.models import pretrained

TOLERANCE = 1e-4
CASES = sorted(cases.CASES)
LONG = 128  # room for prompts and completions, also where the trained length is shorter


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Each case's checkpoint, written once."""

    @functools.cache
    def of(case: str) -> Path:
        golden = cases.read(case)
        path = tmp_path_factory.mktemp(case)
        make.write(path, golden["config"], golden["shapes"])
        return path

    return of


@pytest.fixture(scope="module")
def loaded(directory):
    """Each case's decoder and parameters."""
    return functools.cache(lambda case: pretrained.load(directory(case), max_length=LONG))


@functools.partial(jax.jit, static_argnums=0)
def logits_of(decoder, params, tokens, positions=None, segment_ids=None):
    hidden = decoder.apply(params, tokens, positions=positions, segment_ids=segment_ids)
    return decoder.logits(params, hidden)


def assert_close_on_real_tokens(actual, wanted):
    for row, length in enumerate(cases.LENGTHS):
        np.testing.assert_allclose(
            np.asarray(actual)[row, :length], wanted[row, :length], rtol=0, atol=TOLERANCE
        )


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case, loaded):
    """Both rows at once, the shorter one right-padded."""
    actual = logits_of(*loaded(case), cases.tokens())
    assert_close_on_real_tokens(actual, cases.read(case)["logits"])


@pytest.mark.parametrize("case", CASES)
def test_packed_rows_are_separate_rows(case, loaded):
    """The two rows one after the other in a single row, between them no attention."""
    (first, second), rows = cases.LENGTHS, cases.tokens()
    packed = np.concatenate([rows[0, :first], rows[1, :second]])[None]
    positions = np.concatenate([np.arange(first), np.arange(second)])[None].astype(np.int32)
    segments = np.repeat(np.array([0, 1], np.int32), cases.LENGTHS)[None]
    actual = np.asarray(logits_of(*loaded(case), packed, positions, segments))[0]
    wanted = cases.read(case)["logits"]
    np.testing.assert_allclose(actual[:first], wanted[0, :first], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(actual[first:], wanted[1, :second], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_save_and_load_again_is_bit_exact(case, directory, loaded, tmp_path):
    """With and without the source; in several files; and tensor by tensor what was there."""
    from safetensors.numpy import load_file

    decoder, params = loaded(case)
    pretrained.save(tmp_path / "a", decoder, params, source=directory(case), max_shard_bytes=9000)
    files = sorted((tmp_path / "a").glob("*.safetensors"))
    assert len(files) > 2
    written = {name: value for file in files for name, value in load_file(file).items()}
    original = load_file(directory(case) / "model.safetensors")
    assert written.keys() == original.keys()
    for name, value in original.items():
        np.testing.assert_array_equal(written[name], value, strict=True)
    before = json.loads((directory(case) / "config.json").read_text())
    after = json.loads((tmp_path / "a/config.json").read_text())
    for options in (before, after):
        options.pop("dtype", None), options.pop("torch_dtype", None)
    assert before == after

    pretrained.save(tmp_path / "b", decoder, params)
    for name in "ab":
        again, values = pretrained.load(tmp_path / name, max_length=LONG)
        assert again == decoder
        jax.tree.map(np.testing.assert_array_equal, values, params)
