"""Sampling against its definition: exact distributions, recomputed log-probs, layout, compiles."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pgjax import models, sampling
from pgjax.sampling import text

BASE = {
    "vocab_size": 7,
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 4,
    "mlp_size": 24,
    "max_length": 40,
}
STOP = 5


@functools.cache
def build(**changes):
    config = models.DecoderConfig(**{**BASE, **changes})
    rng = np.random.default_rng(11)
    params = jax.tree.map(
        lambda x: jnp.asarray(0.4 * rng.normal(size=x.shape), x.dtype),
        models.abstract_params(config),
    )
    return models.FunctionalDecoder(config), params


PROMPTS = [[1, 2, 3], [4], [6, 6, 1, 2, 3], [2, 4]]


def run(
    decoder, params, *, prompts=PROMPTS, key=0, width=8, num_samples=3, max_new_tokens=6, **options
):
    prompts, lengths = sampling.pad_prompts(prompts, bucket_sizes=[width])
    return sampling.generate(
        decoder,
        params,
        prompts,
        lengths,
        jax.random.key(key),
        num_samples=num_samples,
        max_new_tokens=max_new_tokens,
        **{"stop_tokens": (STOP,), **options},
    )


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@functools.partial(jax.jit, static_argnums=0)
def all_logits(decoder, params, tokens):
    return decoder.logits(params, decoder.apply(params, tokens))


def next_logits(decoder, params, row):
    """Logits of the token after `row`; rows are padded so that one program serves them all."""
    padded = np.zeros((1, 14), np.int32)
    padded[0, : len(row)] = row
    return np.asarray(all_logits(decoder, params, padded))[0, len(row) - 1]


def filtered(logits, *, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """The definition, one distribution at a time: log-probs, -inf where removed."""
    z = np.asarray(logits, np.float64) / temperature
    kept = set(range(len(z)))
    if top_k is not None and top_k < len(z):
        cut = sorted(z, reverse=True)[top_k - 1]
        kept = {v for v in kept if z[v] >= cut}
    if top_p is not None and top_p < 1:
        mass = sum(np.exp(z[v] - z.max()) for v in kept)
        total, cut = 0.0, None
        for v in sorted(kept, key=lambda v: -z[v]):
            if cut is None or total < top_p:
                cut = z[v]
            total += np.exp(z[v] - z.max()) / mass
        kept = {v for v in kept if z[v] >= cut}
    if min_p is not None:
        kept = {v for v in kept if np.exp(z[v] - z.max()) >= min_p}
    out = np.array([z[v] if v in kept else -np.inf for v in range(len(z))])
    return out - np.log(np.exp(out).sum())


# --- filters ---------------------------------------------------------------------------------

quarters = st.integers(-24, 24).map(lambda n: n / 4)  # ties are common
maybe = functools.partial(st.one_of, st.none())


@settings(max_examples=60, deadline=None)
@given(
    logits=hnp.arrays(np.float32, 6, elements=quarters),
    temperature=st.floats(0.25, 4.0),
    top_k=maybe(st.integers(1, 9)),
    top_p=maybe(st.floats(0.0, 1.0)),
    min_p=maybe(st.floats(0.0, 1.0)),
)
def test_filters_equal_the_definition(logits, temperature, top_k, top_p, min_p):
    tempered = (logits / np.float32(temperature)).astype(np.float32)
    expected = filtered(tempered, top_k=top_k, top_p=top_p, min_p=min_p)
    found = np.asarray(
        sampling.filter_logits(jnp.asarray(tempered), top_k=top_k, top_p=top_p, min_p=min_p)
    )
    # A cut within rounding of a token's mass may fall on either side; look only at clear cases.
    nudged = [
        filtered(
            tempered,
            top_k=top_k,
            top_p=None if top_p is None else float(np.clip(top_p + e, 0, 1)) if top_p < 1 else 1.0,
            min_p=None if min_p is None else float(min_p * (1 + e)),
        )
        if min_p is None or min_p * (1 + e) <= 1
        else expected
        for e in (-1e-5, 1e-5)
    ]
    if all((np.isinf(n) == np.isinf(expected)).all() for n in nudged):
        np.testing.assert_array_equal(np.isinf(found), np.isinf(expected))
        np.testing.assert_allclose(log_softmax(found), expected, rtol=1e-5, atol=1e-5)


def kept(logits, **options):
    found = np.asarray(sampling.filter_logits(jnp.asarray(logits, jnp.float32), **options))
    return np.flatnonzero(np.isfinite(found)).tolist()


def test_filter_edges_and_ties():
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    assert kept(logits) == [0, 1, 2, 3]
    assert kept(logits, top_k=1) == [0]
    assert kept(logits, top_k=4) == kept(logits, top_k=99) == [0, 1, 2, 3]
    assert kept(logits, top_p=0.0) == kept(logits, top_p=0.39) == [0]
    assert kept(logits, top_p=0.41) == kept(logits, top_p=0.69) == [0, 1]
    assert kept(logits, top_p=1.0) == [0, 1, 2, 3]
    assert kept(logits, min_p=0.0) == [0, 1, 2, 3]
    assert kept(logits, min_p=0.6) == [0, 1]
    assert kept(logits, min_p=1.0) == [0]
    # top-p looks at what top-k left: of {.4, .3} renormalised, .57 is the first one's mass.
    assert kept(logits, top_k=2, top_p=0.55) == [0]
    assert kept(logits, top_p=0.55) == [0, 1]
    ties = np.array([1.0, 2.0, 2.0, 0.0, 2.0])
    assert kept(ties, top_k=1) == kept(ties, top_p=0.1) == kept(ties, min_p=1.0) == [1, 2, 4]
    assert kept(np.zeros(4), top_k=2) == [0, 1, 2, 3]
    # A tail below float32 rounding of the sum survives p = 1.
    assert kept([0.0, -40.0, -80.0], top_p=1.0) == [0, 1, 2]
    assert kept([-np.inf, 0.0, -1.0], top_k=3) == [1, 2]


def test_filters_do_not_depend_on_the_order_of_the_vocabulary():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(5, 12)).round(1).astype(np.float32)  # rounding makes ties
    order = rng.permutation(12)
    options = {"top_k": 6, "top_p": 0.8, "min_p": 0.1}
    direct = sampling.filter_logits(jnp.asarray(logits), **options)
    permuted = sampling.filter_logits(jnp.asarray(logits[:, order]), **options)
    np.testing.assert_array_equal(np.asarray(direct)[:, order], permuted)


@pytest.mark.parametrize(
    ("options", "sorts"),
    [
        ({}, 0),
        ({"min_p": 0.1}, 0),
        ({"top_k": 3}, 1),
        ({"top_k": 3, "top_p": 0.9, "min_p": 0.1}, 1),
    ],
)
def test_one_sort_serves_all_filters(options, sorts):
    def run(x):
        return sampling.filter_logits(x, **options)

    assert jax.jit(run).lower(jnp.zeros((4, 9))).as_text().count("stablehlo.sort") == sorts


def test_filter_errors():
    for options, message in (
        ({"top_k": 0}, "top_k: expected a number in"),
        ({"top_p": 1.5}, "top_p: expected a number in"),
        ({"min_p": -0.1}, "min_p: expected a number in"),
    ):
        with pytest.raises(ValueError, match=message):
            sampling.filter_logits(jnp.zeros(4), **options)


# --- log-probs and layout --------------------------------------------------------------------

MODELS = {
    "plain": {},
    "grouped": {"num_kv_heads": 2},
    "tied_soft_cap": {"tied_embeddings": True, "logit_soft_cap": 3.0},
    "qk_norm": {"qk_norm": True, "num_kv_heads": 1},
}
SETTINGS = {
    "plain": {},
    "tempered": {"temperature": 0.7},
    "all_filters": {"temperature": 1.3, "top_k": 5, "top_p": 0.9, "min_p": 0.05},
}


@pytest.mark.parametrize(
    ("model", "setting"),
    [("plain", s) for s in SETTINGS] + [(m, "all_filters") for m in MODELS if m != "plain"],
)
def test_log_probs_equal_a_recomputation_row_by_row(model, setting):
    decoder, params = build(**MODELS[model])
    options = SETTINGS[setting]
    samples = run(decoder, params, **options)
    rows, width = samples.tokens.shape
    assert (rows, width) == (12, 14)
    logits = np.asarray(all_logits(decoder, params, samples.tokens))
    lengths = np.asarray([len(p) for p in PROMPTS])
    stopped_early = 0
    for row in range(rows):
        prompt = PROMPTS[row // 3]
        end = int(samples.lengths[row])
        assert int(samples.prompt_ids[row]) == row // 3
        tokens = np.asarray(samples.tokens[row])
        assert tokens[: len(prompt)].tolist() == prompt
        completion = tokens[len(prompt) : end].tolist()
        assert STOP not in completion[:-1]
        assert bool(samples.truncated[row]) == (completion[-1] != STOP)
        assert len(completion) == 6 or completion[-1] == STOP
        stopped_early += len(completion) < 6
        np.testing.assert_array_equal(tokens[end:], 0)
        expected_mask = [lengths[row // 3] <= j < end for j in range(width)]
        np.testing.assert_array_equal(samples.mask[row], expected_mask)
        for j in range(width):
            inside = expected_mask[j]
            plain = log_softmax(logits[row, j - 1])[tokens[j]] if inside else 0.0
            behavior = filtered(logits[row, j - 1], **options)[tokens[j]] if inside else 0.0
            assert abs(float(samples.logprobs[row, j]) - plain) < 1e-4
            assert abs(float(samples.behavior_logprobs[row, j]) - behavior) < 1e-4
    assert stopped_early > 0  # or the masks above were never tried


def test_padding_batch_and_budget_do_not_change_what_is_sampled():
    """Other widths, budgets, batches and group sizes give the sequences they share the same."""
    decoder, params = build()
    small = run(decoder, params)
    large = run(
        decoder,
        params,
        prompts=[*PROMPTS, [3, 3]],
        width=11,
        num_samples=5,
        max_new_tokens=9,
        pad_token=4,
    )
    continued = 0
    for row in range(12):
        twin = row // 3 * 5 + row % 3
        where = np.flatnonzero(small.mask[row])
        for field in ("tokens", "mask"):
            np.testing.assert_array_equal(
                getattr(large, field)[twin][where], getattr(small, field)[row][where]
            )
        for field in ("logprobs", "behavior_logprobs"):
            np.testing.assert_allclose(
                getattr(large, field)[twin][where], getattr(small, field)[row][where], atol=1e-5
            )
        end = int(large.lengths[twin])
        np.testing.assert_array_equal(large.tokens[twin][end:], 4)
        continued += end > int(small.lengths[row])
        assert bool(small.truncated[row]) == (end > int(small.lengths[row]))
    assert 0 < continued < 12


def test_sequences_and_keys_differ():
    decoder, params = build()
    one, two = run(decoder, params, key=0), run(decoder, params, key=1)
    assert (np.asarray(one.tokens) != np.asarray(two.tokens)).any()
    for prompt in range(4):
        group = np.asarray(one.tokens)[3 * prompt : 3 * prompt + 3]
        assert len({tuple(row.tolist()) for row in group}) > 1


# --- the distribution ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.6}, {"temperature": 1.5, "top_k": 4, "top_p": 0.85}, {"min_p": 0.05}],
)
def test_frequencies_follow_the_exact_distribution(options):
    vocab, stop, draws = 5, 4, 6000
    decoder, params = build(vocab_size=vocab)
    prompt = [1, 3]
    samples = sampling.generate(
        decoder,
        params,
        np.array([prompt], np.int32),
        np.array([2], np.int32),
        jax.random.key(123),
        num_samples=draws,
        max_new_tokens=2,
        stop_tokens=(stop,),
        **options,
    )
    exact = {}
    first = filtered(next_logits(decoder, params, prompt), **options)
    for a in range(vocab):
        if a == stop:
            exact[(a,)] = np.exp(first[a])
            continue
        second = filtered(next_logits(decoder, params, [*prompt, a]), **options)
        for b in range(vocab):
            exact[(a, b)] = np.exp(first[a] + second[b])
    counts = dict.fromkeys(exact, 0)
    tokens, mask = np.asarray(samples.tokens), np.asarray(samples.mask)
    for row, chosen in zip(tokens, mask, strict=True):
        counts[tuple(row[chosen].tolist())] += 1
    possible = [k for k, p in exact.items() if p > 0]
    assert sum(exact.values()) == pytest.approx(1.0, abs=1e-5)
    assert sum(counts[k] for k in possible) == draws  # nothing outside the filters' support
    expected = np.array([exact[k] for k in possible])
    observed = np.array([counts[k] for k in possible])
    # Rare outcomes share one cell, as the chi-square approximation needs.
    rare = expected * draws < 5
    if rare.any():
        expected = np.append(expected[~rare], expected[rare].sum())
        observed = np.append(observed[~rare], observed[rare].sum())
    assert len(expected) > 2
    assert scipy.stats.chisquare(observed, expected / expected.sum() * draws).pvalue > 1e-3


def test_temperature_zero_is_the_argmax_rollout():
    decoder, params = build()
    samples = run(decoder, params, temperature=0.0)
    for row in range(12):
        sequence = list(PROMPTS[row // 3])
        for _ in range(6):
            sequence.append(int(np.argmax(next_logits(decoder, params, sequence))))
            if sequence[-1] == STOP:
                break
        assert np.asarray(samples.tokens[row])[: len(sequence)].tolist() == sequence
        assert int(samples.lengths[row]) == len(sequence)
    np.testing.assert_array_equal(samples.behavior_logprobs, 0.0)
    assert (np.asarray(samples.logprobs)[np.asarray(samples.mask)] < 0).all()


def test_a_tiny_temperature_approaches_greedy_without_overflow():
    decoder, params = build()
    cold, greedy = run(decoder, params, temperature=1e-6), run(decoder, params, temperature=0.0)
    np.testing.assert_array_equal(cold.tokens, greedy.tokens)
    assert np.isfinite(np.asarray(cold.behavior_logprobs)).all()


# --- the loop --------------------------------------------------------------------------------


def test_the_loop_stops_when_every_sequence_has():
    decoder, params = build()
    at_once = run(decoder, params, max_new_tokens=20, stop_tokens=range(7))
    assert int(at_once.steps) == 1
    np.testing.assert_array_equal(np.asarray(at_once.mask).sum(-1), 1)
    assert not np.asarray(at_once.truncated).any()
    early = run(decoder, params, max_new_tokens=20, stop_tokens=(0, 1, 2, 3, 5, 5, 5))
    assert int(early.steps) == int(np.asarray(early.mask).sum(-1).max())
    assert 1 < int(early.steps) < 20
    never = run(decoder, params, stop_tokens=())
    assert int(never.steps) == 6 and np.asarray(never.truncated).all()


def test_a_budget_of_one_token():
    decoder, params = build()
    samples = run(decoder, params, max_new_tokens=1)
    assert int(samples.steps) == 1
    np.testing.assert_array_equal(np.asarray(samples.mask).sum(-1), 1)
    first = run(decoder, params)
    np.testing.assert_array_equal(
        np.asarray(samples.tokens)[np.asarray(samples.mask)],
        [int(row[len(PROMPTS[i // 3])]) for i, row in enumerate(np.asarray(first.tokens))],
    )


@pytest.mark.usefixtures("empty_caches")
def test_other_settings_reuse_the_program():
    decoder, params = build()
    programs = text._generate._cache_size
    run(decoder, params)
    before = programs()
    for temperature, pad, stop in ((1.0, 0, 1), (0.7, 2, 3), (0, 1, 2), (np.float32(0.5), 0, 4)):
        run(decoder, params, temperature=temperature, pad_token=pad, stop_tokens=(stop,))
    run(decoder, params, temperature=jnp.float32(0.3), key=9)
    assert programs() == before
    run(decoder, params, top_k=3, top_p=0.5, min_p=0.1)
    before = programs()
    for k, p, m in ((2, 0.9, 0.2), (9, 1.0, 0.0), (np.int64(2), 1, 0)):
        run(decoder, params, top_k=k, top_p=p, min_p=m)
    assert programs() == before


def test_the_cache_is_updated_in_place():
    """Temporary memory is one completion cache and a layer's slice of it, not two caches."""
    config = models.DecoderConfig(**{**BASE, "num_layers": 8})
    shape = jax.ShapeDtypeStruct
    compiled = text._generate.lower(
        models.FunctionalDecoder(config),
        models.abstract_params(config),
        shape((2, 4), jnp.int32),
        shape((2,), jnp.int32),
        jax.eval_shape(lambda: jax.random.key(0)),
        text._Settings(
            temperature=shape((), jnp.float32),
            top_k=None,
            top_p=None,
            min_p=None,
            stop_tokens=shape((1,), jnp.int32),
            pad_token=shape((), jnp.int32),
        ),
        num_samples=256,
        max_new_tokens=33,
    ).compile()
    cache = models.empty_completion_cache(config, num_prompts=2, num_samples=256, num_slots=32)
    size = sum(x.nbytes for x in (*cache.keys, *cache.values))
    assert size < compiled.memory_analysis().temp_size_in_bytes < 1.6 * size


def test_generate_works_inside_jit():
    decoder, params = build()
    prompts, lengths = sampling.pad_prompts(PROMPTS, bucket_sizes=[8])

    @jax.jit
    def outer(params, prompts, lengths, key, temperature):
        return sampling.generate(
            decoder,
            params,
            prompts,
            lengths,
            key,
            num_samples=3,
            max_new_tokens=6,
            temperature=temperature,
            stop_tokens=(STOP,),
        )

    found = outer(params, prompts, lengths, jax.random.key(0), 0.8)
    expected = run(decoder, params, temperature=0.8)
    np.testing.assert_array_equal(found.tokens, expected.tokens)


def test_bfloat16_sampling_keeps_float32_log_probs():
    decoder, params = build(dtype=jnp.bfloat16)
    samples = run(decoder, params)
    assert samples.logprobs.dtype == samples.behavior_logprobs.dtype == jnp.float32
    logits = np.asarray(all_logits(decoder, params, samples.tokens))
    for row, j in zip(*np.nonzero(np.asarray(samples.mask)), strict=True):
        expected = log_softmax(logits[row, j - 1])[int(samples.tokens[row, j])]
        assert abs(float(samples.logprobs[row, j]) - expected) < 0.1


# --- input -----------------------------------------------------------------------------------


def test_pad_prompts():
    prompts, lengths = sampling.pad_prompts([[1, 2, 3], [4]], pad_token=9)
    np.testing.assert_array_equal(prompts, [[1, 2, 3], [4, 9, 9]])
    np.testing.assert_array_equal(lengths, [3, 1])
    assert prompts.dtype == lengths.dtype == np.int32
    assert sampling.pad_prompts([[1] * 5], multiple=4)[0].shape == (1, 8)
    assert sampling.pad_prompts([[1] * 4], multiple=4)[0].shape == (1, 4)
    assert sampling.pad_prompts([[1] * 5], bucket_sizes=[32, 4, 8])[0].shape == (1, 8)
    for prompts, options, message in (
        ([], {}, "prompts: expected at least one prompt, got none"),
        ([[1], []], {}, "prompts: prompt 1 is empty"),
        ([[1], [1] * 9], {"bucket_sizes": [4, 8]}, "prompt 1 has 9 tokens.*largest bucket 8"),
        ([[1]], {"multiple": 0}, "multiple: expected a number in"),
        ([[1]], {"bucket_sizes": []}, "bucket_sizes: expected positive sizes"),
        ([[1]], {"bucket_sizes": [4], "multiple": 2}, "multiple: expected 1"),
    ):
        with pytest.raises(ValueError, match=message):
            sampling.pad_prompts(prompts, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -0.1}, "temperature: expected a number in"),
        ({"temperature": float("nan")}, "temperature: expected a number in"),
        ({"top_p": 0.0}, "top_p: expected a number in"),
        ({"top_p": 1.1}, "top_p: expected a number in"),
        ({"min_p": 2.0}, "min_p: expected a number in"),
        ({"top_k": 0}, "top_k: expected a number in"),
        ({"top_k": 2.5}, "top_k: expected an integer dtype"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected a number in"),
        ({"max_new_tokens": 38}, "exceed the decoder's max_length 40"),
        ({"num_samples": 0}, "num_samples: expected a number in"),
        ({"stop_tokens": (7,)}, r"stop_tokens: expected ids in \[0, 7\), got 7"),
        ({"prompts": np.zeros((0, 3), np.int32)}, "prompts: expected at least one prompt"),
        ({"prompts": np.zeros((2, 3), np.float32)}, "prompts: expected an integer dtype"),
        ({"prompts": np.full((2, 3), 7)}, r"prompts: expected ids in \[0, 7\)"),
        ({"prompts": np.zeros(3, np.int32)}, "prompts: expected rank 2"),
        ({"prompt_lengths": np.array([1, 0])}, r"prompt_lengths: expected values in \[1, 3\]"),
        ({"prompt_lengths": np.array([4, 1])}, r"prompt_lengths: expected values in \[1, 3\]"),
        ({"prompt_lengths": np.array([1])}, r"prompt_lengths: expected shape \(2,\)"),
    ],
)
def test_generate_errors_name_the_argument(changes, message):
    decoder, params = build()
    arguments = {
        "prompts": np.ones((2, 3), np.int32),
        "prompt_lengths": np.array([3, 2]),
        "num_samples": 2,
        "max_new_tokens": 4,
        **changes,
    }
    with pytest.raises(ValueError, match=message):
        sampling.generate(
            decoder,
            params,
            arguments.pop("prompts"),
            arguments.pop("prompt_lengths"),
            jax.random.key(0),
            **arguments,
        )
