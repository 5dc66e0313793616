"""Adapters beside the libraries' own resets and steps: ends, rewards, observations, errors."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgjax import envs, sampling
from pgjax.envs import control


def random_actions(env, key, *shape):
    if isinstance(env.action, envs.Discrete):
        return jax.random.randint(key, shape, 0, env.action.num)
    low, high = env.action.low, env.action.high
    return jax.random.uniform(key, (*shape, *env.action.shape), minval=low, maxval=high)


def equal(one, other):
    np.testing.assert_array_equal(one, other)


def near(one, other):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


GYMNAX = {
    "CartPole-v1": {},
    "Pendulum-v1": {"max_steps_in_episode": 30},
    "MountainCarContinuous-v0": {"max_steps_in_episode": 7},
    "Catch-bsuite": {},
    "UmbrellaChain-bsuite": {"max_steps_in_episode": 1},
    "FrozenLake-misc": {"max_steps_in_episode": 5},
    "FourRooms-misc": {"max_steps_in_episode": 20},
}


@pytest.mark.parametrize("name", GYMNAX)
def test_gymnax_steps_are_its_own(name):
    """A step and a reset where it ended are gymnax's step, which splits its key the same way."""
    gymnax = pytest.importorskip("gymnax")
    other, params = gymnax.make(name)
    params = params.replace(**GYMNAX[name])
    env = envs.from_gymnax(name, params)
    keys = jax.random.split(jax.random.key(1), 100)
    actions = random_actions(env, jax.random.key(2), 100)
    first, their_start = other.reset(jax.random.key(0), params)
    start, observation = env.reset(jax.random.key(0))
    near(observation, first)

    def theirs(state, inputs):
        key, action = inputs
        observation, state, reward, terminated, truncated, info = other.step(
            key, state, action, params
        )
        return state, (observation, info["final_observation"], reward, terminated, truncated)

    def ours(state, inputs):
        key, action = inputs
        found, state, observation = envs.step_or_reset(env, key, state, action)
        return state, (observation, *found[1:])

    _, wanted = jax.jit(lambda s: jax.lax.scan(theirs, s, (keys, actions)))(their_start)
    _, found = jax.jit(lambda s: jax.lax.scan(ours, s, (keys, actions)))(start)
    for got, want in zip(found[:3], wanted[:3], strict=True):
        near(got, want)
    integers = isinstance(env.observation, envs.Discrete)
    assert found[0].dtype == found[1].dtype == (jnp.int32 if integers else jnp.float32)
    assert found[2].dtype == jnp.float32
    equal(found[3], wanted[3])
    equal(found[4], wanted[4] & ~wanted[3])
    assert np.any(found[3] | found[4])
    assert np.any(found[4]) == ("max_steps_in_episode" in GYMNAX[name])
    # The observation of the end is not that of the next beginning.
    assert np.any(found[0] != found[1])


def test_gymnax_spaces():
    pytest.importorskip("gymnax")
    cart, lake = envs.from_gymnax("CartPole-v1"), envs.from_gymnax("FrozenLake-misc")
    pendulum, catch = envs.from_gymnax("Pendulum-v1"), envs.from_gymnax("Catch-bsuite")
    assert (cart.action, cart.observation.shape) == (envs.Discrete(2), (4,))
    near(cart.observation.high[[0, 2]], [4.8, 24 * np.pi / 180])
    assert (lake.observation, lake.action) == (envs.Discrete(16), envs.Discrete(4))
    assert pendulum.action == envs.Box((1,), -2.0, 2.0)
    assert catch.observation == envs.Box((10, 5), 0.0, 1.0)
    assert (cart.name, envs.from_gymnax("FourRooms-misc").name) == ("CartPole-v1", "FourRooms-misc")


def test_gymnax_time_limits_in_an_unroll():
    """Every episode of a pendulum is cut at its 200 steps, and its return is the sum of them."""
    pytest.importorskip("gymnax")
    env = envs.from_gymnax("Pendulum-v1")

    def act(key, observation):
        return sampling.Decision(random_actions(env, key, 3))

    @jax.jit
    def run(key):
        running = sampling.start_environments(env, key, 3)
        return sampling.unroll_environments(env, act, running, key, num_steps=201)

    _, seen, episodes = run(jax.random.key(0))
    assert not np.any(seen.terminated)
    equal(np.flatnonzero(np.all(seen.truncated, axis=1)), [199])
    assert np.sum(seen.truncated) == 3
    equal(episodes.lengths[199], [200] * 3)
    near(episodes.returns[199], np.sum(seen.reward[:200], axis=0))
    equal(seen.next_observation[:199], seen.observation[1:200])
    assert np.all(np.any(seen.next_observation[199] != seen.observation[200], axis=-1))


def test_gradients_through_gymnax():
    """With transition gradients the slopes are those of the same pendulum here; without, only
    the torque's own cost -0.001 u² has one."""
    gymnax = pytest.importorskip("gymnax")
    inner, _ = gymnax.make("Pendulum-v1")
    own = control.pendulum()
    actions = 0.3 * jax.random.normal(jax.random.key(0), (5, 1))
    key = jax.random.key(3)

    def total(env, start, actions):
        def one(state, action):
            found = env.step(key, state, action)
            return found.state, found.reward

        return jax.lax.scan(one, start, actions)[1].sum()

    env = envs.from_gymnax(inner.with_transition_gradients())
    state, _ = env.reset(key)
    angles = jnp.stack([state.theta, state.theta_dot])
    start, _ = own.reset(key)
    wanted = jax.grad(functools.partial(total, own, start._replace(state=angles)))(actions)
    found = jax.grad(functools.partial(total, env, state))(actions)
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    assert np.all(np.abs(found[:-1]) > 1e-3)
    detached = envs.from_gymnax("Pendulum-v1")
    found = jax.grad(functools.partial(total, detached, state))(actions)
    np.testing.assert_allclose(found, -0.002 * actions, rtol=1e-4)


def test_gymnax_parameters_may_be_mapped_over():
    gymnax = pytest.importorskip("gymnax")
    inner, params = gymnax.make("CartPole-v1")
    key, action = jax.random.key(0), jnp.int32(1)

    @jax.jit
    @jax.vmap
    def velocities(gravity):
        env = envs.from_gymnax(inner, params.replace(gravity=gravity))
        state, _ = env.reset(key)
        return env.step(key, state, action).observation

    found = velocities(jnp.array([9.8, 0.0]))
    _, state = inner.reset(key, params)
    for got, gravity in zip(found, (9.8, 0.0), strict=True):
        near(got, inner.step_env(key, state, action, params.replace(gravity=gravity))[0])
    assert found[0, 3] != found[1, 3]


def test_gymnax_of_what_kind():
    gymnax = pytest.importorskip("gymnax")
    from gymnax.environments import classic_control, spaces
    from gymnax.wrappers import purerl

    class Two(classic_control.CartPole):
        def observation_space(self, params):
            return spaces.Dict({"x": spaces.Discrete(2)})

    class Several(classic_control.CartPole):
        def action_space(self, params=None):
            return spaces.Box(0, 3, (2,), jnp.int32)

    with pytest.raises(ValueError, match="one of 'Acrobot-v1'.*'CartPole-v1'.*, got 'CartPole'"):
        envs.from_gymnax("CartPole")
    with pytest.raises(ValueError, match="env_or_name: expected a name or a gymnax.*LogWrapper"):
        envs.from_gymnax(purerl.LogWrapper(gymnax.make("CartPole-v1")[0]))
    with pytest.raises(ValueError, match="expected observations that are one integer.*Dict"):
        envs.from_gymnax(Two())
    with pytest.raises(ValueError, match="expected actions .* got int32 of shape \\(2,\\)"):
        envs.from_gymnax(Several())


def test_brax_steps_are_its_own():
    """Beside brax's own wrapper that counts steps and tells truncation apart."""
    library = pytest.importorskip("brax.envs")
    name, limit = "inverted_pendulum", 5
    other = library.training.EpisodeWrapper(library.get_environment(name), limit, 1)
    env = envs.from_brax(name, max_steps=limit)
    their_reset, their_step = jax.jit(other.reset), jax.jit(other.step)
    reset, step = jax.jit(env.reset), jax.jit(env.step)
    key = jax.random.PRNGKey(0)
    theirs, (state, observation) = their_reset(key), reset(key)
    near(observation, theirs.obs)
    actions = random_actions(env, jax.random.key(1), 100)
    ends = np.zeros(2, int)
    for t, action in enumerate(actions):
        theirs, found = their_step(theirs, action), step(key, state, action)
        near(found.observation, theirs.obs)
        near(found.reward, theirs.reward)
        assert bool(found.terminated | found.truncated) == bool(theirs.done)
        assert bool(found.truncated) == bool(theirs.info["truncation"])
        ends += [bool(found.terminated), bool(found.truncated)]
        state = found.state
        if theirs.done:
            key = jax.random.PRNGKey(t)
            theirs, (state, _) = their_reset(key), reset(key)
    assert np.all(ends >= 1), ends
    assert (env.observation.shape, env.action) == ((4,), envs.Box((1,), -1.0, 1.0))


def test_brax_limits_and_purity():
    library = pytest.importorskip("brax.envs")
    env = envs.from_brax("fast")

    def act(key, observation):
        return sampling.Decision(random_actions(env, key, 2))

    @jax.jit
    def run(key):
        running = sampling.start_environments(env, key, 2)
        return sampling.unroll_environments(env, act, running, key, num_steps=1001)

    _, seen, episodes = run(jax.random.key(0))
    assert not np.any(seen.terminated)
    equal(np.flatnonzero(np.any(seen.truncated, axis=1)), [999])
    equal(episodes.lengths[999], [1000, 1000])
    equal(seen.observation[1000], np.zeros((2, 2)))
    assert np.all(seen.next_observation[999] != 0)
    assert (env.name, envs.from_brax(library.get_environment("fast")).name) == ("fast", "Fast")
    # The reacher writes its metrics into the state that it is given.
    reacher = envs.from_brax("reacher")
    shapes, _ = jax.eval_shape(reacher.reset, jax.random.key(0))
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    before = dict(state.state.metrics)
    jax.eval_shape(lambda action: reacher.step(jax.random.key(0), state, action), jnp.zeros(2))
    assert before
    assert all(state.state.metrics[name] is value for name, value in before.items())


def test_brax_of_what_kind():
    library = pytest.importorskip("brax.envs")
    with pytest.raises(ValueError, match="one of 'ant'.*'reacher'.*, got 'Ant-v4'"):
        envs.from_brax("Ant-v4")
    with pytest.raises(ValueError, match="expected a name or a brax.*, got a builtins.int"):
        envs.from_brax(3)
    with pytest.raises(ValueError, match="env_or_name: .*got one within AutoResetWrapper"):
        envs.from_brax(library.create("fast"))
    with pytest.raises(ValueError, match="env_or_name: .*got one within EpisodeWrapper"):
        envs.from_brax(library.create("fast", auto_reset=False))
    with pytest.raises(ValueError, match="expected observations .*'state': \\(2,\\)"):
        envs.from_brax(library.get_environment("fast", obs_mode="dict_state"))
    with pytest.raises(ValueError, match="max_steps"):
        envs.from_brax("fast", max_steps=0)


def by_fields(observation):
    """An observation of jumanji as one vector, by the names of its fields."""
    if hasattr(observation, "_fields"):
        return np.concatenate([by_fields(getattr(observation, f)) for f in observation._fields])
    return np.asarray(observation, np.float32).ravel()


@pytest.mark.parametrize("name", ["Snake-v1", "GraphColoring-v1", "Maze-v0"])
def test_jumanji_steps_are_its_own(name):
    jumanji = pytest.importorskip("jumanji")
    other, env = jumanji.make(name), envs.from_jumanji(name)
    their_reset, their_step = jax.jit(other.reset), jax.jit(other.step)
    reset, step = jax.jit(env.reset), jax.jit(env.step)
    key = jax.random.key(0)
    (theirs, timestep), (state, observation) = their_reset(key), reset(key)
    near(observation, by_fields(timestep.observation))
    ended = 0
    for t, action in enumerate(random_actions(env, jax.random.key(1), 100)):
        theirs, timestep = their_step(theirs, action)
        found = step(key, state, action)
        near(found.observation, by_fields(timestep.observation))
        near(found.reward, timestep.reward)
        assert bool(found.terminated) == bool(timestep.last() & (timestep.discount == 0))
        assert not found.truncated
        low, high = env.observation.low, env.observation.high
        assert np.all((found.observation >= low) & (found.observation <= high))
        ended += bool(found.terminated)
        state = found.state
        if timestep.last():
            key = jax.random.key(t)
            (theirs, timestep), (state, _) = their_reset(key), reset(key)
    assert ended or name == "Maze-v0"


def counting(jumanji, several):
    """Terminates by action 1; is cut off after 3 steps; shows its steps, alone or as a board."""
    from jumanji import specs, types

    class Counting(jumanji.Environment):
        @functools.cached_property
        def observation_spec(self):
            if several:
                return specs.BoundedArray((2, 2), jnp.int32, 0, 3, "board")
            return specs.DiscreteArray(4, name="steps")

        @functools.cached_property
        def action_spec(self):
            return specs.DiscreteArray(2, name="action")

        def seen(self, steps):
            return jnp.full((2, 2), steps) if several else steps

        def reset(self, key):
            return jnp.int32(0), types.restart(self.seen(jnp.int32(0)))

        def step(self, state, action):
            state = state + 1
            reward = 1.0 * state
            kinds = [types.transition, types.truncation, types.termination]
            which = jnp.where(action == 1, 2, jnp.where(state >= 3, 1, 0))
            return state, jax.lax.switch(which, kinds, reward, self.seen(state))

    return Counting()


@pytest.mark.parametrize("several", [True, False])
def test_jumanji_ends(several):
    """The discount of the last step tells a termination from a truncation."""
    jumanji = pytest.importorskip("jumanji")
    env = envs.from_jumanji(counting(jumanji, several))
    wanted = envs.Box((2, 2), 0.0, 3.0) if several else envs.Discrete(4)
    assert (env.observation, env.action, env.name) == (wanted, envs.Discrete(2), "Counting")
    key = jax.random.key(0)
    state, observation = env.reset(key)
    assert observation.dtype == (jnp.float32 if several else jnp.int32)
    for steps in (1, 2, 3):
        over = env.step(key, state, jnp.int32(1))
        assert bool(over.terminated) and not over.truncated
        found = env.step(key, state, jnp.int32(0))
        assert not found.terminated and bool(found.truncated) == (steps == 3)
        assert np.all(found.observation == steps) and found.reward == steps
        state = found.state


def test_jumanji_limits_are_terminations():
    jumanji = pytest.importorskip("jumanji")
    env = envs.from_jumanji(jumanji.environments.Maze(time_limit=4))
    step, key = jax.jit(env.step), jax.random.key(0)
    state, _ = env.reset(key)
    for t in range(4):
        found = step(key, state, jnp.int32(t % 4))
        state = found.state
        assert bool(found.terminated) == (t == 3) and not found.truncated


def test_jumanji_of_what_kind():
    jumanji = pytest.importorskip("jumanji")
    from jumanji import wrappers

    with pytest.raises(ValueError, match="one of 'BinPack-v2'.*'Snake-v1'.*, got 'Snake'"):
        envs.from_jumanji("Snake")
    with pytest.raises(ValueError, match="expected a name or a jumanji.*, got a builtins.dict"):
        envs.from_jumanji({})
    for wrapper in (wrappers.AutoResetWrapper, wrappers.VmapWrapper, wrappers.VmapAutoResetWrapper):
        with pytest.raises(ValueError, match=f"got one within {wrapper.__name__}"):
            envs.from_jumanji(wrapper(jumanji.make("Maze-v0")))
    with pytest.raises(ValueError, match="expected actions .* got int32 of shape \\(2,\\)"):
        envs.from_jumanji("Minesweeper-v0")
    with pytest.raises(ValueError, match="expected one reward .* \\(2,\\).*MultiToSingleWrapper"):
        envs.from_jumanji("SearchAndRescue-v0")
    single = wrappers.MultiToSingleWrapper(jumanji.make("SearchAndRescue-v0"))
    assert envs.from_jumanji(single).action.shape == (2, 2)


@pytest.mark.parametrize("name", ["Navix-LavaGapS5-v0", "Navix-Dynamic-Obstacles-5x5-v0"])
def test_navix_steps_are_its_own(name):
    """Beside navix's steps; where it spends one on a reset, here a reset with its key."""
    navix = pytest.importorskip("navix")
    other = navix.make(name, max_steps=12)
    env = envs.from_navix(other)
    their_step, step, reset = jax.jit(other.step), jax.jit(env.step), jax.jit(env.reset)
    key = jax.random.key(0)
    theirs, (state, observation) = jax.jit(other.reset)(key), reset(key)
    equal(observation, theirs.observation)
    ends = np.zeros(2, int)
    for action in random_actions(env, jax.random.key(1), 100):
        theirs, found = their_step(theirs, action), step(key, state, action)
        equal(found.observation, theirs.observation)
        near(found.reward, theirs.reward)
        assert bool(found.terminated) == (theirs.step_type == 2)
        assert bool(found.truncated) == (theirs.step_type == 1)
        assert found.observation.dtype == found.reward.dtype == jnp.float32
        ends += [bool(found.terminated), bool(found.truncated)]
        state = found.state
        if theirs.step_type > 0:
            state, observation = reset(theirs.state.key)
            theirs = their_step(theirs, action)
            assert theirs.t == 0 and theirs.reward == 0
            equal(observation, theirs.observation)
    assert np.all(ends >= 1), ends


def test_navix_spaces_and_steps_without_resets():
    navix = pytest.importorskip("navix")
    env = envs.from_navix("Navix-Empty-5x5-v0")
    assert (env.observation.shape, env.action) == ((5, 5, 3), envs.Discrete(7))
    assert env.name == "Navix-Empty-5x5-v0"
    nothing = navix.make("Navix-Empty-5x5-v0", observation_fn=navix.observations.none)
    assert envs.from_navix(nothing).observation == envs.Box((), 0.0, 0.0)
    # Under vmap, navix's own step does a reset as well and selects; here there is none to do.
    inner = navix.make("Navix-Empty-5x5-v0")
    keys, actions = jax.random.split(jax.random.key(0), 8), jnp.zeros(8, jnp.int32)
    timesteps, _ = jax.eval_shape(jax.vmap(env.reset), keys)

    def cost(step, *arguments):
        return jax.jit(jax.vmap(step)).lower(*arguments).compile().cost_analysis()["flops"]

    assert cost(env.step, keys, timesteps, actions) < 0.8 * cost(inner.step, timesteps, actions)


def test_navix_of_what_kind():
    navix = pytest.importorskip("navix")
    with pytest.raises(ValueError, match="one of .*'Navix-Empty-5x5-v0'.*, got 'Empty'"):
        envs.from_navix("Empty")
    with pytest.raises(ValueError, match="expected a name or a navix.*, got a builtins.NoneType"):
        envs.from_navix(None)
    several = navix.spaces.Discrete.create(3, shape=(2,))
    with pytest.raises(ValueError, match="expected actions .* got int32 of shape \\(2,\\)"):
        envs.from_navix(navix.make("Navix-Empty-5x5-v0", action_space=several))


@pytest.mark.parametrize("name", ["gymnax", "brax", "jumanji", "navix"])
def test_missing_packages(name, monkeypatch):
    for module in (name, "brax.envs"):
        monkeypatch.setitem(sys.modules, module, None)
    extra = "envs" if name == "gymnax" else name
    with pytest.raises(ImportError, match=f"from_{name} needs {name}: .*'pgjax\\[{extra}\\]'"):
        getattr(envs, f"from_{name}")("x")
