"""Control from pixels, with features that are learnt from what sequences of actions lead to.

Source: Zheng et al. 2023 (TACO), arXiv 2306.13229, on DrQ-v2, Yarats et al. 2021, arXiv 2107.09645.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from pgjax import _checks, aggregate, returns, values
from pgjax.agents import off_policy
from pgjax.agents.agent import Agent, Metrics
from pgjax.agents.networks import unit_actions
from pgjax.agents.off_policy import Learner
from pgjax.contrastive.taco import TacoOutputs, taco_losses
from pgjax.envs.core import Box, Environment
from pgjax.models import mlp, pixels
from pgjax.models import taco as networks
from pgjax.sampling import replay
from pgjax.types import Transition


def taco(
    env: Environment,
    *,
    length: int = 3,
    temporal_weight: float = 1.0,
    view_weight: float = 1.0,
    reward_weight: float = 1.0,
    channels: int = 32,
    strides: Sequence[int] = (2, 1, 1, 1),
    feature_size: int = 50,
    hidden: int = 1024,
    pad: int = 4,
    optimizer: optax.GradientTransformation | None = None,
    num_envs: int = 1,
    num_steps: int = 2,
    gradient_steps: int = 1,
    batch_size: int = 1024,
    capacity: int = 100_000,
    start_steps: int = 2_000,
    discount: float = 0.99,
    tau: float = 0.01,
    noise: tuple[float, float] = (1.0, 0.1),
    noise_steps: int = 100_000,
    target_noise_clip: float = 0.3,
    learning_rate: float = 1e-4,
) -> Agent:
    """DrQ-v2 on shifted images, with TACO's losses on its encoder and its actions' codes.

    With e the encoder, y = Σ_{k<K} γ^k r_{t+k} + γ^K (1 - terminated) min_i Q'_i(e(s'), c(a')),
    a' = clip(μ(s') + clip(ε, ±c)), L_Q = Σ_i mean (Q_i - y)² / 2 trains critics, encoder and codes;
    L_μ = -mean min_i Q_i(sg e(s), c(a)) the policy; then a step of the weighted sum of
    `contrastive.taco_losses`, by its own Adam, trains encoder, codes and heads. All weights 0 are
    DrQ-v2, with codes of its actions; `view_weight` alone is CURL's loss on it.

    Args:
      env: the world, with images uint8 `[H, H, C]` and actions in [-1, 1].
      length: K ≥ 1 actions of a sequence, and steps of the return.
      temporal_weight, view_weight, reward_weight: of the three losses, ≥ 0.
      channels, strides: of the convolutions, `models.pixels`.
      feature_size: of the state's code.
      hidden: width of all multilayer perceptrons.
      pad: pixels that an image is shifted by at most.
      optimizer: of each part; None: Adam.
      num_envs, num_steps, gradient_steps, batch_size, capacity, start_steps: as
        `off_policy.agent`; `num_envs` divides `capacity`.
      discount: γ in [0, 1].
      tau: of the critics' averaged copy, in (0, 1].
      noise: standard deviation of exploration and of a' at the start and after `noise_steps`
        environment steps, linear in between.
      noise_steps: ≥ 1.
      target_noise_clip: c > 0.
      learning_rate: of the default optimizer.

    Returns:
      the agent. Metrics: `critic_loss`, `policy_loss`, `temporal_loss`, `view_loss`, `reward_loss`,
      and of the episodes that ended `return`, `length` and `episodes`.

    Raises:
      ValueError: a number out of range, images that are not square, actions outside [-1, 1].

    Source: Zheng et al. 2023 (TACO), arXiv 2306.13229. The return's steps and the sequence's are
    one number here, two in the authors' code; sequences over a truncation are left out as there.
    """
    weights = {
        "temporal_weight": temporal_weight,
        "view_weight": view_weight,
        "reward_weight": reward_weight,
    }
    for name, value in weights.items():
        _checks.in_range(name, value, 0.0)
    _checks.in_range("length", length, 1)
    _checks.in_range("discount", discount, 0.0, 1.0)
    _checks.in_range("tau", tau, 0.0, 1.0, low_open=True)
    _checks.in_range("noise_steps", noise_steps, 1)
    _checks.in_range("target_noise_clip", target_noise_clip, 0.0, low_open=True)
    size = unit_actions(env)
    shape = env.observation.shape if isinstance(env.observation, Box) else ()
    if len(shape) != 3:
        raise ValueError(f"env.observation: expected images [H, H, C], got {env.observation}")
    image = (shape[0], shape[1], shape[2])
    features = pixels.output_size(image, channels=channels, strides=strides)
    descent = optax.adam(learning_rate) if optimizer is None else optimizer
    # Weights that are only known inside a program may be anything.
    auxiliary = any(not isinstance(x, int | float) or x > 0 for x in weights.values())
    look = functools.partial(pixels.apply, strides=strides)
    shift = functools.partial(pixels.random_shift, pad=pad)

    def trunk(key: PRNGKeyArray, sizes: Sequence[int]) -> dict[str, Any]:
        below, above = jax.random.split(key)
        return {
            "state": networks.init_squashed(below, features, feature_size),
            "mlp": mlp.init(above, sizes),
        }

    def new(key: PRNGKeyArray) -> Learner:
        keys = jax.random.split(key, 6)
        joined = feature_size + networks.token_size(size)
        critic = trunk(keys[0], (joined, hidden, hidden, 1))
        twins = jax.vmap(lambda key: mlp.init(key, (joined, hidden, hidden, 1)))
        params = {
            "encoder": {
                "image": pixels.init(keys[1], image, channels=channels, strides=strides),
                "actions": networks.init_actions(keys[2], size, length=length),
            },
            "critic": {**critic, "mlp": twins(jax.random.split(keys[3], 2))},
            "actor": trunk(keys[4], (feature_size, hidden, hidden, size)),
            "heads": networks.init_heads(
                keys[5], features, size, length=length, feature_size=feature_size, hidden=hidden
            ),
        }
        opt_state = {name: descent.init(params[name]) for name in ("encoder", "critic", "actor")}
        opt_state["auxiliary"] = descent.init((params["encoder"], params["heads"]))
        return Learner(params, {"critic": params["critic"]}, opt_state, jnp.int32(0))

    def mean_action(actor: Any, seen: Array) -> Array:
        state = networks.squashed(actor["state"], seen)
        return jnp.tanh(mlp.apply(actor["mlp"], state, activation=jax.nn.relu))

    def judged(critic: Any, seen: Array, codes: Array) -> Float[Array, "2 B"]:
        both = jnp.concatenate([networks.squashed(critic["state"], seen), codes], axis=-1)
        return jax.vmap(lambda one: mlp.apply(one, both, activation=jax.nn.relu)[..., 0])(
            critic["mlp"]
        )

    def scale(steps: Array) -> Array:
        return jnp.interp(steps, jnp.array([0.0, noise_steps]), jnp.array(noise))

    def greedy(learner: Learner, observation: Any) -> Array:
        return mean_action(
            learner.params["actor"], look(learner.params["encoder"]["image"], observation)
        )

    def explore(learner: Learner, updates: Array, key: PRNGKeyArray, observation: Any) -> Array:
        width = scale(updates * num_envs * num_steps)
        return off_policy.with_noise(key, greedy(learner, observation), scale=width)

    def step(learner: Learner, key: PRNGKeyArray, batch: Any) -> tuple[Learner, Metrics]:
        sequences: Transition = batch[0]
        mask: Array = batch[1]
        params, states = dict(learner.params), dict(learner.opt_state)
        keys = jax.random.split(key, 7)
        first, last = sequences.observation[:, 0], sequences.next_observation[:, -1]
        width = scale(learner.taken * num_envs * num_steps / gradient_steps)
        fades = off_policy.discounts(sequences, discount)
        gained = returns.discounted(sequences.reward, fades)[:, 0]
        later = look(params["encoder"]["image"], shift(keys[0], last))
        action = off_policy.with_noise(
            keys[1], mean_action(params["actor"], later), scale=width, clip=target_noise_clip
        )
        codes = networks.token(params["encoder"]["actions"], action)
        following = judged(learner.targets["critic"], later, codes).min(0)
        target = values.one_step_targets(gained, following, fades.prod(1))
        shifted = shift(keys[2], first)

        def critic_loss(encoder: Any, critic: Any) -> Array:
            codes = networks.token(encoder["actions"], sequences.action[:, 0])
            found = judged(critic, look(encoder["image"], shifted), codes)
            errors = values.value_error(found, jnp.broadcast_to(target, found.shape))
            return aggregate.masked_mean(errors.sum(0), mask)

        def policy_loss(actor: Any, encoder: Any) -> Array:
            action = mean_action(actor, seen)
            noisy = off_policy.with_noise(keys[3], action, scale=width, clip=target_noise_clip)
            # The clip to [-1, 1] stops no gradient.
            action = action + jax.lax.stop_gradient(noisy - action)
            found = judged(params["critic"], seen, networks.token(encoder["actions"], action))
            return -aggregate.masked_mean(found.min(0), mask)

        def features_loss(parts: tuple[Any, Any]) -> tuple[Array, Metrics]:
            encoder, heads = parts

            def code(key: PRNGKeyArray, images: Array) -> Array:
                return networks.squashed(heads["state"], look(encoder["image"], shift(key, images)))

            state = code(keys[4], first)
            actions = networks.sequence_code(encoder["actions"], sequences.action)
            outputs = TacoOutputs(
                state=state,
                other_view=code(keys[5], first),
                predicted=networks.joint(heads["next"], state, actions),
                following=code(keys[6], last),
                reward=networks.joint(heads["reward"], state, actions)[:, 0],
            )
            rows = taco_losses(outputs, gained, heads["weight"], mask=mask)
            found = jax.tree.map(lambda x: aggregate.masked_mean(x, mask), rows)
            whole = temporal_weight * found.temporal + view_weight * found.view
            return whole + reward_weight * found.reward, {
                "temporal_loss": found.temporal,
                "view_loss": found.view,
                "reward_loss": found.reward,
            }

        def descend(name: str, grads: Any, was: Any) -> Any:
            changed, states[name] = off_policy.descend(descent, grads, states[name], was)
            return changed

        seen = look(params["encoder"]["image"], shifted)
        error, grads = jax.value_and_grad(critic_loss, argnums=(0, 1))(
            params["encoder"], params["critic"]
        )
        for name, grad in zip(("encoder", "critic"), grads, strict=True):
            params[name] = descend(name, grad, params[name])
        policy_error, grad = jax.value_and_grad(policy_loss)(params["actor"], params["encoder"])
        params["actor"] = descend("actor", grad, params["actor"])
        metrics = {"critic_loss": error, "policy_loss": policy_error}
        if auxiliary:
            parts = params["encoder"], params["heads"]
            (_, more), grads = jax.value_and_grad(features_loss, has_aux=True)(parts)
            params["encoder"], params["heads"] = descend("auxiliary", grads, parts)
            metrics |= more
        copies = optax.incremental_update(params["critic"], learner.targets["critic"], tau)
        return Learner(params, {"critic": copies}, states, learner.taken + 1), metrics

    return off_policy.agent(
        env,
        new=new,
        explore=explore,
        step=step,
        greedy=greedy,
        num_envs=num_envs,
        num_steps=num_steps,
        gradient_steps=gradient_steps,
        batch_size=batch_size,
        capacity=capacity,
        start_steps=start_steps,
        sample=functools.partial(
            replay.sample_sequences,
            batch_size=batch_size,
            length=length,
            ended=lambda items: items.terminated | items.truncated,
            stride=num_envs,
        ),
    )
