"""PPO as its users write it in one file, and as they write it in torch: what ours is timed beside.

The first is the published algorithm on gymnax, distrax, Flax and Optax, training loop compiled
whole; the second collects with NumPy from vectorised environments and learns in torch; the third is
Stable-Baselines3's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


class Numbers(NamedTuple):
    """What both and ours are run with."""

    num_envs: int
    num_steps: int = 128
    epochs: int = 4
    minibatches: int = 4
    discount: float = 0.99
    gae_lambda: float = 0.95
    clip: float = 0.2
    entropy: float = 0.01
    value: float = 0.5
    max_norm: float = 0.5
    rate: float = 2.5e-4


def one_file_jax(numbers: Numbers) -> tuple[Any, Callable[[Any], Any]]:
    """A state, and a compiled update of it."""
    import distrax
    import flax.linen as nn
    import gymnax
    from flax.training.train_state import TrainState

    env, env_params = gymnax.make("CartPole-v1")
    n, steps = numbers.num_envs, numbers.num_steps

    def dense(size: int, scale: float) -> Any:
        return nn.Dense(size, kernel_init=nn.initializers.orthogonal(scale))

    class ActorCritic(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            a = nn.tanh(dense(64, 2**0.5)(x))
            a = nn.tanh(dense(64, 2**0.5)(a))
            v = nn.tanh(dense(64, 2**0.5)(x))
            v = nn.tanh(dense(64, 2**0.5)(v))
            return distrax.Categorical(logits=dense(2, 0.01)(a)), dense(1, 1.0)(v)[..., 0]

    network = ActorCritic()
    optimizer = optax.chain(
        optax.clip_by_global_norm(numbers.max_norm), optax.adam(numbers.rate, eps=1e-5)
    )
    key, reset_key = jax.random.split(jax.random.key(0))
    observation, env_state = jax.vmap(env.reset, in_axes=(0, None))(
        jax.random.split(reset_key, n), env_params
    )
    train_state = TrainState.create(
        apply_fn=network.apply, params=network.init(key, observation), tx=optimizer
    )

    def env_step(carry: Any, _: Any) -> Any:
        train_state, env_state, observation, key = carry
        key, act_key, step_key = jax.random.split(key, 3)
        policy, value = network.apply(train_state.params, observation)
        action, log_prob = policy.sample_and_log_prob(seed=act_key)
        following, env_state, reward, terminated, truncated, _ = jax.vmap(
            env.step, in_axes=(0, 0, 0, None)
        )(jax.random.split(step_key, n), env_state, action, env_params)
        seen = (observation, action, reward, terminated | truncated, value, log_prob)
        return (train_state, env_state, following, key), seen

    def advantages(seen: Any, last: Any) -> Any:
        _, _, reward, done, value, _ = seen

        def back(carry: Any, at: Any) -> Any:
            later, next_value = carry
            done, value, reward = at
            delta = reward + numbers.discount * next_value * (1 - done) - value
            later = delta + numbers.discount * numbers.gae_lambda * (1 - done) * later
            return (later, value), later

        start = (jnp.zeros_like(last), last)
        return jax.lax.scan(back, start, (done, value, reward), reverse=True, unroll=16)[1]

    def loss(params: Any, part: Any, advantage: Any, target: Any) -> Any:
        observation, action, _, _, old_value, old_log_prob = part
        policy, value = network.apply(params, observation)
        ratio = jnp.exp(policy.log_prob(action) - old_log_prob)
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        bounded = jnp.clip(ratio, 1 - numbers.clip, 1 + numbers.clip)
        actor = -jnp.minimum(ratio * advantage, bounded * advantage).mean()
        near = old_value + jnp.clip(value - old_value, -numbers.clip, numbers.clip)
        critic = 0.5 * jnp.maximum((value - target) ** 2, (near - target) ** 2).mean()
        return actor + numbers.value * critic - numbers.entropy * policy.entropy().mean()

    def minibatch(train_state: Any, part: Any) -> Any:
        grads = jax.grad(loss)(train_state.params, *part)
        return train_state.apply_gradients(grads=grads), None

    def epoch(carry: Any, _: Any) -> Any:
        train_state, whole, key = carry
        key, own = jax.random.split(key)
        order = jax.random.permutation(own, n * steps)
        parts = jax.tree.map(
            lambda x: x.reshape(n * steps, *x.shape[2:])[order].reshape(
                numbers.minibatches, -1, *x.shape[2:]
            ),
            whole,
        )
        train_state, _ = jax.lax.scan(minibatch, train_state, parts)
        return (train_state, whole, key), None

    @jax.jit
    def update(state: Any) -> Any:
        state, seen = jax.lax.scan(env_step, state, None, steps)
        train_state, env_state, observation, key = state
        _, last = network.apply(train_state.params, observation)
        advantage = advantages(seen, last)
        whole = (seen, advantage, advantage + seen[4])
        (train_state, _, key), _ = jax.lax.scan(
            epoch, (train_state, whole, key), None, numbers.epochs
        )
        return train_state, env_state, observation, key

    return (train_state, env_state, observation, key), update


def torch_and_numpy(numbers: Numbers) -> Callable[[], None]:
    """An update, called for its effect."""
    import gymnasium
    import torch
    from torch import nn

    n, steps = numbers.num_envs, numbers.num_steps
    envs = gymnasium.vector.SyncVectorEnv([lambda: gymnasium.make("CartPole-v1")] * n)

    def mlp(out: int) -> Any:
        return nn.Sequential(
            nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, out)
        )

    actor, critic = mlp(2), mlp(1)
    both = [*actor.parameters(), *critic.parameters()]
    adam = torch.optim.Adam(both, lr=numbers.rate, eps=1e-5)
    held = [torch.tensor(envs.reset(seed=0)[0])]
    rng = np.random.default_rng(0)

    def collect() -> Any:
        rows = []
        for _ in range(steps):
            with torch.no_grad():
                policy = torch.distributions.Categorical(logits=actor(held[0]))
                action = policy.sample()
                value, log_prob = critic(held[0])[:, 0], policy.log_prob(action)
            found: Any = envs.step(action.numpy())
            done = torch.tensor(found[2] | found[3], dtype=torch.float32)
            reward = torch.tensor(found[1], dtype=torch.float32)
            rows.append((held[0], action, reward, done, value, log_prob))
            held[0] = torch.tensor(found[0])
        return [torch.stack(x) for x in zip(*rows, strict=True)]

    def update() -> None:
        observation, action, reward, done, value, log_prob = collect()
        with torch.no_grad():
            next_value, later = critic(held[0])[:, 0], torch.zeros(n)
            advantage = torch.zeros(steps, n)
            for t in reversed(range(steps)):
                delta = reward[t] + numbers.discount * next_value * (1 - done[t]) - value[t]
                later = delta + numbers.discount * numbers.gae_lambda * (1 - done[t]) * later
                advantage[t], next_value = later, value[t]
        target = advantage + value
        flat = [
            x.reshape(n * steps, *x.shape[2:])
            for x in (observation, action, value, log_prob, advantage, target)
        ]
        for _ in range(numbers.epochs):
            for rows in np.array_split(rng.permutation(n * steps), numbers.minibatches):
                o, a, old, lp, adv, goal = (x[rows] for x in flat)
                policy = torch.distributions.Categorical(logits=actor(o))
                ratio = (policy.log_prob(a) - lp).exp()
                adv = (adv - adv.mean()) / (adv.std() + 1e-8)
                bounded = ratio.clamp(1 - numbers.clip, 1 + numbers.clip)
                now = critic(o)[:, 0]
                near = old + (now - old).clamp(-numbers.clip, numbers.clip)
                loss = -torch.minimum(ratio * adv, bounded * adv).mean()
                error = torch.maximum((now - goal) ** 2, (near - goal) ** 2).mean()
                loss = (
                    loss + numbers.value * 0.5 * error - numbers.entropy * policy.entropy().mean()
                )
                adam.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(both, numbers.max_norm)
                adam.step()

    return update


def stable_baselines(numbers: Numbers) -> Callable[[], None]:
    """An update, called for its effect; time limits are bootstrapped there too."""
    from stable_baselines3 import PPO
    from stable_baselines3.common import env_util

    size = numbers.num_envs * numbers.num_steps
    model = PPO(
        "MlpPolicy",
        env_util.make_vec_env("CartPole-v1", n_envs=numbers.num_envs, seed=0),
        n_steps=numbers.num_steps,
        batch_size=size // numbers.minibatches,
        n_epochs=numbers.epochs,
        gamma=numbers.discount,
        gae_lambda=numbers.gae_lambda,
        clip_range=numbers.clip,
        clip_range_vf=numbers.clip,
        ent_coef=numbers.entropy,
        vf_coef=numbers.value,
        max_grad_norm=numbers.max_norm,
        learning_rate=numbers.rate,
        device="cpu",
    )

    def update() -> None:
        model.learn(size, reset_num_timesteps=False)

    return update
