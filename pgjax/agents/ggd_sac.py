"""Soft actor-critic whose critics are ensembles, trained by generalised Gaussian errors.

Source: Kim et al. 2024 (GGD-TD), arXiv 2408.02295.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pgjax import _checks
from pgjax.agents.agent import Agent, Metrics
from pgjax.agents.networks import Network, unit_actions, vector_size
from pgjax.agents.sac import Judge, sac
from pgjax.envs.core import Environment
from pgjax.models import mlp
from pgjax.uncertainty.biv import ggd_td_losses


def ggd_critics(
    env: Environment,
    *,
    num: int = 2,
    members: int = 5,
    hidden: Sequence[int] = (256, 256),
    activation: Callable[[Any], Any] = jax.nn.relu,
) -> Network:
    """Critics of several heads: `(params, observation, action) -> (Q, β)`, `[num, ..., M]` each.

    The heads of a critic share its hidden layers; β = softplus of a head of its own, for each Q.

    Raises:
      ValueError: observations that are not vectors, actions outside [-1, 1], a `num` below 1, fewer
        than four members.
    """
    _checks.in_range("num", num, 1)
    _checks.in_range("members", members, 4)
    sizes = (vector_size(env) + unit_actions(env), *hidden, 2 * members)

    def apply(params: Any, observation: Array, action: Array) -> tuple[Array, Array]:
        both = jnp.concatenate([observation, action], axis=-1)
        found = jax.vmap(lambda one: mlp.apply(one, both, activation=activation))(params)
        return found[..., :members], jax.nn.softplus(found[..., members:])

    return Network(
        init=lambda key: jax.vmap(lambda key: mlp.init(key, sizes))(jax.random.split(key, num)),
        apply=apply,
    )


def ggd_judge(*, epistemic_weight: float = 0.1, min_effective: int = 16) -> Judge:
    """Each member's lower value for its own target, their mean for the policy, GGD-TD's loss.

    Args:
      epistemic_weight: λ ≥ 0, of the errors weighed by inverse variances.
      min_effective: least effective batch size of these weights.

    Raises:
      ValueError: λ below 0.
    """
    _checks.in_range("epistemic_weight", epistemic_weight, 0.0)

    def loss(found: tuple[Array, Array], target: Array) -> tuple[Array, Metrics]:
        losses = [
            ggd_td_losses(
                target - q,
                shape,
                epistemic_weight=epistemic_weight,
                min_effective=min_effective,
            ).mean()
            for q, shape in zip(*found, strict=True)
        ]
        return 0.5 * jnp.stack(losses).sum(), {"shape": found[1].mean()}

    return Judge(
        lower=lambda found: found[0].min(0), value=lambda found: found[0].mean(-1).min(0), loss=loss
    )


def ggd_sac(
    env: Environment,
    policy: Network | None = None,
    critic: Network | None = None,
    *,
    epistemic_weight: float = 0.1,
    min_effective: int = 16,
    **options: Any,
) -> Agent:
    """SAC with y_m = r + γ(1 - terminated)(min_i Q'_im(s', a') - α log π(a'|s')) for each member m.

    L_Q = Σ_i mean `uncertainty.ggd_td_losses`(y - Q_i, β_i) / 2; the policy descends
    mean[α log π(a|s) - min_i mean_m Q_im(s, a)]; all else is `sac`.

    Args:
      env: the world, with actions in [-1, 1] (`envs.with_scaled_actions`); observations must be
        vectors where a network is None.
      policy: as in `sac`.
      critic: `(params, observation, action) -> (Q, β)`, both `[2, ..., M]`; None:
        `ggd_critics(env)`.
      epistemic_weight, min_effective: as in `ggd_judge`.
      **options: as in `sac`.

    Returns:
      the agent. Metrics: those of `sac`, and `shape`, the mean β.

    Raises:
      ValueError: as `sac` and `ggd_judge`.

    Source: Kim et al. 2024 (GGD-TD), arXiv 2408.02295.
    """
    return sac(
        env,
        policy,
        ggd_critics(env) if critic is None else critic,
        judge=ggd_judge(epistemic_weight=epistemic_weight, min_effective=min_effective),
        **options,
    )
