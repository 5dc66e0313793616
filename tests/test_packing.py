"""Packed sequences: the plan, the way there and back, and equality with padded rows."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pgjax as pg
from pgjax import models
from pgjax.train import packing

EXPERTS = models.MoEConfig(
    num_experts=3, experts_per_token=2, expert_size=8, normalize_weights=True
)


@functools.cache
def build(moe=None, tied=False):
    config = models.DecoderConfig(
        vocab_size=11,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        mlp_size=24,
        max_length=16,
        moe=moe,
        tied_embeddings=tied,
        init_stddev=0.4,
    )
    decoder, params = models.init(config, jax.random.key(0))
    head = {"kernel": jnp.linspace(-1.0, 1.0, 16), "bias": jnp.float32(0.3)}
    return decoder, {"decoder": params, "value_head": head}


def rollout(lengths, width=16, seed=0):
    rng = np.random.default_rng(seed)
    lengths = np.asarray(lengths)
    batch = len(lengths)
    column = np.arange(width)
    mask = (column >= 2) & (column < lengths[:, None])
    return pg.Rollout(
        tokens=jnp.asarray(rng.integers(0, 11, (batch, width)), jnp.int32),
        mask=jnp.asarray(mask),
        behavior_logprobs=jnp.asarray(np.where(mask, -1.0, 0.0), jnp.float32),
        rewards=jnp.asarray(rng.normal(size=batch), jnp.float32),
        group_ids=jnp.arange(batch, dtype=jnp.int32) // 2,
    )


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=12))
def test_plan_keeps_sequences_apart_and_uses_few_rows(lengths):
    plan = jax.jit(packing.plan, static_argnames="width")(np.array(lengths, np.int32), width=9)
    taken = set()
    for row, start, length in zip(plan.row, plan.start, lengths, strict=True):
        cells = {(int(row), int(start) + i) for i in range(length)}
        assert not cells & taken and int(start) + length <= 9
        taken |= cells
    least = -(-sum(lengths) // 9)
    assert len({row for row, _ in taken}) == int(plan.rows) <= 11 / 9 * _optimal(lengths, 9) + 6 / 9
    assert int(plan.rows) >= least


def _optimal(lengths, width):
    """Fewest rows, by trying every assignment that could be better (branch and bound)."""
    items = sorted((n for n in lengths if n), reverse=True)
    best = len(items)

    def search(index, rows):
        nonlocal best
        if len(rows) >= best:
            return
        if index == len(items):
            best = len(rows)
            return
        for i, used in enumerate(rows):
            if used + items[index] <= width and used not in rows[:i]:
                search(index + 1, [*rows[:i], used + items[index], *rows[i + 1 :]])
        search(index + 1, [*rows, items[index]])

    search(0, [])
    return best


def test_unpack_is_the_inverse_of_pack():
    tokens = jnp.asarray(np.random.default_rng(1).integers(1, 50, (5, 8)), jnp.int32)
    lengths = jnp.array([3, 8, 0, 5, 4], jnp.int32)
    plan = packing.plan(lengths, width=8)
    assert int(plan.rows) == 3
    rows = packing.pack(tokens, plan, num_rows=3)
    kept = np.arange(8) < np.asarray(lengths)[:, None]
    np.testing.assert_array_equal(
        packing.unpack(rows.tokens.astype(jnp.float32), plan), np.where(kept, tokens, 0)
    )
    assert int((rows.segment_ids > 0).sum()) == 20
    np.testing.assert_array_equal(packing.unpack(rows.positions * 1.0, plan)[1], np.arange(8))


@pytest.mark.parametrize("moe", [None, EXPERTS])
@pytest.mark.parametrize("lengths", [(4, 9, 3, 16, 5, 7), (16, 16, 16, 16, 16, 16), (3, 2, 0, 4)])
def test_packed_outputs_and_gradients_equal_padded_ones(moe, lengths):
    decoder, params = build(moe=moe)
    batch = rollout(lengths)
    if moe is not None:
        batch = pg.train.record_experts(decoder, params, batch)
    needs = frozenset({"entropy", "values", "features"})

    def run(shares):
        outputs = pg.train.language_model_outputs(decoder, packed_shares=shares)

        def loss(params):
            out = outputs(params, batch, needs)
            return jnp.sum(out.logprobs * out.entropy) + jnp.sum(out.values**2), out

        (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        features = np.where(np.asarray(batch.mask)[..., None], out.features, 0.0)
        return dataclasses.replace(out, features=features), grads

    def close(found, expected):
        scale = np.abs(expected).max()  # of float32's rounding in the sums behind each entry
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * scale)

    jax.tree.map(close, run((0.25, 0.5)), run(()))


def test_an_update_on_packed_rows_equals_one_on_padded_rows():
    decoder, params = build(tied=True)
    batch = rollout((4, 9, 3, 16, 5, 7, 2, 6))
    optimizer = optax.sgd(0.1)
    results = []
    for shares in ((), (0.5,)):
        update = pg.train.make_update(
            pg.train.language_model_outputs(decoder, packed_shares=shares),
            pg.objectives.grpo(),
            optimizer,
            num_microbatches=2,
        )
        state = pg.train.init(jax.tree.map(jnp.copy, params), optimizer, jax.random.key(1))
        results.append(update(state, batch)[0].params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), *results)


def test_replayed_experts_are_used():
    decoder, params = build(moe=EXPERTS)
    outputs = jax.jit(pg.train.language_model_outputs(decoder), static_argnums=2)
    batch = rollout((9, 16))
    natural = outputs(params, batch, frozenset()).logprobs
    recorded = pg.train.record_experts(decoder, params, batch)
    assert recorded.experts.shape == (2, 16, 2, 2)
    np.testing.assert_allclose(outputs(params, recorded, frozenset()).logprobs, natural, rtol=1e-6)
    other = recorded.replace(experts=(recorded.experts + 1) % 3)
    assert np.abs(outputs(params, other, frozenset()).logprobs - natural).max() > 1e-2


def test_a_samplers_routes_are_the_learners_and_are_replayed():
    """R3: what the sampler recorded; with equal weights it is what the learner would choose."""
    decoder, params = build(moe=EXPERTS)
    prompts, lengths = pg.sampling.pad_prompts([[1, 2, 3], [4], [5, 6, 7, 8, 9]])
    samples = pg.sampling.generate(
        decoder,
        params["decoder"],
        prompts,
        lengths,
        jax.random.key(3),
        num_samples=2,
        max_new_tokens=7,
        stop_tokens=(0,),
        record_experts=True,
    )
    rollout = pg.train.to_rollout(samples, jnp.zeros(6))
    natural = pg.train.record_experts(decoder, params, rollout).experts
    # All tokens that the sampler ran: the last one of each completion it only chose.
    ran = np.arange(12) < np.asarray(samples.lengths)[:, None] - 1
    np.testing.assert_array_equal(rollout.experts[ran], natural[ran])
    outputs = jax.jit(pg.train.language_model_outputs(decoder), static_argnums=2)
    found = outputs(params, rollout, frozenset()).logprobs
    np.testing.assert_allclose(found, samples.logprobs, atol=1e-4)


def test_demonstrations_are_rollouts_of_reward_one():
    tokens, mask = np.arange(6).reshape(2, 3), np.array([[False, True, True]] * 2)
    batch = pg.train.demonstrations(tokens, mask)
    np.testing.assert_array_equal(batch.tokens, tokens)
    np.testing.assert_array_equal(batch.mask, mask)
    assert batch.rewards.tolist() == [1.0, 1.0] and batch.group_ids.tolist() == [0, 1]
    with pytest.raises(ValueError, match="mask: expected dtype bool"):
        pg.train.demonstrations(tokens, mask.astype(np.float32))
    with pytest.raises(ValueError, match=r"mask: expected shape \(2, 3\)"):
        pg.train.demonstrations(tokens, mask[:, :2])


def test_errors():
    decoder, _ = build()
    with pytest.raises(ValueError, match=r"packed_shares: expected numbers in \(0, 1\), got 1.5"):
        pg.train.language_model_outputs(decoder, packed_shares=(1.5,))
    with pytest.raises(ValueError, match="lengths: expected an integer dtype"):
        packing.plan(jnp.ones(3), width=4)
    with pytest.raises(ValueError, match="width"):
        packing.plan(jnp.ones(3, jnp.int32), width=0)
