"""Speculative sampling: the acceptance rule by enumeration, the loop against plain sampling."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import pgjax as pg
from pgjax import models, sampling
from pgjax.diagnostics import speculative as gains
from pgjax.sampling import speculative
from pgjax.sampling.speculative import generation

BASE = {
    "vocab_size": 7,
    "hidden_size": 16,
    "num_layers": 1,
    "num_heads": 4,
    "mlp_size": 24,
    "max_length": 40,
}
SMALL = {"hidden_size": 8, "num_heads": 2, "mlp_size": 12}
STOP = 5
PROMPTS = [[1, 2, 3], [4], [6, 6, 1, 2, 3], [2, 4]]


@functools.cache
def build(seed=11, **changes):
    config = models.DecoderConfig(**{**BASE, **changes})
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda x: jnp.asarray(0.4 * rng.normal(size=x.shape), x.dtype),
        models.abstract_params(config),
    )
    return models.FunctionalDecoder(config), params


def run(target, draft, *, prompts=PROMPTS, key=0, width=8, **options):
    tokens, lengths = sampling.pad_prompts(prompts, bucket_sizes=[width])
    defaults = {"num_samples": 3, "max_new_tokens": 9, "stop_tokens": (STOP,)}
    return speculative.generate(
        *target, *draft, tokens, lengths, jax.random.key(key), **{**defaults, **options}
    )


def plain(target, *, prompts=PROMPTS, key=0, width=8, **options):
    tokens, lengths = sampling.pad_prompts(prompts, bucket_sizes=[width])
    defaults = {"num_samples": 3, "max_new_tokens": 9, "stop_tokens": (STOP,)}
    return sampling.generate(
        *target, tokens, lengths, jax.random.key(key), **{**defaults, **options}
    )


@functools.partial(jax.jit, static_argnums=0)
def all_logits(decoder, params, tokens):
    return decoder.logits(params, decoder.apply(params, tokens))


def laws(rng, *shape):
    """Random laws, some of their entries 0."""
    x = rng.gamma(0.7, size=shape) * (rng.random(shape) > 0.25)
    x[..., 0] += 0.05
    return (x / x.sum(-1, keepdims=True)).astype(np.float32)


# --- the rule --------------------------------------------------------------------------------


def cells(p, q):
    """The parts of [0, 1) in which a uniform accepts or rejects: (midpoint, length)."""
    cut = min(1.0, float(q) / float(p))
    parts = [(0.0, cut), (cut, 1.0)]
    return [((a + b) / 2, b - a) for a, b in parts if b - a > 1e-6]


def rule(uniforms, tokens, draft, target):
    count, law = speculative.acceptance(
        jnp.asarray(uniforms, jnp.float32), jnp.asarray(tokens), draft, target
    )
    return int(count), np.asarray(law, np.float64)


@pytest.mark.parametrize("seed", range(4))
def test_one_draft_token_gives_the_targets_law(seed):
    vocab = 5
    rng = np.random.default_rng(seed)
    p, q = laws(rng, 1, vocab), laws(rng, 2, vocab)
    first, second = np.zeros(vocab), np.zeros((vocab, vocab))
    for x in range(vocab):
        if p[0, x] == 0:
            continue
        for u, volume in cells(p[0, x], q[0, x]):
            count, law = rule([u], [x], p, q)
            weight = float(p[0, x]) * volume
            if count == 1:
                first[x] += weight
                second[x] += weight * law  # the token after an accepted one
            else:
                first += weight * law
    np.testing.assert_allclose(first, q[0], atol=1e-6)
    accepted = second.sum(-1)
    np.testing.assert_allclose(accepted.sum(), gains.acceptance_rate(p[0], q[0]), atol=1e-6)
    np.testing.assert_allclose(second, accepted[:, None] * q[1], atol=1e-6)


@pytest.mark.parametrize("seed", range(2))
def test_two_draft_tokens_give_the_targets_joint_law(seed):
    """Laws that depend on the first token; after a rejection the rest comes from the target."""
    vocab = 4
    rng = np.random.default_rng(seed)
    p1, q1 = laws(rng, vocab), laws(rng, vocab)
    p2, q2, q3 = laws(rng, vocab, vocab), laws(rng, vocab, vocab), laws(rng, vocab)
    joint = np.zeros((vocab, vocab))
    counts = np.zeros(3)
    for x1, x2 in itertools.product(range(vocab), repeat=2):
        weight = float(p1[x1]) * float(p2[x1, x2])
        if weight == 0:
            continue
        draft, target = np.stack([p1, p2[x1]]), np.stack([q1, q2[x1], q3])
        for (u1, v1), (u2, v2) in itertools.product(
            cells(p1[x1], q1[x1]), cells(p2[x1, x2], q2[x1, x2])
        ):
            count, law = rule([u1, u2], [x1, x2], draft, target)
            mass = weight * v1 * v2
            counts[count] += mass
            if count == 0:
                joint += mass * law[:, None] * q2
            elif count == 1:
                joint[x1] += mass * law
            else:
                joint[x1, x2] += mass
                np.testing.assert_allclose(law, q3, atol=1e-6)
    np.testing.assert_allclose(joint, q1[:, None] * q2, atol=2e-6)
    assert counts.sum() == pytest.approx(1.0, abs=1e-5) and (counts > 0.02).all()


def test_equal_laws_accept_everything_and_disjoint_ones_nothing():
    rng = np.random.default_rng(0)
    p = laws(rng, 50, 3, 6)
    bonus = laws(rng, 50, 1, 6)
    keys = jax.random.split(jax.random.key(0), 50)
    draft = jax.vmap(lambda k, p: jax.random.categorical(k, jnp.log(p)))(keys, p)
    tokens, emitted = speculative.accept(
        jax.random.key(1), draft, p, np.concatenate([p, bonus], axis=1)
    )
    np.testing.assert_array_equal(emitted, 4)
    np.testing.assert_array_equal(tokens[:, :3], draft)
    assert tokens.dtype == jnp.int32 and (np.asarray(tokens) >= 0).all()
    left, right = np.zeros((2, 4, 6), np.float32)
    left[:, 1] = 1.0
    right[:, 3:5] = 0.5
    each = jax.vmap(lambda k: speculative.accept(k, jnp.ones(3, jnp.int32), left[:3], right))
    tokens, emitted = each(keys)
    np.testing.assert_array_equal(emitted, 1)
    assert set(np.asarray(tokens)[:, 0].tolist()) == {3, 4}
    np.testing.assert_array_equal(np.asarray(tokens)[:, 1:], -1)


def test_worked_example_and_rounding():
    p, q = np.array([[0.7, 0.3]], np.float32), np.array([[0.4, 0.6], [0.5, 0.5]], np.float32)
    assert float(gains.acceptance_rate(p[0], q[0])) == pytest.approx(0.7)
    count, law = rule([0.99], [0], p, q)
    assert count == 0
    np.testing.assert_allclose(law, [0.0, 1.0])
    assert rule([0.57], [0], p, q)[0] == 1 and rule([0.58], [0], p, q)[0] == 0  # 4/7 = 0.5714
    # A rejection though p = q, as rounding could bring about, falls back on q.
    same = np.array([[0.25, 0.75]], np.float32)
    count, law = rule([1.0], [0], same, np.concatenate([same, same]))
    assert count == 0
    np.testing.assert_allclose(law, same[0])


def test_accept_draws_by_the_rule():
    rng = np.random.default_rng(5)
    p, q = laws(rng, 2, 4), laws(rng, 3, 4)
    drafted = np.argmax(p - q[:2], axis=-1)  # tokens that are accepted with less than certainty
    draws = 20_000
    tokens, emitted = jax.jit(
        jax.vmap(lambda k: speculative.accept(k, jnp.asarray(drafted), p, q))
    )(jax.random.split(jax.random.key(3), draws))
    expected = {}
    a1, a2 = (min(1.0, q[i, drafted[i]] / p[i, drafted[i]]) for i in range(2))
    assert 0 < a1 < 1 and 0 < a2 < 1
    for count, mass in ((0, 1 - a1), (1, a1 * (1 - a2)), (2, a1 * a2)):
        last = np.maximum(q[count] - p[count], 0) if count < 2 else q[2]
        for v, share in enumerate(last / last.sum()):
            if share > 0:
                row = [*drafted[:count], v, *[-1] * (2 - count)]
                expected[tuple(row)] = mass * share
    rows, seen = np.unique(np.asarray(tokens), axis=0, return_counts=True)
    found = {tuple(r): n for r, n in zip(rows.tolist(), seen, strict=True)}
    assert set(found) == set(expected)
    observed = np.array([found[k] for k in expected])
    wanted = np.array(list(expected.values()), np.float64)
    assert scipy.stats.chisquare(observed, wanted / wanted.sum() * draws).pvalue > 1e-3
    np.testing.assert_array_equal(emitted, (np.asarray(tokens) >= 0).sum(-1))


def test_accept_rejects_what_is_no_law():
    good = np.full((2, 3), 1 / 3, np.float32)
    three = np.full((3, 3), 1 / 3, np.float32)
    key, tokens = jax.random.key(0), np.array([0, 1])
    none = good.copy()
    none[1] = [1.0, 0.0, 0.0]
    for arguments, message in (
        ((tokens, good, good), r"target_probs: expected shape \(3, 3\), got \(2, 3\)"),
        ((tokens, good, np.full((3, 4), 0.25, np.float32)), "target_probs: expected shape"),
        ((tokens, three, three), r"draft_probs: expected shape \(2, 3\), got \(3, 3\)"),
        ((tokens, good * 1.01, three), "draft_probs: expected rows that sum to 1"),
        ((tokens, good, three * np.nan), "target_probs: expected rows that sum to 1"),
        ((np.array([0, 3]), good, three), r"draft_tokens: expected ids in \[0, 3\)"),
        ((tokens, none, three), "draft_tokens: expected tokens that the draft can draw"),
        ((np.zeros(0, int), good[:0], three[:1]), "draft_tokens: expected at least one"),
        ((tokens * 1.0, good, three), "draft_tokens: expected an integer dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            speculative.accept(key, *arguments)


# --- what it gains ---------------------------------------------------------------------------


def test_block_efficiency_and_speedup():
    assert float(gains.block_efficiency(0.5, num_draft_tokens=3)) == pytest.approx(1.875)
    alpha = np.array([0.0, 0.3, 0.99, 1.0])
    found = gains.block_efficiency(alpha, num_draft_tokens=4)
    np.testing.assert_allclose(found[:3], (1 - alpha[:3] ** 5) / (1 - alpha[:3]), rtol=1e-5)
    assert float(found[3]) == 5.0
    by_position = gains.block_efficiency_by_position(np.array([[0.9, 0.5, 0.2], [1.0, 0.0, 1.0]]))
    np.testing.assert_allclose(by_position, [1 + 0.9 + 0.45 + 0.09, 2.0], rtol=1e-6)
    speedup = gains.memory_bound_speedup(2.3, num_draft_tokens=3, cost_ratio=0.0164)
    assert float(speedup) == pytest.approx(2.3 / 1.0492)
    p, q = laws(np.random.default_rng(0), 2, 5, 6)
    np.testing.assert_allclose(
        gains.acceptance_rate(p, q), 1 - 0.5 * np.abs(p - q).sum(-1), atol=1e-6
    )
    for call in (
        lambda: gains.block_efficiency(0.5, num_draft_tokens=0),
        lambda: gains.memory_bound_speedup(2.0, num_draft_tokens=0, cost_ratio=0.1),
    ):
        with pytest.raises(ValueError, match="num_draft_tokens: expected a number in"):
            call()
    with pytest.raises(ValueError, match="cost_ratio: expected a number in"):
        gains.memory_bound_speedup(2.0, num_draft_tokens=1, cost_ratio=-0.1)
    with pytest.raises(ValueError, match=r"target_probs: expected shape"):
        gains.acceptance_rate(p, q[:2])


# --- the loop --------------------------------------------------------------------------------

WINDOW = {
    "num_layers": 2,
    "attention_kinds": (models.AttentionKind(window=3), models.AttentionKind()),
    "layer_kinds": (0, 1),
}
# Kind of target, of the draft (None: the target with noise on its parameters), γ.
PAIRS = {
    "same kind": ({}, {}, 3),
    "smaller draft": ({"learned_positions": True, "norm": "layer", "gated": False}, SMALL, 2),
    "windows": (WINDOW, None, 4),
}


def noisy(model, spread=0.04):
    decoder, params = model
    rng = np.random.default_rng(6)
    return decoder, jax.tree.map(lambda x: x + spread * rng.normal(size=x.shape), params)


@pytest.mark.parametrize("pair", PAIRS)
def test_greedy_equals_plain_greedy_token_for_token(pair):
    target, draft, count = PAIRS[pair]
    target = build(**target)
    draft = noisy(target) if draft is None else build(seed=5, **draft)
    options = {"temperature": 0.0, "max_new_tokens": 20 if pair == "windows" else 9}
    found, stats = run(target, draft, num_draft_tokens=count, **options)
    wanted = plain(target, **options)
    for name in ("tokens", "mask", "behavior_logprobs", "lengths", "truncated", "prompt_ids"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
    np.testing.assert_allclose(found.logprobs, wanted.logprobs, atol=1e-4)
    counts = np.asarray(found.mask).sum(-1)
    blocks, accepted = np.asarray(stats.blocks), np.asarray(stats.accepted)
    assert 0 < accepted.sum() < count * blocks.sum()  # both outcomes were tried
    assert (counts <= 1 + blocks + accepted).all() and int(found.steps) == blocks.max()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_that_is_the_target_is_always_accepted(temperature):
    target = build()
    found, stats = run(target, target, temperature=temperature)
    blocks, counts = np.asarray(stats.blocks), np.asarray(found.mask).sum(-1)
    np.testing.assert_array_equal(stats.accepted, 3 * blocks)
    np.testing.assert_array_equal(blocks, -(-(counts - 1) // 4))  # one token needs no block
    assert int(found.steps) == blocks.max() == 2


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.5, "top_k": 5, "top_p": 0.9, "min_p": 0.02}]
)
def test_layout_and_log_probs_equal_a_recomputation(options):
    target, draft = build(), build(seed=5)
    samples, _ = run(target, draft, pad_token=4, **options)
    rows, width = samples.tokens.shape
    assert (rows, width) == (12, 17)
    tokens, mask = np.asarray(samples.tokens), np.asarray(samples.mask)
    logits = all_logits(*target, samples.tokens)
    filters = {k: v for k, v in options.items() if k != "temperature"}
    scores = sampling.filter_logits(logits / options.get("temperature", 1.0), **filters)
    for found, source in ((samples.logprobs, logits), (samples.behavior_logprobs, scores)):
        wanted = np.where(mask, pg.logprobs.from_logits(source, samples.tokens), 0.0)
        np.testing.assert_allclose(found, wanted, atol=2e-4)
    early = 0
    for row in range(rows):
        prompt, end = PROMPTS[row // 3], int(samples.lengths[row])
        completion = tokens[row, len(prompt) : end].tolist()
        assert tokens[row, : len(prompt)].tolist() == prompt
        assert (tokens[row, end:] == 4).all()
        assert STOP not in completion[:-1]
        assert bool(samples.truncated[row]) == (completion[-1] != STOP)
        assert len(completion) == 9 or completion[-1] == STOP
        early += len(completion) < 9
        position = np.arange(width)
        np.testing.assert_array_equal(mask[row], (position >= len(prompt)) & (position < end))
    assert early > 0
    if filters:
        return
    first = plain(target)
    starts = [len(PROMPTS[row // 3]) for row in range(rows)]
    np.testing.assert_array_equal(
        tokens[np.arange(rows), starts], np.asarray(first.tokens)[np.arange(rows), starts]
    )


@pytest.mark.parametrize("options", [{"top_k": 4}, {"temperature": 1.4, "top_k": 3}])
def test_frequencies_follow_the_targets_exact_law(options):
    vocab, draws = 4, 8000
    target, draft = build(vocab_size=vocab), build(seed=5, vocab_size=vocab, **SMALL)
    prompt = [1, 3]
    samples, stats = run(
        target, draft, prompts=[prompt], width=2, num_samples=draws, num_draft_tokens=2,
        max_new_tokens=3, stop_tokens=(), key=7, **options,
    )  # fmt: skip
    rows = np.array([[*prompt, *x] for x in itertools.product(range(vocab), repeat=3)])
    filters = {k: v for k, v in options.items() if k != "temperature"}
    logits = all_logits(*target, rows) / options.get("temperature", 1.0)
    logprobs = pg.logprobs.from_logits(sampling.filter_logits(logits, **filters), rows)
    exact = np.exp(np.asarray(logprobs, np.float64)[:, 2:].sum(-1))
    assert exact.sum() == pytest.approx(1.0, abs=1e-4)
    index = (np.asarray(samples.tokens)[:, 2:] * [16, 4, 1]).sum(-1)
    observed = np.bincount(index, minlength=64)
    assert (observed[exact == 0] == 0).all()
    rare = exact * draws < 5
    wanted = np.append(exact[~rare], exact[rare].sum())
    observed = np.append(observed[~rare], observed[rare].sum())
    kept = wanted > 0
    assert scipy.stats.chisquare(
        observed[kept], wanted[kept] / wanted.sum() * draws
    ).pvalue > 1e-3  # fmt: skip
    # One block is enough where its first draft token was accepted, with Σ min(p, q).
    enough = np.asarray(stats.blocks) == 1
    for a in np.flatnonzero(exact.reshape(vocab, -1).sum(-1)):
        context = np.array([[*prompt, a]])
        q, p = (
            jax.nn.softmax(sampling.filter_logits(
                all_logits(*model, context)[0, -1] / options.get("temperature", 1.0), **filters
            ))
            for model in (target, draft)
        )  # fmt: skip
        rate = float(gains.acceptance_rate(p, q))
        here = enough[np.asarray(samples.tokens)[:, 2] == a]
        assert 0.1 < rate < 0.99 and len(here) > 30
        assert abs(here.mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / len(here)) + 1e-3


def test_rows_do_not_depend_on_the_batch():
    target, draft = build(), build(seed=5)
    small, _ = run(target, draft)
    large, _ = run(
        target, draft, prompts=[*PROMPTS, [3, 3]], num_samples=4, width=10, max_new_tokens=12
    )
    for row in range(12):
        twin = row // 3 * 4 + row % 3
        where = np.flatnonzero(small.mask[row])
        np.testing.assert_array_equal(large.tokens[twin][where], small.tokens[row][where])
    other, _ = run(target, draft, key=1)
    assert (np.asarray(other.tokens) != np.asarray(small.tokens)).any()


@pytest.mark.usefixtures("empty_caches")
def test_other_settings_reuse_the_program_and_it_works_inside_jit():
    target, draft = build(), build(seed=5)
    expected, _ = run(target, draft, temperature=0.8)
    before = generation._generate._cache_size()
    for temperature, stop in ((0.0, 1), (1.3, 2)):
        run(target, draft, temperature=temperature, stop_tokens=(stop,), pad_token=3, key=2)
    assert generation._generate._cache_size() == before
    tokens, lengths = sampling.pad_prompts(PROMPTS, bucket_sizes=[8])

    @jax.jit
    def outer(weights, temperature):
        return speculative.generate(
            target[0], weights, *draft, tokens, lengths, jax.random.key(0), num_samples=3,
            max_new_tokens=9, stop_tokens=(STOP,), temperature=temperature,
        )[0].tokens  # fmt: skip

    np.testing.assert_array_equal(outer(target[1], 0.8), expected.tokens)


def test_a_budget_of_one_token_needs_no_block():
    samples, stats = run(build(), build(seed=5), max_new_tokens=1)
    np.testing.assert_array_equal(np.asarray(samples.mask).sum(-1), 1)
    np.testing.assert_array_equal(stats.blocks, 0)
    np.testing.assert_array_equal(stats.accepted, 0)
    np.testing.assert_array_equal(
        samples.truncated, np.asarray(samples.tokens)[np.asarray(samples.mask)] != STOP
    )


def test_bad_arguments():
    target, draft = build(), build(seed=5, **SMALL)
    with pytest.raises(ValueError, match="draft: expected the target's vocabulary of 7, got 4"):
        run(target, build(seed=5, vocab_size=4, **SMALL))
    with pytest.raises(ValueError, match="num_draft_tokens: expected a number in"):
        run(target, draft, num_draft_tokens=0)
    with pytest.raises(ValueError, match="max_new_tokens: prompts of width 8 and 30 new tokens"):
        run(target, draft, max_new_tokens=30)
    with pytest.raises(ValueError, match="max_length 20"):
        run(target, build(seed=5, **{**SMALL, "max_length": 23}), max_new_tokens=13)
    with pytest.raises(ValueError, match=r"stop_tokens: expected ids in \[0, 7\)"):
        run(target, draft, stop_tokens=(7,))
