"""Continuous batching against plain sampling, token for token, and its compiled program."""

from __future__ import annotations

import functools
import re

import devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgjax import models, sampling
from pgjax.sampling import continuous, draw
from pgjax.sampling.continuous import generate_continuous

BASE = {
    "vocab_size": 7,
    "hidden_size": 16,
    "num_layers": 1,
    "num_heads": 4,
    "mlp_size": 24,
    "max_length": 40,
}
STOP = 5
PROMPTS = [[1, 2, 3], [4], [6, 6, 1, 2, 3], [2, 4]]
FIVE = {"num_slots": 5, "refill_size": 2}
DEFAULTS = {"num_samples": 3, "max_new_tokens": 9, "stop_tokens": (STOP,)}


@functools.cache
def build(**changes):
    config = models.DecoderConfig(**{**BASE, **changes})
    rng = np.random.default_rng(11)
    params = jax.tree.map(
        lambda x: jnp.asarray(0.4 * rng.normal(size=x.shape), x.dtype),
        models.abstract_params(config),
    )
    return models.FunctionalDecoder(config), params


def run(function, model, *, prompts=PROMPTS, key=0, width=8, **options):
    tokens, lengths = sampling.pad_prompts(prompts, bucket_sizes=[width])
    return function(*model, tokens, lengths, jax.random.key(key), **{**DEFAULTS, **options})


plain = functools.partial(run, sampling.generate)
queued = functools.partial(run, generate_continuous)


def assert_same(found, wanted):
    for name in ("tokens", "mask", "lengths", "truncated", "prompt_ids"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name), err_msg=name)
    for name in ("logprobs", "behavior_logprobs"):
        np.testing.assert_allclose(
            getattr(found, name), getattr(wanted, name), atol=1e-5, err_msg=name
        )


# --- the samples are those of `generate` -----------------------------------------------------


@pytest.mark.parametrize(("slots", "refill"), [(1, 1), (5, 2), (9, 4), (99, None)])
def test_samples_equal_generates_whatever_the_slots_and_the_refill(slots, refill):
    wanted = plain(build())
    found = queued(build(), num_slots=slots, refill_size=refill)
    assert_same(found, wanted)
    counts = np.asarray(wanted.mask).sum(-1)
    assert len(set(counts.tolist())) > 3  # lengths differ, so places were taken over
    if slots == 1:  # each token but a sequence's first is one step
        assert int(found.steps) == (counts - 1).sum()
    elif slots >= 12:
        assert int(found.steps) == counts.max() - 1
    else:
        assert counts.max() - 1 <= int(found.steps) < (counts - 1).sum()


MIXED = {
    "num_layers": 2,
    "num_kv_heads": 2,
    "attention_kinds": (models.AttentionKind(window=3), models.AttentionKind()),
    "layer_kinds": (0, 1),
    "moe": models.MoEConfig(
        num_experts=4, experts_per_token=2, expert_size=8, normalize_weights=True
    ),
}


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (MIXED, {}),
        ({}, {"temperature": 1.4, "top_k": 6, "top_p": 0.95, "min_p": 0.01, "pad_token": 4}),
    ],
)
def test_other_models_and_settings(model, options):
    wanted = plain(build(**model), **options)
    assert_same(queued(build(**model), **FIVE, **options), wanted)


def test_greedy():
    assert_same(queued(build(), **FIVE, temperature=0.0), plain(build(), temperature=0.0))


def test_prompts_run_in_chunks():
    wanted = plain(build())
    assert_same(queued(build(), prefill_size=3, **FIVE), wanted)


@pytest.mark.parametrize("chunk", [None, 3])
def test_experts_are_those_of_generate(chunk):
    model = build(**MIXED)
    wanted = plain(model, record_experts=True)
    found = queued(model, **FIVE, prefill_size=chunk, record_experts=True)
    assert_same(found, wanted)
    assert queued(model, **FIVE).experts is None
    np.testing.assert_array_equal(found.experts, wanted.experts)
    # More than padding's: the routers send tokens to different experts.
    assert len(np.unique(np.asarray(found.experts)[np.asarray(found.mask)], axis=0)) > 2


def test_budgets_of_each_completion_in_both():
    rng = np.random.default_rng(0)
    budgets = rng.integers(1, 10, 12).astype(np.int32)
    budgets[:2] = 1, 9
    wanted = plain(build(), budgets=budgets)
    assert_same(queued(build(), budgets=budgets, **FIVE), wanted)
    free = plain(build())
    counts = np.asarray(wanted.mask).sum(-1)
    np.testing.assert_array_equal(counts, np.minimum(np.asarray(free.mask).sum(-1), budgets))
    last = np.asarray(wanted.tokens)[np.arange(12), np.asarray(wanted.lengths) - 1]
    np.testing.assert_array_equal(wanted.truncated, last != STOP)
    assert 0 < int(np.asarray(wanted.truncated).sum()) < 12
    for row in range(12):
        mask = np.asarray(wanted.mask[row])
        np.testing.assert_array_equal(wanted.tokens[row][mask], free.tokens[row][mask])
    ones = plain(build(), budgets=np.ones(12, np.int32))
    assert int(ones.steps) == 1  # the loop ends with the longest budget
    assert int(queued(build(), budgets=np.ones(12, np.int32), **FIVE).steps) == 0


def test_a_budget_of_one_token():
    found = queued(build(), max_new_tokens=1, **FIVE)
    assert_same(found, plain(build(), max_new_tokens=1))
    assert int(found.steps) == 0


# --- how long it takes -----------------------------------------------------------------------


def test_free_slots_wait_for_the_refill_size():
    """Counted by hand: rows of two tokens take one step, and one row of nine takes eight."""
    budgets = np.array([9] + [2] * 11, np.int32)
    # One slot is held by row 0; the others take four rows at a time, in three steps.
    eager = queued(build(), num_slots=5, refill_size=1, budgets=budgets, stop_tokens=())
    assert int(eager.steps) == 8
    # With R = S nothing is refilled before row 0 is done: 8 steps, then 7 rows in two rounds.
    waiting = queued(build(), num_slots=5, refill_size=5, budgets=budgets, stop_tokens=())
    assert int(waiting.steps) == 8 + 2
    np.testing.assert_array_equal(eager.tokens, waiting.tokens)


def test_the_tail_can_be_cut_off():
    budgets = np.array([2] * 11 + [9], np.int32)
    options = {**FIVE, "budgets": budgets, "stop_tokens": (5,), "key": 1}
    whole = queued(build(), **options)
    assert_same(queued(build(), max_tail_steps=20, **options), whole)
    assert int(whole.mask[11].sum()) > 4
    cut = queued(build(), max_tail_steps=3, **options)
    # Row 11 has its first token from the refill that empties the queue, then three more.
    assert int(cut.mask[11].sum()) == 4 and bool(cut.truncated[11])
    np.testing.assert_array_equal(cut.mask[:11], whole.mask[:11])
    mask = np.asarray(cut.mask)
    np.testing.assert_array_equal(np.asarray(cut.tokens)[mask], np.asarray(whole.tokens)[mask])
    none = queued(build(), max_tail_steps=0, **options)
    assert int(none.mask[11].sum()) == 1


def test_rows_do_not_depend_on_the_batch():
    small = queued(build(), **FIVE)
    large = queued(
        build(), prompts=[*PROMPTS, [3, 3]], num_samples=4, width=10, max_new_tokens=12,
        num_slots=6,
    )  # fmt: skip
    for row in range(12):
        twin = row // 3 * 4 + row % 3
        where = np.flatnonzero(small.mask[row])
        np.testing.assert_array_equal(large.tokens[twin][where], small.tokens[row][where])
    other = queued(build(), key=1, **FIVE)
    assert (np.asarray(other.tokens) != np.asarray(small.tokens)).any()


# --- the compiled program --------------------------------------------------------------------


def lowered(config, *, prompts, samples, slots, refill, width, budget):
    shape = jax.ShapeDtypeStruct
    return continuous._generate.lower(
        models.FunctionalDecoder(config),
        models.abstract_params(config),
        shape((prompts, width), jnp.int32),
        shape((prompts,), jnp.int32),
        jax.eval_shape(lambda: jax.random.key(0)),
        draw.Settings(
            temperature=shape((), jnp.float32),
            top_k=None,
            top_p=None,
            min_p=None,
            stop_tokens=shape((1,), jnp.int32),
            pad_token=shape((), jnp.int32),
        ),
        shape((prompts * samples,), jnp.int32),
        shape((), jnp.int32),
        num_samples=samples,
        num_slots=slots,
        max_new_tokens=budget,
        refill_size=refill,
        prefill_size=prompts,
        record_experts=False,
    )


def inside_loops(text):
    """The instructions of every computation that a while loop runs, however deep."""
    named = re.findall(r"^(?:ENTRY )?%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", text, re.S | re.M)
    computations = dict(named)
    reached, waiting = set(), re.findall(r"body=%?([\w.\-]+)", text)
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            called = re.findall(
                r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)", computations[name]
            )
            waiting += called
    assert 20 < len(reached) < len(computations)
    return "\n".join(computations[name] for name in reached)


def test_no_step_copies_the_cache():
    """Every loop writes its caches, one for each layer here, in place."""
    config = models.DecoderConfig(**{**BASE, "num_layers": 2, "max_length": 400})
    # Seven prompts at a time go into free slots: a number of rows that no cache here has.
    compiled = lowered(
        config, prompts=8, samples=16, slots=64, refill=7, width=4, budget=250
    ).compile()
    inside = inside_loops(compiled.as_text())
    decoder = models.FunctionalDecoder(config)
    caches = [
        decoder.caches_for_many_steps(models.empty_slot_cache(config, num_slots=n, capacity=254))
        for n in (64, 32, 16, 8)
    ]
    for cache in caches:
        shape = "f32[" + ",".join(map(str, cache.keys[0].shape)) + "]"
        # Written in a loop (a scatter, or a slice at a time, as XLA likes), and copied in none.
        array = re.escape(shape)
        assert re.search(rf"= {array}\{{3,2,1,0\}} (scatter|dynamic-update-slice)\(", inside)
        assert not re.findall(rf"= {array}\S* copy\(", inside)
    sizes = [sum(x.nbytes for x in jax.tree.leaves(cache)) for cache in caches]
    temporary = compiled.memory_analysis().temp_size_in_bytes
    # The cache, its halves for the tail, and little else.
    assert sizes[0] < temporary < 1.3 * sum(sizes)


@pytest.mark.usefixtures("empty_caches")
def test_other_settings_reuse_the_program_and_it_works_inside_jit():
    queued(build(), temperature=0.8, **FIVE)
    before = continuous._generate._cache_size()
    for temperature, stop in ((0.0, 1), (1.3, 2)):
        queued(build(), temperature=temperature, stop_tokens=(stop,), key=3, **FIVE)
    queued(build(), budgets=np.full(12, 3, np.int32), max_tail_steps=2, **FIVE)
    assert continuous._generate._cache_size() == before
    decoder, params = build()

    def outer(params, tokens, lengths, temperature):
        return generate_continuous(
            decoder, params, tokens, lengths, jax.random.key(0), temperature=temperature,
            **DEFAULTS, **FIVE,
        )  # fmt: skip

    found = jax.eval_shape(outer, params, jnp.zeros((4, 8), int), jnp.zeros(4, int), 0.8)
    assert jax.tree.structure(found) == jax.tree.structure(plain(build()))
    assert found.tokens.shape == (12, 17)


def test_sharded_parameters_shard_the_cache_and_change_no_token():
    code = """
        import json
        import jax
        from pgjax import parallel, sampling
        from pgjax.sampling import continuous, draw
        from test_continuous import PROMPTS, build

        decoder, params = build(num_kv_heads=2)
        mesh = parallel.make_mesh("fsdp=4,tensor=2")
        where = parallel.shardings(decoder.logical_axes(), mesh, shapes=params)
        settings = draw.settings(
            vocab_size=7, temperature=1.0, top_k=None, top_p=None, min_p=None, stop_tokens=(5,),
            pad_token=0,
        )
        arguments = (
            parallel.shard(params, where), *sampling.pad_prompts(PROMPTS, bucket_sizes=[8]),
            jax.random.key(0), settings, jax.numpy.full(12, 9), jax.numpy.int32(1000),
        )
        compiled = continuous._generate.lower(
            decoder, *arguments, num_samples=3, num_slots=5, max_new_tokens=9, refill_size=2,
            prefill_size=4, record_experts=False,
        ).compile()
        text = compiled.as_text()
        print(json.dumps({
            "tokens": compiled(*arguments).tokens.tolist(),
            "whole": text.count("f32[5,2,17,4]"), "half": text.count("f32[5,1,17,4]"),
        }))
    """
    found = devices.run(code)
    np.testing.assert_array_equal(found["tokens"], plain(build(num_kv_heads=2)).tokens)
    assert found["half"] > 0 and found["whole"] == 0  # each device holds its own heads' keys


# --- input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_slots": 0}, "num_slots: expected a number in"),
        ({"num_slots": 4, "refill_size": 5}, r"refill_size: expected a number in \[1, 4\], got 5"),
        ({"num_slots": 4, "refill_size": 0}, "refill_size: expected a number in"),
        ({"num_slots": 4, "prefill_size": 0}, "prefill_size: expected a number in"),
        ({"num_slots": 4, "max_tail_steps": -1}, "max_tail_steps: expected a number in"),
        (
            {"num_slots": 4, "budgets": np.ones(4, np.int32)},
            r"budgets: expected shape \(12,\), one per completion, got \(4,\)",
        ),
        ({"num_slots": 4, "budgets": np.full(12, 10)}, r"budgets: expected values in \[1, 9\]"),
        ({"num_slots": 4, "budgets": np.ones(12)}, "budgets: expected an integer dtype"),
        ({"num_slots": 4, "max_new_tokens": 33}, "max_new_tokens: prompts of width 8 and 33"),
        ({"num_slots": 4, "stop_tokens": (7,)}, r"stop_tokens: expected ids in \[0, 7\)"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        queued(build(), **options)
