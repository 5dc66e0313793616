"""The optional parts of an objective, and what the trainer computes for them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pgjax as pg
from pgjax import logprobs, models, objectives, train
from pgjax.diagnostics import problems

PROBLEM = problems.bandit(jnp.array([[0.0, 1.0, 0.5, 0.2], [2.0, 0.0, -1.0, 1.0]]))
OUTPUTS = functools.partial(problems.outputs, PROBLEM)


def batch(params, *, group_size=4, key=0):
    return problems.sample(PROBLEM, params, jax.random.key(key), group_size=group_size)


def dense(hidden, unembedding, temperature):
    return jax.nn.softmax(np.asarray(hidden) @ np.asarray(unembedding) / temperature, axis=-1)


@pytest.mark.parametrize("power", [1, 2, 3])
def test_power_sums_equal_those_of_the_logits(power):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(2, 5, 8)), jnp.float32)
    unembedding = jnp.asarray(rng.normal(size=(8, 40)), jnp.float32)
    tokens = rng.integers(0, 40, (2, 5))
    found = logprobs.power_sum(hidden, unembedding, tokens, power=power, temperature=0.7)
    want = (dense(hidden, unembedding, 0.7) ** power).sum(-1)
    np.testing.assert_allclose(found[:, 1:], want[:, :-1], rtol=2e-5)
    np.testing.assert_array_equal(found[:, 0], 1.0)
    known = logprobs.from_hidden(hidden, unembedding, tokens, temperature=0.7)
    again = logprobs.power_sum(
        hidden, unembedding, tokens, power=power, temperature=0.7, logprobs=known
    )
    np.testing.assert_array_equal(again, found)


def test_statistics_cost_the_passes_that_they_state():
    """In products of hidden states and unembedding, by the compiled program's own count."""
    shape, features, vocabulary = (4, 128), 64, 4096
    hidden, unembedding, known = (
        jax.ShapeDtypeStruct(size, jnp.float32)
        for size in ((*shape, features), (features, vocabulary), shape)
    )
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
    mask = jax.ShapeDtypeStruct(shape, jnp.bool_)
    product = 2 * shape[0] * shape[1] * features * vocabulary

    def passes(function, *arguments):
        cost = jax.jit(function).lower(hidden, unembedding, tokens, *arguments).compile()
        return cost.cost_analysis()["flops"] / product

    def power_sum(hidden, unembedding, tokens, known):
        return logprobs.power_sum(hidden, unembedding, tokens, power=2, logprobs=known)

    def support(hidden, unembedding, tokens, known):
        return logprobs.token_support(hidden, unembedding, tokens, size=8, logprobs=known)

    assert 1 <= passes(power_sum, known) < 1.1
    assert 1 <= passes(support, known) < 1.1
    assert 3 <= passes(logprobs.score_features, mask) < 3.2


@pytest.mark.parametrize("options", [{}, {"block_size": 7}, {"vocab_axis": 0, "soft_cap": 2.0}])
def test_supports_are_the_likeliest_tokens_and_the_drawn_one(options):
    rng = np.random.default_rng(4)
    hidden = jnp.asarray(rng.normal(size=(2, 6, 8)), jnp.float32)
    unembedding = jnp.asarray(rng.normal(size=(8, 23)), jnp.float32)
    tokens = rng.integers(0, 23, (2, 6))
    table = unembedding.T if options.get("vocab_axis") == 0 else unembedding
    found = logprobs.token_support(hidden, table, tokens, size=5, temperature=0.7, **options)
    logits = np.asarray(hidden) @ np.asarray(unembedding)
    if "soft_cap" in options:
        logits = 2.0 * np.tanh(logits / 2.0)
    p = np.asarray(jax.nn.softmax(logits / 0.7, axis=-1))
    replaced = 0
    for b in range(2):
        for t in range(1, 6):
            want = list(np.argsort(-p[b, t - 1])[:5])
            if tokens[b, t] not in want:
                want[-1], replaced = tokens[b, t], replaced + 1
            np.testing.assert_array_equal(found.ids[b, t], want)
            np.testing.assert_allclose(found.probabilities[b, t], p[b, t - 1][want], rtol=1e-5)
            assert found.ids[b, t, found.chosen[b, t]] == tokens[b, t]
    assert 0 < replaced < 10 and not found.probabilities[:, 0].any()

    def own(hidden, tokens):
        return logprobs.token_support(hidden, table, tokens, size=5, temperature=0.7, **options)

    automatic = (jax.sharding.AxisType.Auto,)
    mesh, rows = (
        jax.make_mesh((1,), ("data",), axis_types=automatic),
        jax.sharding.PartitionSpec("data"),
    )
    mapped = jax.jit(jax.shard_map(own, mesh=mesh, in_specs=(rows, rows), out_specs=rows))
    np.testing.assert_array_equal(mapped(hidden, jnp.asarray(tokens)).ids, found.ids)
    with pytest.raises(ValueError, match="size"):
        logprobs.token_support(hidden, unembedding, tokens, size=24)


def test_score_features_are_the_mean_pull_on_the_hidden_states():
    rng = np.random.default_rng(1)
    hidden = jnp.asarray(rng.normal(size=(3, 6, 8)), jnp.float32)
    unembedding = jnp.asarray(rng.normal(size=(8, 20)), jnp.float32)
    tokens = rng.integers(0, 20, (3, 6))
    mask = np.array([[0, 0, 1, 1, 0, 1], [0, 1, 0, 0, 0, 0], [0] * 6], bool)
    found = logprobs.score_features(hidden, unembedding, tokens, mask, temperature=1.3)
    probabilities = dense(hidden, unembedding, 1.3)
    for b in range(3):
        rows = [
            np.asarray(unembedding) @ (np.eye(20)[tokens[b, t]] - probabilities[b, t - 1])
            for t in np.flatnonzero(mask[b])
        ]
        want = np.mean(rows, axis=0) if rows else np.zeros(8)
        np.testing.assert_allclose(found[b], want, atol=2e-5)


def test_a_decoder_gives_them_too():
    config = models.DecoderConfig(
        vocab_size=13, hidden_size=8, num_layers=1, num_heads=2, mlp_size=16, max_length=16
    )
    decoder, params = models.init(config, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 13, (3, 7))
    mask = np.arange(7) >= np.array([[2], [4], [1]])
    rollout = train.demonstrations(tokens, mask)
    needs = objectives.objective.OLD_NEEDS
    plain = train.language_model_outputs(decoder)({"decoder": params}, rollout, needs)
    hidden = np.asarray(decoder.apply(params, tokens))
    p = dense(hidden, decoder.unembedding(params), 1.0)[:, :-1]
    kept = mask[:, 1:]
    for name, want in {
        "square_sum": (p**2).sum(-1),
        "cube_sum": (p**3).sum(-1),
        "feature_square_norm": (hidden[:, :-1] ** 2).sum(-1),
        "entropy": -(p * np.log(p)).sum(-1),
    }.items():
        found = np.asarray(getattr(plain, name))
        np.testing.assert_allclose(found[:, 1:][kept], want[kept], rtol=1e-4, err_msg=name)
        assert not found[~mask].any()
    packed = train.language_model_outputs(decoder, packed_shares=(0.7,))(
        {"decoder": params}, rollout, needs
    )
    for name in sorted(needs):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, atol=1e-4, err_msg=name),
            getattr(packed, name),
            getattr(plain, name),
        )


def recorder():
    """An objective whose parts write down what they see."""

    def advantage(rollout):
        assert rollout.old is not None and rollout.memory is not None
        return rollout.rewards + rollout.memory["mean"] + rollout.old.entropy[:, 1]

    return objectives.Objective(
        advantage=advantage,
        surrogate=lambda outputs, rollout: -rollout.extras["twice"][:, None] * outputs.logprobs,
        extras=lambda rollout: {"twice": 2 * rollout.advantages},
        mask=lambda rollout: rollout.advantages > 0,
        multiplier=lambda rollout: rollout.extras["twice"],
        memory=objectives.Memory(
            init=lambda: {"mean": jnp.float32(0.0)},
            update=lambda memory, rollout: {"mean": rollout.advantages.mean()},
        ),
        old_needs=frozenset({"entropy"}),
    )


def test_parts_see_what_came_before_and_memory_goes_on():
    objective, params = recorder(), jnp.zeros((2, 4))
    rollout = batch(params)
    filled = rollout.replace(old=OUTPUTS(params, rollout, objective.old_needs))
    prepared, memory = objective.prepare_and_remember(filled)
    want = np.asarray(rollout.rewards) + np.log(4)
    np.testing.assert_allclose(prepared.advantages, want, rtol=1e-6)
    np.testing.assert_allclose(prepared.multipliers, 2 * np.broadcast_to(want[:, None], (8, 2)))
    np.testing.assert_array_equal(prepared.mask[:, 1], want > 0)
    assert prepared.old is None and prepared.memory is None
    np.testing.assert_allclose(memory["mean"], want.mean(), rtol=1e-6)
    loss, _ = objective.loss(OUTPUTS(params, prepared, frozenset()), prepared)
    chosen = want > 0
    expected = (-((2 * want) ** 2) * np.log(1 / 4))[chosen].mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)

    optimizer = optax.sgd(0.1)
    update = train.make_update(OUTPUTS, objective, optimizer)
    state = train.init(params, optimizer, jax.random.key(0), objective=objective)
    state, _ = update(state, rollout)
    np.testing.assert_allclose(state.memory["mean"], want.mean(), rtol=1e-6)
    with pytest.raises(ValueError, match="state.memory: this objective has a memory"):
        update(train.init(jnp.zeros((2, 4)), optimizer, jax.random.key(0)), rollout)


def test_memory_is_saved_with_the_run(tmp_path):
    objective, optimizer = recorder(), optax.sgd(0.1)
    state = train.init(jnp.zeros((2, 4)), optimizer, jax.random.key(0), objective=objective)
    update = train.make_update(OUTPUTS, objective, optimizer)
    state, _ = update(state, batch(state.params))
    with train.checkpoints.open(tmp_path) as saved:
        saved.save(1, state, {})
        restored, _ = saved.restore(like=state)
    np.testing.assert_array_equal(restored.memory["mean"], state.memory["mean"])


def test_a_memory_may_begin_with_one_array_twice():
    zeros = jnp.zeros(3)
    memory = objectives.Memory(lambda: (zeros, zeros), lambda old, rollout: (old[0] + 1, old[1]))
    objective = dataclasses.replace(objectives.grpo(), memory=memory)
    update = train.make_update(OUTPUTS, objective, optax.sgd(0.1))
    params = jnp.zeros((2, 4))
    for _ in range(2):  # each update donates the state it is given
        given = batch(params)
        state = train.init(jnp.copy(params), optax.sgd(0.1), jax.random.key(0), objective=objective)
        state, _ = update(state, given)
    np.testing.assert_array_equal(state.memory, [[1.0] * 3, [0.0] * 3])


def in_groups():
    """Records, in every loss, whether the rows come in whole groups of four."""
    objective = objectives.grpo()

    def surrogate(outputs, rollout):
        ids = rollout.group_ids.reshape(-1, 4)
        whole = jnp.all(ids == ids[:, :1])
        return jnp.where(whole, objective.surrogate(outputs, rollout), jnp.nan)

    return dataclasses.replace(objective, surrogate=surrogate, whole_groups=True)


@pytest.mark.parametrize("cut", [(1, 2), (2, 1)])
def test_groups_stay_whole_where_they_must(cut):
    minibatches, microbatches = cut
    options = {"num_minibatches": minibatches, "num_microbatches": microbatches}
    with pytest.raises(ValueError, match="group_size: this objective compares samples"):
        train.make_update(OUTPUTS, in_groups(), optax.sgd(0.1), **options)
    results = []
    for objective, size in ((in_groups(), 4), (objectives.grpo(), 4)):
        update = train.make_update(OUTPUTS, objective, optax.sgd(0.1), group_size=size, **options)
        state = train.init(jnp.zeros((2, 4)), optax.sgd(0.1), jax.random.key(0))
        state, metrics = update(state, batch(state.params))
        assert np.isfinite(metrics["loss"])
        results.append(state.params)
    np.testing.assert_array_equal(*results)
    with pytest.raises(ValueError, match="equal parts of whole groups of 4"):
        state = train.init(jnp.zeros((2, 4)), optax.sgd(0.1), jax.random.key(0))
        update(state, batch(state.params, group_size=3))


def test_errors():
    grpo, params = objectives.grpo(), jnp.zeros((2, 4))
    with pytest.raises(ValueError, match="needs: expected names among"):
        dataclasses.replace(grpo, old_needs=frozenset({"values"}))
    wanting = dataclasses.replace(grpo, old_needs=frozenset({"square_sum"}))
    with pytest.raises(ValueError, match=r"rollout.old.square_sum: this objective needs it"):
        wanting.prepare(batch(params))
    with pytest.raises(ValueError, match=r"extras\['x'\]: expected shape \(8,\) or \(8, 2\)"):
        grpo.prepare(batch(params).replace(extras={"x": jnp.zeros(3)}))
    with pytest.raises(ValueError, match="power: "):
        logprobs.power_sum(jnp.zeros((1, 2, 3)), jnp.zeros((3, 4)), jnp.zeros((1, 2), int), power=0)
    with pytest.raises(ValueError, match="logprobs"):
        logprobs.power_sum(
            *(jnp.zeros((1, 2, 3)), jnp.zeros((3, 4)), jnp.zeros((1, 2), int)),
            power=2,
            logprobs=jnp.zeros((1, 3)),
        )
    with pytest.raises(ValueError, match="mask"):
        logprobs.score_features(
            jnp.zeros((1, 2, 3)), jnp.zeros((3, 4)), jnp.zeros((1, 2), int), jnp.zeros((1, 2))
        )
    with pytest.raises(ValueError, match="group_size: expected at least 1"):
        pg.train.make_update(OUTPUTS, grpo, optax.sgd(0.1), group_size=0)
