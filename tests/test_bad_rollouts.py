"""A thousand rollouts that nobody should train on: each is refused by name, or does no harm."""

import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_combinations import KNOWN, OUTPUTS, PARAMS, batch

import pgjax as pg
from experiments.shared import objectives as shared
from pgjax import sampling, train
from pgjax.train import packing

RECIPES = typing.get_args(shared.ObjectiveName)
VALUES, SHAPES = 22, 8  # cases of each recipe
# Recipes that do not read the behaviour's log-probs, or leave out what is not finite by themselves.
WITHOUT_RATIO = ("rloo", "reinforce", "gtpo", "oblr", "capo_adam")
LOGPROBS = ("behavior_logprobs", "reference_logprobs")
BAD_NUMBERS = (np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-45)
BAD_INTEGERS = (-1, -(2**31), 2**31 - 1, 4, 1000)


def good():
    """A whole rollout, every optional field that is not made by the trainer filled."""
    found = batch()
    mask = np.asarray(found.mask)
    return jax.tree.map(
        np.array,
        found.replace(
            proximal_logprobs=None,
            reference_logprobs=found.behavior_logprobs,
            values=jnp.zeros(mask.shape),
            truncated=jnp.zeros(len(mask), bool),
            trajectory_ids=jnp.arange(len(mask)),
            turn_ids=jnp.where(mask, 0, -1),
        ),
    )


GOOD = good()


def some(rng, shape):
    """Where to put bad values: one place, a row, a column, a random part, or everywhere."""
    chosen = np.zeros(shape, bool)
    kind = rng.integers(5)
    if kind == 0:
        chosen[tuple(rng.integers(n) for n in shape)] = True
    elif kind == 1:
        chosen[rng.integers(shape[0])] = True
    elif kind == 2:
        chosen[..., rng.integers(shape[-1])] = True
    elif kind == 3:
        chosen = rng.random(shape) < 0.3
    return chosen if kind < 4 else ~chosen


def with_bad_values(rng, rollout):
    """The rollout with one to three fields changed, every shape and dtype what it was."""
    numbers, integers = (
        [n for n, x in vars(rollout).items() if getattr(x, "dtype", None) == dtype]
        for dtype in (np.float32, np.int32)
    )
    for _ in range(rng.integers(1, 4)):
        kind = rng.choice(["numbers", "numbers", "integers", "mask", "groups"])
        if kind == "mask":
            name, where = "mask", some(rng, rollout.mask.shape)
            new = np.where(where, rng.random() < 0.3, rollout.mask)
        elif kind == "groups":
            name = "group_ids"
            new = rng.integers(*[(0, 1), (-3, 3), (-(2**31), 2**31 - 1)][rng.integers(3)], 12)
        else:
            name = rng.choice(numbers if kind == "numbers" else integers)
            given = getattr(rollout, name)
            where = some(rng, given.shape)
            side = rng.integers(3)
            if given.ndim == 2 and side < 2:  # on the mask alone, or off it
                where = where & (rollout.mask if side == 0 else ~rollout.mask)
            new = np.where(where, rng.choice(BAD_NUMBERS if kind == "numbers" else BAD_INTEGERS),
                           given)  # fmt: skip
        rollout = rollout.replace(**{name: new.astype(getattr(rollout, name).dtype)})
    return rollout


def misshapen(rng, array):
    """The array in a form that no field has, or that this one does not."""
    kind = rng.integers(9)
    if kind == 0:
        return array[:-1]
    if kind == 1:
        return np.concatenate([array, array[:1]])
    if kind == 2:
        return array[:, :-1] if array.ndim > 1 else array[:-2]
    if kind == 3:
        return np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, 1)])
    if kind == 4:
        return array[..., None]
    if kind == 5:
        return array[0]
    if kind == 6:
        return array.astype(np.int32 if array.dtype != np.int32 else np.float32)
    if kind == 7:
        return array.astype(np.complex64)
    ragged = [array.tolist(), [*array.tolist()[:1], [[]]]][rng.integers(2)]
    return [ragged, "rows", array.astype(object), array.astype("U4"), array[:0]][rng.integers(5)]


def with_a_bad_shape(rng, rollout):
    """The rollout with one field changed in shape or kind, or cut to nothing; and which field."""
    kind = rng.integers(12)
    if kind < 2:
        cut = np.s_[:0] if kind == 0 else np.s_[:, :0]
        emptied = jax.tree.map(lambda x: x[cut] if x.ndim > 1 or kind == 0 else x, rollout)
        return emptied, "tokens"
    name = rng.choice([n for n, x in vars(rollout).items() if hasattr(x, "dtype")])
    if kind == 2:
        name = rng.choice(["tokens", "mask", "behavior_logprobs", "rewards", "group_ids"])
        return rollout.replace(**{name: None}), name
    return rollout.replace(**{name: misshapen(rng, getattr(rollout, name))}), name


def all_finite(tree):
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return bool(leaves) and all(np.all(np.isfinite(x)) for x in leaves)


def harmless(update, state, rollout, *rest):
    """Updates, and checks that nothing is broken; whether the step was skipped."""
    state, metrics = update(state, rollout, *rest)
    assert all_finite(state.params) and all_finite(state.opt_state)
    return bool(metrics["skipped_updates"])


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe(name):
    options = {"stratified_grpo": ["alpha=0.5", "bucket_width=1"]}.get(name, [])
    objective = shared.make_objective(name, options, aggregate=None, known=KNOWN)
    optimizer = optax.adam(0.1)
    update = train.make_update(OUTPUTS, objective, optimizer)

    def state():
        return train.init(PARAMS + 0, optimizer, jax.random.key(0), objective=objective)

    start = state()
    # Sets are of whole trajectories, one row each, and say so.
    whole = GOOD.replace(trajectory_ids=None) if name == "polychromic" else GOOD
    trained, metrics = update(jax.tree.map(jnp.copy, start), whole)
    assert metrics["skipped_updates"] == 0 and all_finite(trained)
    unused = {n: np.where(whole.mask, getattr(whole, n), np.nan) for n in LOGPROBS}
    again, metrics = update(jax.tree.map(jnp.copy, start), whole.replace(**unused))
    assert metrics["skipped_updates"] == 0
    np.testing.assert_array_equal(again.params, trained.params)
    rng = np.random.default_rng(RECIPES.index(name))
    for case in range(VALUES):
        rollout = with_bad_values(rng, whole)
        try:
            harmless(update, jax.tree.map(jnp.copy, start), rollout)
        except Exception as error:
            raise AssertionError(f"case {case}: {error!r} for {rollout}") from error
    poison = whole.replace(behavior_logprobs=np.where(whole.mask, np.float32(np.nan), 0))
    assert harmless(update, jax.tree.map(jnp.copy, start), poison) == (name not in WITHOUT_RATIO)
    assert update._cache_size() == 1
    for _ in range(SHAPES):
        rollout, field = with_a_bad_shape(rng, whole)
        with pytest.raises((ValueError, TypeError), match=rf"\b{field}\b"):
            update(jax.tree.map(jnp.copy, start), rollout)


def test_rewards_of_every_token():
    """Bad ones on the mask leave their row out, bad ones off it too: a reward is a reward."""
    optimizer = optax.adam(0.1)
    rng = np.random.default_rng(1)
    for objective in (
        pg.objectives.ppo(),
        pg.objectives.with_total_rewards(pg.objectives.grpo()),
        pg.objectives.with_total_rewards(pg.objectives.reinforce()),
    ):
        update = train.make_update(OUTPUTS, objective, optimizer)
        start = train.init(PARAMS + 0, optimizer, jax.random.key(0), objective=objective)
        rewards = np.where(GOOD.mask, GOOD.rewards[:, None], 0).astype(np.float32)
        whole = GOOD.replace(rewards=rewards)
        assert not harmless(update, jax.tree.map(jnp.copy, start), whole)
        for _ in range(20):
            rollout = with_bad_values(rng, whole)
            value = rng.choice(BAD_NUMBERS).astype(np.float32)
            bad = np.where(some(rng, rewards.shape), value, rewards)
            harmless(update, jax.tree.map(jnp.copy, start), rollout.replace(rewards=bad))
        assert update._cache_size() == 1


CONFIG = pg.models.DecoderConfig(
    vocab_size=8, hidden_size=8, num_layers=1, num_heads=1, num_kv_heads=1, mlp_size=8, max_length=8
)


@pytest.mark.parametrize(
    ("objective", "shares"),
    [(pg.objectives.grpo(kl_coefficient=0.1), (0.5,)), (pg.objectives.ppo(), ())],
    ids=["packed", "values"],
)
def test_a_decoder(objective, shares):
    decoder, params = pg.models.init(CONFIG, jax.random.key(0))
    params = {"decoder": params, "value_head": pg.models.value_head_init(CONFIG, jax.random.key(1))}
    optimizer = optax.adamw(0.01)
    update = train.make_update(
        train.language_model_outputs(decoder, packed_shares=shares), objective, optimizer
    )
    rng = np.random.default_rng(2)
    for case in range(40):
        state = train.init(jax.tree.map(jnp.copy, params), optimizer, jax.random.key(0))
        rollout = GOOD if case == 0 else with_bad_values(rng, GOOD)
        tokens = np.where(some(rng, GOOD.tokens.shape), rng.choice(BAD_INTEGERS), rollout.tokens)
        if case:
            rollout = rollout.replace(tokens=tokens.astype(np.int32))
        assert not harmless(update, state, rollout) or case
    assert update._cache_size() == 1


def samples():
    return sampling.Samples(
        tokens=GOOD.tokens,
        mask=GOOD.mask,
        behavior_logprobs=GOOD.behavior_logprobs,
        logprobs=GOOD.behavior_logprobs,
        lengths=GOOD.mask.sum(1),
        truncated=GOOD.truncated,
        prompt_ids=GOOD.group_ids,
        steps=np.int32(3),
    )


def test_rollouts_of_samples():
    """What is wrong with samples, rewards, groups or extras is said where they come in."""
    named = {"prompt_ids": "group_ids"}
    rng = np.random.default_rng(3)
    size = len(GOOD.rewards)
    for case in range(120):
        given = {"samples": samples(), "rewards": GOOD.rewards, "group_ids": GOOD.group_ids}
        given["extras"] = {"answer_ids": np.arange(size)}
        name = rng.choice(["rewards", "group_ids", "extras", "samples"])
        field = name
        if name == "samples":
            field = rng.choice(["tokens", "mask", "behavior_logprobs", "truncated", "prompt_ids"])
            array = getattr(given["samples"], field)
            given["samples"] = given["samples"].replace(**{field: misshapen(rng, array)})
            if field == "prompt_ids":
                given["group_ids"] = None
        elif name == "extras":
            array = np.arange(size) if case % 2 else GOOD.behavior_logprobs
            wrong = [array[:-1], array[0], array[..., None, None], array.tolist(), None]
            given["extras"] = {"answer_ids": wrong[rng.integers(5)]}
        else:
            given[name] = misshapen(rng, given[name])
        # Of a batch whose tokens have the wrong size the first field that differs is named.
        field = r"\w+" if field == "tokens" else named.get(field, field)
        with pytest.raises((ValueError, TypeError), match=rf"\b{field}\b.*(expected|one per)"):
            train.to_rollout(
                given["samples"],
                given["rewards"],
                group_ids=given["group_ids"],
                extras=given["extras"],
            )


def test_demonstrations():
    optimizer = optax.adam(0.1)
    update = train.make_update(OUTPUTS, pg.objectives.supervised(), optimizer)
    start = train.init(PARAMS + 0, optimizer, jax.random.key(0))
    rng = np.random.default_rng(4)
    for case in range(60):
        name = ("tokens", "mask")[case % 2]
        given = {"tokens": GOOD.tokens, "mask": GOOD.mask}
        if case < 30:
            given[name] = misshapen(rng, given[name])
            with pytest.raises((ValueError, TypeError), match=r"\b(tokens|mask)\b.*expected"):
                rollout = train.demonstrations(**given)
                update(jax.tree.map(jnp.copy, start), rollout)
        else:
            given["mask"] = GOOD.mask & some(rng, GOOD.mask.shape)
            where = some(rng, GOOD.tokens.shape)
            given["tokens"] = np.where(where, rng.choice(BAD_INTEGERS), GOOD.tokens)
            harmless(update, jax.tree.map(jnp.copy, start), train.demonstrations(**given))


def test_packing():
    """Lengths that no row can have are refused, and so are plans of other batches."""
    rng = np.random.default_rng(5)
    tokens = rng.integers(1, 9, (6, 5)).astype(np.int32)
    for case in range(100):
        lengths = rng.integers(0, 6, 6).astype(np.int32)
        kind = case % 5
        if kind == 0:
            lengths[rng.integers(6)] = rng.choice([-1, 6, 1000, -(2**31), 2**31 - 1])
            with pytest.raises(ValueError, match=r"\blengths\b.*expected"):
                packing.plan(lengths, width=5)
        elif kind == 1:
            with pytest.raises((ValueError, TypeError), match=r"\blengths\b.*expected"):
                packing.plan(
                    [lengths.astype(np.float32), lengths[:, None], lengths[0]][rng.integers(3)],
                    width=5,
                )
        elif kind == 2:
            plan = packing.plan(lengths, width=5)
            wrong = [tokens[:-1], tokens[0], tokens.astype(np.float32), tokens[:0]]
            with pytest.raises(ValueError, match=r"\btokens\b.*expected"):
                packing.pack(wrong[rng.integers(4)], plan, num_rows=6)
        elif kind == 3:
            plan = packing.plan(lengths, width=5)
            with pytest.raises(ValueError, match=r"\bnum_rows\b.*expected"):
                packing.pack(tokens, plan, num_rows=int(rng.integers(-3, 1)))
        else:
            plan = packing.plan(lengths, width=5)
            rows = packing.pack(tokens, plan, num_rows=6)
            found = packing.unpack(rows.tokens.astype(jnp.float32), plan)
            kept = np.arange(5) < lengths[:, None]
            np.testing.assert_array_equal(found, np.where(kept, tokens, 0))
