"""Training on problems that can be enumerated, all seeds and steps in one compiled program."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

import pgjax as pg
from pgjax.diagnostics import problems


def learn(
    problem: problems.TokenProblem,
    objective: pg.Objective,
    optimizer: optax.GradientTransformation,
    *,
    init: Callable[[PRNGKeyArray], Any],
    measure: Callable[[Any], dict[str, Array]],
    group_size: int,
    steps: int,
    seeds: int,
    every: int = 1,
    fixed_reference: bool = False,
    first_seed: int = 0,
    **update_options: Any,
) -> dict[str, Float[np.ndarray, "S K"]]:
    """Curves of each measured number over training, one row a seed.

    Args:
      problem: what is learnt.
      objective: with which loss.
      optimizer: with which steps.
      init: parameters of a seed.
      measure: numbers of a policy, exact where that is possible.
      group_size: samples per prompt and step.
      steps: batches; a multiple of `every`.
      seeds: S independent runs, seeds `first_seed`, `first_seed + 1`, ...
      every: steps between measurements.
      fixed_reference: the reference policy is the initial one; otherwise the current one.
      first_seed: of the runs.
      **update_options: of `train.make_update`.

    Returns:
      for each name that `measure` gives, and for each metric of the update, `[S, K]` with
      K = steps / every; measured before the first and metrics of the last step of every interval.
      `"final/..."` `[S]` are measured after the last step.
    """
    run = _one_run(
        problem,
        objective,
        init=init,
        measure=measure,
        group_size=group_size,
        steps=steps,
        every=every,
        fixed_reference=fixed_reference,
        **update_options,
    )
    keys = jax.vmap(jax.random.key)(np.arange(first_seed, first_seed + seeds))
    found = jax.jit(jax.vmap(functools.partial(run, optimizer)))(keys)
    return {name: np.asarray(x) for name, x in found.items()}


def learn_at_rates(
    problem: problems.TokenProblem,
    objective: pg.Objective,
    make_optimizer: Callable[[Float[Array, ""]], optax.GradientTransformation],
    *,
    rates: Sequence[float],
    seeds: int,
    first_seed: int = 0,
    **options: Any,
) -> dict[str, Float[np.ndarray, "R S K"]]:
    """`learn` with each of several learning rates, all in one program; curves by rate, then seed.

    Args:
      problem, objective, seeds, first_seed: as in `learn`.
      make_optimizer: from a learning rate, such as `optax.sgd`.
      rates: R learning rates.
      **options: the others of `learn`.
    """
    run = _one_run(problem, objective, **options)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    @functools.partial(jax.vmap, in_axes=(None, 0))
    def all_runs(rate: Array, key: PRNGKeyArray) -> dict[str, Array]:
        return run(make_optimizer(rate), key)

    keys = jax.vmap(jax.random.key)(np.arange(first_seed, first_seed + seeds))
    return {name: np.asarray(x) for name, x in all_runs(jnp.array(rates), keys).items()}


def _one_run(
    problem: problems.TokenProblem,
    objective: pg.Objective,
    *,
    init: Callable[[PRNGKeyArray], Any],
    measure: Callable[[Any], dict[str, Array]],
    group_size: int,
    steps: int,
    every: int = 1,
    fixed_reference: bool = False,
    **update_options: Any,
) -> Callable[[optax.GradientTransformation, PRNGKeyArray], dict[str, Array]]:
    """The run of one seed with one optimizer."""
    if steps % every:
        raise ValueError(f"steps: expected a multiple of every={every}, got {steps}")
    outputs = functools.partial(problems.outputs, problem)

    def run(optimizer: optax.GradientTransformation, key: PRNGKeyArray) -> dict[str, Array]:
        update = pg.train.make_update(outputs, objective, optimizer, **update_options)
        init_key, key = jax.random.split(key)
        start = init(init_key)
        memory = None if objective.memory is None else objective.memory.init()
        state = pg.train.TrainState(
            params=start, opt_state=optimizer.init(start), step=jnp.int32(0), key=key, memory=memory
        )

        def step(state: Any, _: None) -> tuple[Any, Any]:
            rollout = problems.sample(
                problem,
                state.params,
                jax.random.fold_in(key, state.step),
                group_size=group_size,
                reference_params=start if fixed_reference else None,
            )
            return update(state, rollout)

        def interval(state: Any, _: None) -> tuple[Any, Any]:
            before = measure(state.params)
            state, metrics = jax.lax.scan(step, state, None, length=every)
            return state, {**jax.tree.map(lambda x: x[-1], metrics), **before}

        state, curves = jax.lax.scan(interval, state, None, length=steps // every)
        final = {f"final/{name}": x for name, x in measure(state.params).items()}
        return {**curves, **final}

    return run
