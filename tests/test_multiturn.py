"""Episodes as rows of tokens, their returns, and the quest they come from."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pgjax as pg
from pgjax import objectives, returns
from pgjax.envs import textquest
from pgjax.objectives import agentic
from pgjax.returns import turns
from pgjax.sampling import multiturn

EOS = 1


def episodes(seed=0, count=5, turns=4, seen=3, said=3):
    """Random episodes as `flatten_turns` takes them."""
    rng = np.random.default_rng(seed)
    taken = np.arange(turns) < rng.integers(1, turns + 1, (count, 1))
    lengths = np.where(taken, rng.integers(1, said + 1, (count, turns)), 0)
    actions = rng.integers(2, 9, (count, turns, said))
    last = np.arange(said) == lengths[..., None] - 1
    return {
        "observations": rng.integers(2, 9, (count, turns, seen)),
        "observation_lengths": np.where(taken, rng.integers(0, seen + 1, (count, turns)), 0),
        "actions": np.where(last, EOS, actions),
        "action_lengths": lengths,
        "action_logprobs": -rng.random((count, turns, said)).astype(np.float32),
        "turn_rewards": np.where(taken, rng.normal(size=(count, turns)), 0.0).astype(np.float32),
        "group_ids": np.arange(count) // 2,
    }


def test_rows_by_loop():
    data = episodes()
    rollout = multiturn.flatten_turns(**data, eos=EOS, truncated=np.arange(5) == 2)
    assert rollout.tokens.shape == (5, 24)
    for i in range(5):
        tokens, mask, ids, logprobs, rewards = [], [], [], [], []
        for m in range(4):
            o, a = data["observation_lengths"][i, m], data["action_lengths"][i, m]
            tokens += [*data["observations"][i, m, :o], *data["actions"][i, m, :a]]
            mask += [False] * o + [True] * a
            ids += [-1] * o + [m] * a
            logprobs += [0.0] * o + [*data["action_logprobs"][i, m, :a]]
            rewards += [0.0] * (o + a - 1) + [data["turn_rewards"][i, m]] * int(a > 0)
        for name, want in {
            "tokens": tokens, "mask": mask, "behavior_logprobs": logprobs, "rewards": rewards,
        }.items():  # fmt: skip
            found = np.asarray(getattr(rollout, name))[i]
            np.testing.assert_allclose(found[: len(want)], want, rtol=1e-6, err_msg=name)
            assert not found[len(want) :].any()
        np.testing.assert_array_equal(rollout.turn_ids[i], ids + [-1] * (24 - len(ids)))
    np.testing.assert_array_equal(rollout.truncated, np.arange(5) == 2)
    multiturn.check_turns(rollout)


def test_rewards_are_conserved_and_stand_at_the_end_of_their_turn():
    data = episodes(seed=1)
    rollout = jax.jit(lambda d: multiturn.flatten_turns(**d, eos=EOS))(data)
    np.testing.assert_allclose(rollout.rewards.sum(-1), data["turn_rewards"].sum(-1), rtol=1e-5)
    paid = np.asarray(rollout.rewards) != 0
    assert np.all(np.asarray(rollout.tokens)[paid] == EOS) and paid.any()
    total = turns.turn_totals(rollout.rewards, rollout.turn_ids, num_turns=4)
    np.testing.assert_allclose(total, data["turn_rewards"], atol=1e-6)


def spread(rollout, seed):
    """The same rollout with observation tokens thrown in."""
    rng = np.random.default_rng(seed)
    rows, length = rollout.mask.shape
    wide = length + 7
    places = np.stack([np.sort(rng.permutation(wide)[:length]) for _ in range(rows)])

    def move(x, fill):
        out = np.full((rows, wide), fill, np.asarray(x).dtype)
        np.put_along_axis(out, places, np.asarray(x), axis=1)
        return jnp.asarray(out)

    moved = rollout.replace(
        tokens=move(rollout.tokens, 3),
        mask=move(rollout.mask, False),
        rewards=move(rollout.rewards, 0.0),
        behavior_logprobs=move(rollout.behavior_logprobs, 0.0),
        turn_ids=move(rollout.turn_ids, -1),
        values=move(rollout.values, 99.0),
    )
    return moved, places


@pytest.mark.parametrize(("gamma", "lambda_"), [(1.0, 1.0), (0.9, 0.95), (0.7, 0.0)])
def test_observations_between_turns_change_no_advantage(gamma, lambda_):
    rollout = multiturn.flatten_turns(**episodes(), eos=EOS)
    values = np.random.default_rng(2).normal(size=rollout.mask.shape).astype(np.float32)
    rollout = rollout.replace(values=jnp.asarray(values))

    def estimate(r):
        return returns.gae(
            r.rewards,
            r.values,
            returns.next_values_within(r.values, r.mask),
            jnp.full(r.mask.shape, gamma),
            lambda_=lambda_,
            mask=r.mask,
        )

    moved, places = spread(rollout, 3)
    found = np.take_along_axis(np.asarray(estimate(moved)), places, axis=1)
    np.testing.assert_allclose(found, estimate(rollout), atol=1e-5)
    prepared = objectives.ppo(gamma=gamma, lambda_=lambda_).prepare(moved).advantages
    want = objectives.ppo(gamma=gamma, lambda_=lambda_).prepare(rollout).advantages
    np.testing.assert_allclose(np.take_along_axis(np.asarray(prepared), places, 1), want, atol=1e-5)


def test_returns_of_tokens_are_returns_of_their_turns():
    data = episodes(seed=4)
    rollout = multiturn.flatten_turns(**data, eos=EOS)
    ones = jnp.ones(rollout.mask.shape)
    to_go = np.flip(np.cumsum(np.flip(data["turn_rewards"], 1), 1), 1)
    want = turns.at_turns(jnp.asarray(to_go), rollout.turn_ids)
    zero = jnp.zeros(rollout.mask.shape)
    found = returns.gae(rollout.rewards, zero, zero, ones, lambda_=1.0, mask=rollout.mask)
    np.testing.assert_allclose(found, want, atol=1e-5)
    np.testing.assert_allclose(objectives.reinforce().prepare(rollout).advantages, want, atol=1e-5)
    myopic = returns.discounted(rollout.rewards, zero, mask=rollout.mask)
    np.testing.assert_allclose(myopic, rollout.rewards, atol=1e-7)


def test_rloo_on_rows_of_turns_is_rloo_on_sequences():
    data = episodes(seed=5, count=6)
    rollout = multiturn.flatten_turns(**data, eos=EOS)
    total = agentic.with_total_rewards(objectives.rloo())
    plain = rollout.replace(rewards=jnp.asarray(data["turn_rewards"].sum(-1)))
    prepared, want = total.prepare(rollout), objectives.rloo().prepare(plain)
    np.testing.assert_allclose(prepared.advantages, want.advantages, atol=1e-5)

    def loss(logprobs, objective, prepared):
        return objective.value(pg.PolicyOutputs(logprobs=logprobs), prepared)

    logprobs = rollout.behavior_logprobs
    found = np.asarray(jax.grad(loss)(logprobs, total, prepared))
    np.testing.assert_allclose(found, jax.grad(loss)(logprobs, objectives.rloo(), want), atol=1e-6)
    assert not found[~np.asarray(rollout.mask)].any() and found.any()


def test_a_failed_episode_has_no_total():
    rollout = multiturn.flatten_turns(**episodes(seed=5, count=6), eos=EOS)
    rewards = rollout.rewards.at[3, 0].set(jnp.nan)
    prepared = agentic.with_total_rewards(objectives.rloo()).prepare(
        rollout.replace(rewards=rewards)
    )
    assert not prepared.mask[3].any() and prepared.mask[2].any()
    assert np.isfinite(prepared.advantages).all() and prepared.advantages[3] == 0


def test_an_episode_cut_off_bootstraps():
    rewards = jnp.array([[0.0, 0.0, 1.0, 0.0]])
    values = jnp.array([[0.5, 0.5, 0.5, 0.0]])
    mask = np.array([[True, True, True, False]])
    for cut in (False, True):
        after = returns.next_values_within(values, mask, final=2.0 if cut else 0.0)
        found = returns.gae(rewards, values, after, jnp.ones((1, 4)), lambda_=1.0, mask=mask)
        np.testing.assert_allclose(found, [[2.5, 2.5, 2.5, 0.0] if cut else [0.5] * 3 + [0.0]])


FAULTS = {
    "eos": (lambda d: d["actions"].__setitem__((0, 0), 5), "a turn does not end in eos"),
    "reward": (lambda d: d["turn_rewards"].__setitem__((0, 3), 1.0), "did not take place"),
    "hole": (lambda d: d["action_lengths"].__setitem__((0, 0), 0), "a turn after one"),
    "length": (lambda d: d["action_lengths"].__setitem__((0, 0), 4), "action_lengths: out of"),
    "seen": (lambda d: d["observation_lengths"].__setitem__((0, 0), -1), "observation_lengths"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_raise_or_leave_the_episode_out(fault):
    data = episodes(seed=6)
    data["action_lengths"][0, 1:] = [1, 0, 0]
    data["actions"][0, :2] = EOS
    data["action_lengths"][0, 0] = 3
    data["turn_rewards"][0, 2:] = 0
    multiturn.flatten_turns(**data, eos=EOS)
    spoil, text = FAULTS[fault]
    spoil(data)
    with pytest.raises(ValueError, match=text):
        multiturn.flatten_turns(**data, eos=EOS)
    rollout = jax.jit(lambda d: multiturn.flatten_turns(**d, eos=EOS))(data)
    np.testing.assert_array_equal(np.isnan(rollout.rewards).all(-1), np.arange(5) == 0)
    assert not agentic.trloo().prepare(rollout).mask[0].any()


def test_hand_made_rollouts_are_checked():
    rollout = multiturn.flatten_turns(**episodes(), eos=EOS)
    with pytest.raises(ValueError, match="got None"):
        multiturn.check_turns(rollout.replace(turn_ids=None))
    with pytest.raises(ValueError, match="do not decrease"):
        multiturn.check_turns(rollout.replace(turn_ids=jnp.flip(rollout.turn_ids, 1) + 1))
    with pytest.raises(ValueError, match="a turn for every token"):
        multiturn.check_turns(rollout.replace(turn_ids=rollout.turn_ids * 0 - 1))
    with pytest.raises(ValueError, match="0 off the mask"):
        multiturn.check_turns(rollout.replace(rewards=jnp.ones(rollout.mask.shape)))
    with pytest.raises(ValueError, match="action_logprobs"):
        multiturn.flatten_turns(**{**episodes(), "action_logprobs": jnp.zeros((5, 4, 2))}, eos=EOS)
    with pytest.raises(ValueError, match="turn_rewards: expected episodes and turns"):
        multiturn.flatten_turns(**{**episodes(), "turn_rewards": jnp.zeros((5, 3))}, eos=EOS)


QUESTS = [
    textquest.TextQuest(width=2, objects=1, length=2),
    textquest.TextQuest(width=4, objects=2, length=3),
    textquest.TextQuest(width=3, objects=3, length=6, spare_names=2, max_turns=40),
]


@pytest.mark.parametrize("quest", QUESTS)
def test_the_expert_finishes_on_a_shortest_way(quest):
    def play(key):
        state, _ = textquest.reset(quest, key)
        start = state

        def turn(state, _):
            result = textquest.step(quest, state, textquest.expert(quest, state))
            return result.state, (result.reward, result.terminated)

        _, (rewards, terminated) = jax.lax.scan(turn, state, None, length=quest.max_turns)
        return start, rewards, terminated

    keys = jax.random.split(jax.random.key(0), 16)
    start, rewards, terminated = jax.tree.map(np.asarray, jax.jit(jax.vmap(play))(keys))
    np.testing.assert_allclose(rewards.sum(1), 1.0, rtol=1e-5)
    assert np.all((rewards == 0) | np.isclose(rewards, 1 / quest.length))
    for i in range(16):
        room, moves = start.room[i], 0
        for number in range(quest.length):
            goal = (start.targets if number % 2 else start.places)[i, number // 2]
            moves += abs(room // quest.width - goal // quest.width)
            moves += abs(room % quest.width - goal % quest.width) + 1
            room = goal
            if number == quest.length - 1:
                break
        assert np.argmax(terminated[i]) + 1 == moves


def test_commands_do_what_they_say():
    quest = textquest.TextQuest(width=3, objects=2, length=3, spare_names=1, max_turns=3)
    state, _ = textquest.reset(quest, jax.random.key(0))
    state = dataclasses.replace(
        state,
        room=jnp.int32(4),
        places=jnp.array([4, 5]),
        targets=jnp.array([1, 0]),
        held=jnp.int32(-1),
        names=jnp.array([2, 0]),
    )
    first, absent, second = textquest.OBJECTS + 2, textquest.OBJECTS + 1, textquest.OBJECTS
    here, none = textquest.HERE, textquest.NOTHING
    np.testing.assert_array_equal(
        textquest.observe(quest, state), [textquest.TAKE, first, here, here, first, none]
    )

    def do(state, *command):
        return textquest.step(quest, state, jnp.array(command))

    for direction, room in (
        (textquest.NORTH, 1), (textquest.SOUTH, 7), (textquest.EAST, 5), (textquest.WEST, 3),
    ):  # fmt: skip
        moved = do(state, textquest.GO, direction, EOS).state
        assert int(moved.room) == room
    corner = dataclasses.replace(state, room=jnp.int32(0))
    assert int(do(corner, textquest.GO, textquest.NORTH, EOS).state.room) == 0
    for nonsense in (
        (textquest.GO, textquest.NORTH, 0),
        (textquest.GO, EOS, textquest.NORTH),
        (textquest.GO, EOS, EOS),
        (textquest.TAKE, second, EOS),
        (textquest.TAKE, absent, EOS),
        (textquest.TAKE, textquest.OBJECTS + 3, EOS),
        (textquest.PUT, first, EOS),
        (textquest.TAKE, textquest.NORTH, EOS),
    ):
        after = do(state, *nonsense)
        same = dataclasses.replace(after.state, turn=state.turn)
        jax.tree.map(np.testing.assert_array_equal, same, state)
        assert after.reward == 0 and int(after.state.turn) == 1
    taken = do(state, textquest.TAKE, first, EOS)
    assert float(taken.reward) == pytest.approx(1 / 3) and int(taken.state.held) == 0
    np.testing.assert_array_equal(
        taken.observation, [textquest.PUT, first, textquest.NORTH, here, none, first]
    )
    brought = do(
        do(taken.state, textquest.GO, textquest.NORTH, EOS).state, textquest.PUT, first, EOS
    )
    assert float(brought.reward) == pytest.approx(1 / 3) and int(brought.state.places[0]) == 1
    # Three turns are used up: cut off, which is not an end.
    assert bool(brought.truncated) and not bool(brought.terminated)


def test_finishing_ends_the_episode_even_in_the_last_turn():
    quest = textquest.TextQuest(width=2, objects=1, length=1, max_turns=1)
    state, _ = textquest.reset(quest, jax.random.key(0))
    state = dataclasses.replace(state, places=state.room[None])
    done = textquest.step(quest, state, jnp.array([textquest.TAKE, textquest.OBJECTS, EOS]))
    assert bool(done.terminated) and not bool(done.truncated)
    again = textquest.step(quest, done.state, jnp.array([textquest.GO, textquest.NORTH, EOS]))
    assert float(again.reward) == 0
    np.testing.assert_array_equal(again.observation, textquest.NOTHING)


def test_starts_are_spread_and_no_object_is_home():
    quest = QUESTS[1]
    keys = jax.random.split(jax.random.key(1), 500)
    state, observation = jax.vmap(lambda k: textquest.reset(quest, k))(keys)
    assert np.all(state.places != state.targets)
    for x in (state.room, state.places, state.targets):
        assert set(np.asarray(x).ravel()) == set(range(16))
    assert observation.shape == (500, 6) and int(observation.max()) < quest.vocabulary


def test_objects_of_an_episode_have_different_names_and_all_names_occur():
    quest = textquest.TextQuest(width=2, objects=2, spare_names=1)
    keys = jax.random.split(jax.random.key(0), 200)
    names = np.asarray(jax.vmap(lambda key: textquest.reset(quest, key)[0].names)(keys))
    pairs = {(int(a), int(b)) for a, b in names}
    assert pairs == {(a, b) for a in range(3) for b in range(3) if a != b}
    assert quest.vocabulary == textquest.OBJECTS + 3


def test_errors():
    with pytest.raises(ValueError, match="length"):
        textquest.TextQuest(width=2, objects=1, length=3)
    with pytest.raises(ValueError, match="spare_names"):
        textquest.TextQuest(spare_names=-1)
    with pytest.raises(ValueError, match="width"):
        dataclasses.replace(QUESTS[0], width=1)
    state, _ = textquest.reset(QUESTS[0], jax.random.key(0))
    with pytest.raises(ValueError, match="command"):
        textquest.step(QUESTS[0], state, jnp.array([2, 5]))
