"""Policies of several experts in SAC and PPO: networks, and how routing to them is learnt.

```
policy = agents.expert_policy(env, num_experts=4)
agent = agents.sac(env, policy, actor=agents.best_expert())

net = agents.mixture_actor_critic(env, num_experts=5)
agent = agents.ppo(env, net, auxiliary=agents.expert_routing(net), entropy_coefficient=0.0)
```

Source: PMOE, Ren et al. 2021, arXiv 2104.09122, and its co-author's implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from pgjax import _checks, surrogates
from pgjax.agents.agent import Metrics
from pgjax.agents.networks import ActorCritic, Network, unit_actions, vector_size
from pgjax.agents.ppo import Auxiliary, Batch
from pgjax.agents.sac import Actor
from pgjax.envs.core import Box, Environment
from pgjax.models import mlp
from pgjax.policies import distributions, mixture

Value = Callable[[Array], Array]


def expert_policy(
    env: Environment,
    *,
    num_experts: int,
    hidden: Sequence[int] = (256, 256),
    activation: Callable[[Any], Any] = jax.nn.relu,
    log_std_range: tuple[float, float] = (-20.0, 2.0),
) -> Network:
    """A `policies.mixture.Mixture` of K tanh-Gaussians: one network of all experts, a linear gate.

    Of one expert it is `squashed_gaussian_policy`, with the same start. The gate sees the
    observation itself.

    Args:
      env: with vectors as observations, actions in [-1, 1].
      num_experts: K ≥ 1.
      hidden: sizes of the experts' hidden layers.
      activation: behind each of them.
      log_std_range: to which log standard deviations are cut off.

    Raises:
      ValueError: a K below 1, observations that are not vectors, actions outside [-1, 1].
    """
    _checks.in_range("num_experts", num_experts, 1)
    inputs, size = vector_size(env), unit_actions(env)
    sizes = (inputs, *hidden, num_experts * 2 * size)

    def init(key: PRNGKeyArray) -> dict[str, Any]:
        gate = mlp.init(jax.random.fold_in(key, 1), (inputs, num_experts), last_gain=0.01)
        return {"experts": mlp.init(key, sizes, last_gain=0.01), "gate": gate}

    def apply(params: Any, observation: Array) -> mixture.Mixture:
        found = mlp.apply(params["experts"], observation, activation=activation)
        found = found.reshape(*found.shape[:-1], num_experts, 2 * size)
        log_std = jnp.clip(found[..., size:], *log_std_range)
        gate = mlp.apply(params["gate"], observation)
        return mixture.Mixture(gate, found[..., :size], log_std)

    return Network(init, apply)


def best_expert() -> Actor:
    """PMOE in SAC: the expert whose action is valued most learns, and routing learns how often.

    L = α log p_k*(a_k*) - Q(s, a_k*) + mean_k (w_k - 1[k = k*])², k* = argmax_k Q(s, a_k), with one
    action a_k of each expert. It acts, and computes targets, by k ~ w and log p_k alone. Its mode
    is the most probable expert's mean; the authors' code takes that of a sampled one.

    With K = 1 it is SAC itself.
    """

    def loss(
        key: PRNGKeyArray, parameters: mixture.Mixture, value: Value, temperature: Array
    ) -> tuple[Array, Array]:
        actions, log_probs = mixture.sample_experts(key, parameters)
        found = _each(value, actions)
        weights = jax.nn.softmax(parameters.logits)
        policy = surrogates.best_expert_loss(log_probs, found, temperature)
        best = jnp.argmax(found, axis=-1)
        routing = surrogates.frequency_loss(weights, found).mean(-1)
        return policy + routing, mixture.take(log_probs, best)

    return Actor(_of_one_expert, loss, mixture.tanh_gaussian_mixture().mode)


def score_routed() -> Actor:
    """A mixture whose routing has the score-function gradient, to compare `best_expert` with.

    k ~ w, a ~ p_k, ℓ = α log π(a) - Q(s, a) with the mixture's π; L = ℓ + sg(ℓ - b) log w_k, where
    the baseline b is the batch's mean of ℓ, up to its own share 1/B.
    """

    def loss(
        key: PRNGKeyArray, parameters: mixture.Mixture, value: Value, temperature: Array
    ) -> tuple[Array, Array]:
        actions, _ = mixture.sample_experts(key, parameters)
        expert = mixture.route(mixture.routing_key(key), parameters.logits)
        action = mixture.take(actions, expert)
        log_prob = mixture.tanh_gaussian_mixture().log_prob(parameters, action)
        own = temperature * log_prob - value(action)
        chosen = distributions.categorical().log_prob(parameters.logits, expert)
        return own + jax.lax.stop_gradient(own - own.mean()) * chosen, log_prob

    return Actor(_of_mixture, loss, mixture.tanh_gaussian_mixture().mode)


def gumbel_routed(*, softness: float = 1.0) -> Actor:
    """A mixture routed by a straight-through Gumbel-softmax, to compare `best_expert` with.

    One expert acts, and the choice has the gradient of softmax((logits + Gumbel noise)/`softness`);
    L = α log π(a) - Q(s, a) with the mixture's π.

    Raises:
      ValueError: a `softness` of 0 or below.

    Source: Jang et al. 2016, arXiv 1611.01144; Maddison et al. 2016, arXiv 1611.00712.
    """
    _checks.in_range("softness", softness, 0.0, low_open=True)

    def loss(
        key: PRNGKeyArray, parameters: mixture.Mixture, value: Value, temperature: Array
    ) -> tuple[Array, Array]:
        actions, _ = mixture.sample_experts(key, parameters)
        noise = jax.random.gumbel(mixture.routing_key(key), parameters.logits.shape)
        noisy = parameters.logits + noise
        soft = jax.nn.softmax(noisy / softness)
        hard = jax.nn.one_hot(jnp.argmax(noisy, axis=-1), noisy.shape[-1])
        choice = hard + soft - jax.lax.stop_gradient(soft)
        action = (choice[..., None] * actions).sum(-2)
        log_prob = mixture.tanh_gaussian_mixture().log_prob(parameters, action)
        return temperature * log_prob - value(action), log_prob

    return Actor(_of_mixture, loss, mixture.tanh_gaussian_mixture().mode)


def _each(value: Value, actions: Array) -> Array:
    """Values of all experts' actions, `[B, K, D] -> [B, K]`."""
    return jax.vmap(value, in_axes=1, out_axes=1)(actions)


def _of_one_expert(key: PRNGKeyArray, parameters: mixture.Mixture) -> tuple[Array, Array]:
    actions, log_probs = mixture.sample_experts(key, parameters)
    expert = mixture.route(mixture.routing_key(key), parameters.logits)
    return mixture.take(actions, expert), mixture.take(log_probs, expert)


def _of_mixture(key: PRNGKeyArray, parameters: mixture.Mixture) -> tuple[Array, Array]:
    action, _ = _of_one_expert(key, parameters)
    return action, mixture.tanh_gaussian_mixture().log_prob(parameters, action)


def mixture_actor_critic(
    env: Environment,
    *,
    num_experts: int,
    hidden: Sequence[int] = (64, 64),
    activation: Callable[[Any], Any] = jnp.tanh,
    initial_log_std: float = 0.0,
) -> ActorCritic:
    """`actor_critic` with K Gaussian experts and a linear gate, and a value of actions beside it.

    Log standard deviations do not depend on the observation, each expert has its own. The value of
    an action, `params["action_critic"]`, is what `expert_routing` learns and judges experts by.

    Args:
      env: with vectors as observations and actions.
      num_experts: K ≥ 1.
      hidden: sizes of the hidden layers of each of the three networks.
      activation: behind each of them.
      initial_log_std: of all experts.

    Raises:
      ValueError: a K below 1, observations or actions that are not vectors.
    """
    _checks.in_range("num_experts", num_experts, 1)
    inputs, kind = vector_size(env), env.action
    if not isinstance(kind, Box) or len(kind.shape) != 1:
        raise ValueError(f"env.action: expected a vector, got {kind}")
    size = int(np.prod(kind.shape))

    def init(key: PRNGKeyArray) -> dict[str, Any]:
        actor_key, critic_key = jax.random.split(key)
        sizes = (inputs, *hidden, num_experts * size)
        actor = {
            "mlp": mlp.init(actor_key, sizes, last_gain=0.01),
            "gate": mlp.init(jax.random.fold_in(key, 2), (inputs, num_experts), last_gain=0.01),
            "log_std": jnp.full((num_experts, size), initial_log_std),
        }
        return {
            "actor": actor,
            "critic": mlp.init(critic_key, (inputs, *hidden, 1)),
            "action_critic": mlp.init(jax.random.fold_in(key, 3), (inputs + size, *hidden, 1)),
        }

    def actor(params: Any, observation: Array) -> mixture.Mixture:
        own = params["actor"]
        mean = mlp.apply(own["mlp"], observation, activation=activation)
        mean = mean.reshape(*mean.shape[:-1], num_experts, size)
        gate = mlp.apply(own["gate"], observation)
        return mixture.Mixture(gate, mean, jnp.broadcast_to(own["log_std"], mean.shape))

    def critic(params: Any, observation: Array) -> Array:
        return mlp.apply(params["critic"], observation, activation=activation)[..., 0]

    return ActorCritic(init, actor, critic, mixture.gaussian_mixture())


def expert_routing(net: ActorCritic, *, activation: Callable[[Any], Any] = jnp.tanh) -> Auxiliary:
    """PMOE's part in PPO: mean (w_k - 1[k = argmax_j Q(s, a_j)])² + mean (Q(s, a) - A - V)² / 2.

    One fresh action of each expert is judged; Q learns from the actions taken. Gradients of the
    first part reach the gate alone, those of the second Q alone; but a clip of the whole gradient's
    norm, PPO's default, sees both.

    Args:
      net: `mixture_actor_critic`.
      activation: of its networks.

    Returns:
      for `ppo(auxiliary=...)`; metrics `frequency_loss` and `action_value_loss`. The latter is
      halved, as all value errors here.
    """

    def judge(params: Any, observation: Array, action: Array) -> Array:
        both = jnp.concatenate([observation, action], axis=-1)
        return mlp.apply(params["action_critic"], both, activation=activation)[..., 0]

    def auxiliary(params: Any, part: Batch, key: PRNGKeyArray) -> tuple[Array, Metrics]:
        parameters = net.actor(params, part.observation)
        actions = distributions.gaussian().sample(key, (parameters.mean, parameters.log_std))
        found = _each(lambda action: judge(params, part.observation, action), actions)
        routing = surrogates.frequency_loss(jax.nn.softmax(parameters.logits), found).mean()
        value = judge(params, part.observation, part.action)
        error = surrogates.value_error(value, part.target).mean()
        return routing + error, {"frequency_loss": routing, "action_value_loss": error}

    return auxiliary
