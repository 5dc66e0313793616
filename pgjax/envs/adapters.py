"""Environments of gymnax, brax, jumanji and navix as `Environment`.

The libraries reset by themselves, each in its own way, and part of what an episode ended with is
lost on it: the last observation, or whether the end was a time limit. Here each of them takes its
raw step, of one environment, and says which end it was; `step_or_reset` does the rest. Observations
and rewards that are integers or booleans become f32, except one integer of a `Discrete`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from pgjax.envs import _adapting
from pgjax.envs.core import Box, Discrete, Environment, Step, with_time_limit


def from_gymnax(env_or_name: Any, params: Any = None) -> Environment:
    """An environment of gymnax, from its `step_env`.

    The state is gymnax's own. An episode is truncated where `env.is_truncated` says so, at
    `params.max_steps_in_episode` steps unless an environment has its own rule, and it has not
    terminated.

    gymnax lets no gradient through a transition, only through its reward, unless it is asked to:
    `from_gymnax(gymnax.make("Pendulum-v1")[0].with_transition_gradients())`, for the environments
    that can.

    Args:
      env_or_name: a gymnax `Environment`, or the name of a registered one.
      params: its parameters; the environment's default ones where None. Numbers in them may be
        traced: `jax.vmap` over some makes a family of environments.

    Raises:
      ImportError: gymnax is missing.
      ValueError: an unknown name, something else than an environment of gymnax (its wrappers, which
        reset, among them), observations or actions that are neither one integer nor one array of
        numbers.

    Source: Lange 2022, gymnax 1.0.
    """
    gymnax = _adapting.imported(
        "gymnax",
        "pip install 'pgjax[envs]', or on Python 3.12 and later, where that leaves it out because "
        "it needs jax below 0.12, pip install gymnax",
    )
    spaces = importlib.import_module("gymnax.environments.spaces")
    base = importlib.import_module("gymnax.environments.environment")
    inner = _adapting.resolved(
        env_or_name, base.Environment, gymnax.registered_envs, lambda name: gymnax.make(name)[0]
    )
    settings = inner.default_params if params is None else params

    def kind(of: str, space: Any) -> Discrete | Box:
        if isinstance(space, spaces.Discrete):
            return Discrete(int(space.n))
        if not isinstance(space, spaces.Box):
            raise _adapting.wrong_space(of, space)
        return _adapting.box(of, space.shape, space.dtype, space.low, space.high)

    # Bounds are numbers also where this is called while something else is traced.
    with jax.ensure_compile_time_eval():
        observations = kind("observations", inner.observation_space(settings))
        actions = kind("actions", inner.action_space(settings))
    read = _adapting.reader(observations)

    def reset(key: PRNGKeyArray) -> tuple[Any, Any]:
        observation, state = inner.reset(key, settings)
        return state, read(observation)

    def step(key: PRNGKeyArray, state: Any, action: Any) -> Step:
        observation, state, reward, terminated, _ = inner.step_env(key, state, action, settings)
        truncated = inner.is_truncated(state, settings)
        return _adapting.step(state, read(observation), reward, terminated, truncated)

    return Environment(reset, step, observations, actions, _adapting.label(env_or_name, inner.name))


def from_brax(env_or_name: Any, *, max_steps: int = 1000) -> Environment:
    """An environment of brax, without its wrappers; `done` is a termination.

    The state is brax's own within `with_time_limit`. A step draws nothing: its key is not used.

    Args:
      env_or_name: a brax `Env`, or the name of a registered one with its default physics.
      max_steps: after which an episode is truncated; brax trains with 1000.

    Raises:
      ImportError: brax is missing.
      ValueError: an unknown name, something else than a brax `Env`, one whose wrappers reset,
        batch or count steps (what `brax.envs.create` makes; `get_environment` adds none), a dict of
        observations, a `max_steps` below 1.

    Source: Freeman et al. 2021 (2106.13281), brax 0.14.
    """
    envs = _adapting.imported("brax.envs", "pip install 'pgjax[brax]'")
    # brax has no public list of its names.
    inner = _adapting.resolved(env_or_name, envs.Env, envs._envs, envs.get_environment)
    training = envs.training
    _adapting.unwrapped(
        inner,
        "env",
        (
            training.AutoResetWrapper,
            training.EpisodeWrapper,
            training.VmapWrapper,
            training.DomainRandomizationVmapWrapper,
        ),
    )
    seen = jax.eval_shape(inner.reset, jax.random.key(0)).obs
    if not hasattr(seen, "shape"):
        raise _adapting.wrong_space("observations", jax.tree.map(lambda leaf: leaf.shape, seen))

    def reset(key: PRNGKeyArray) -> tuple[Any, Any]:
        state = inner.reset(key)
        return state, _adapting.real(state.obs)

    def step(key: PRNGKeyArray, state: Any, action: Any) -> Step:
        # brax writes metrics into the dicts of the state that it is given.
        state = inner.step(jax.tree.map(lambda leaf: leaf, state), action)
        return _adapting.step(state, _adapting.real(state.obs), state.reward, state.done, False)

    env = Environment(
        reset,
        step,
        Box(seen.shape),
        Box((inner.action_size,), -1.0, 1.0),
        _adapting.label(env_or_name, type(inner.unwrapped).__name__),
    )
    return with_time_limit(env, max_steps)


def from_jumanji(env_or_name: Any) -> Environment:
    """An environment of jumanji with one agent.

    A last step with discount 0 is a termination, with a larger discount a truncation. jumanji's own
    of one agent give discount 0 at their time limits as well, which are then part of the task; most
    of those with a limit show the step count.

    An observation that is one array keeps its shape. One of several arrays, as nearly all are,
    becomes one f32 vector: each array made flat, in the order of `jax.tree.leaves`, with categories
    as their numbers and masks as 0 and 1. The state is jumanji's own and holds the key of what a
    step draws: the step's key is not used.

    Args:
      env_or_name: a jumanji `Environment`, or the name of a registered one.

    Raises:
      ImportError: jumanji is missing.
      ValueError: an unknown name, something else than a jumanji `Environment`, one whose wrappers
        reset or batch, actions of several integers, a reward or a discount for each of many agents
        (`jumanji.wrappers.MultiToSingleWrapper` makes one of them).

    Source: Bonnet et al. 2023 (2306.09884), jumanji 1.1.
    """
    jumanji = _adapting.imported("jumanji", "pip install 'pgjax[jumanji]'")
    specs, wrappers = (importlib.import_module(f"jumanji.{m}") for m in ("specs", "wrappers"))
    inner = _adapting.resolved(
        env_or_name, jumanji.Environment, jumanji.registered_environments(), jumanji.make
    )
    _adapting.unwrapped(inner, "_env", (wrappers.AutoResetWrapper, wrappers.VmapWrapper))
    for name in ("reward_spec", "discount_spec"):
        if shape := getattr(inner, name).shape:
            raise ValueError(
                f"env_or_name: expected one reward and one discount a step, got a {name} of shape "
                f"{shape}; see jumanji.wrappers.MultiToSingleWrapper"
            )

    def kind(of: str, spec: Any) -> Discrete | Box:
        if isinstance(spec, specs.DiscreteArray):
            return Discrete(int(spec.num_values))
        if not isinstance(spec, specs.Array):
            raise _adapting.wrong_space(of, spec)
        return _adapting.box(of, spec.shape, spec.dtype, *_limits(spec))

    actions = kind("actions", inner.action_spec)
    seen = jax.eval_shape(inner.reset, jax.random.key(0))[1].observation
    observations: Discrete | Box
    read: Callable[[Any], Array]
    if not isinstance(inner.observation_spec, specs.Array):
        # A spec's own order is not always that of the observation's fields.
        found, _ = jax.tree_util.tree_flatten_with_path(seen)
        bounds = [
            [np.broadcast_to(np.asarray(b, np.float32), leaf.shape).ravel() for b in _limits(spec)]
            for path, leaf in found
            for spec in [functools.reduce(_child, path, inner.observation_spec)]
        ]
        low, high = (np.concatenate(side) for side in zip(*bounds, strict=True))
        observations, read = Box(low.shape, low, high), _flat
    else:
        observations = kind("observations", inner.observation_spec)
        read = _adapting.reader(observations)

    def reset(key: PRNGKeyArray) -> tuple[Any, Any]:
        state, timestep = inner.reset(key)
        return state, read(timestep.observation)

    def step(key: PRNGKeyArray, state: Any, action: Any) -> Step:
        state, timestep = inner.step(state, action)
        last, goes_on = timestep.last(), timestep.discount > 0
        observation = read(timestep.observation)
        return _adapting.step(state, observation, timestep.reward, last & ~goes_on, last & goes_on)

    label = _adapting.label(env_or_name, type(inner.unwrapped).__name__)
    return Environment(reset, step, observations, actions, label)


def from_navix(env_or_name: Any) -> Environment:
    """An environment of navix; its step types 2 and 1 are termination and truncation.

    navix resets an ended episode in the step after, whatever the action, and pays nothing for it.
    Here no step is spent on that. Episodes are truncated at the environment's own `max_steps`; a
    name takes what `navix.make` sets without being told. The state is navix's `Timestep`, which
    holds the key of what a step draws: the step's key is not used.

    Args:
      env_or_name: a navix `Environment`, or the name of a registered one.

    Raises:
      ImportError: navix is missing.
      ValueError: an unknown name, something else than a navix `Environment`, actions of several
        integers.

    Source: Pignatelli et al. 2024 (2407.19396), navix 0.7.
    """
    navix = _adapting.imported("navix", "pip install 'pgjax[navix]'")
    inner = _adapting.resolved(env_or_name, navix.Environment, navix.registry(), navix.make)

    def kind(of: str, space: Any) -> Discrete | Box:
        if isinstance(space, navix.spaces.Discrete) and not space.shape:
            return Discrete(int(space.n))
        return _adapting.box(of, space.shape, space.dtype, space.minimum, space.maximum)

    observations = kind("observations", inner.observation_space)
    actions = kind("actions", inner.action_space)
    read = _adapting.reader(observations)

    def reset(key: PRNGKeyArray) -> tuple[Any, Any]:
        timestep = inner.reset(key)
        return timestep, read(timestep.observation)

    def step(key: PRNGKeyArray, timestep: Any, action: Any) -> Step:
        # navix resets by this mark alone; a constant one leaves no reset in the program.
        running = timestep.replace(step_type=jnp.zeros_like(timestep.step_type))
        found = inner.step(running, action)
        return _adapting.step(
            found,
            read(found.observation),
            found.reward,
            found.step_type == navix.StepType.TERMINATION,
            found.step_type == navix.StepType.TRUNCATION,
        )

    label = _adapting.label(env_or_name, type(inner).__name__)
    return Environment(reset, step, observations, actions, label)


def _child(spec: Any, key: Any) -> Any:
    return spec[key.name if hasattr(key, "name") else key.key]


def _limits(spec: Any) -> tuple[Any, Any]:
    return getattr(spec, "minimum", -np.inf), getattr(spec, "maximum", np.inf)


def _flat(observation: Any) -> Array:
    leaves = jax.tree.leaves(observation)
    return jnp.concatenate([_adapting.real(leaf).reshape(-1) for leaf in leaves])
