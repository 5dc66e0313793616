"""Environment steps per second of whole PPO training on CartPole, beside what one would write.

At 4, 256 and 4,096 environments, 128 steps, four epochs of four minibatches, two networks of 64 and
64: our agent beside the same algorithm in one file on gymnax, distrax, Flax and Optax, compiled as
a whole too, and beside torch with Gymnasium's vectorised environments and Stable-Baselines3 (where
they are installed). Ours also bootstraps from the last observation of episodes that were cut off,
as Stable-Baselines3 does and the others do not; beside the one file it is timed without and with.
Ratios are ours / theirs in time, below 1 faster. Beside the matrix products alone, in the same
blocks of rows, the ratio is above 1: what all else costs.

Three more rows are facts of the compiled programs: how often a run that goes on is compiled, what a
batch takes beside what its fields add up to, and the update's temporary memory beside the batch.
Exits with 1 where a ratio is above its limit.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments.benchmarks import control_peers, harness
from pgjax import agents, envs, sampling
from pgjax.agents import on_policy
from pgjax.envs import control

SIZES = {4: 20, 256: 5, 4096: 3}  # environments: timed runs
# What they need, an update of them, and the most of their time that ours may take at 4096.
PEERS: dict[str, tuple[tuple[str, ...], Any, float | None]] = {
    "torch and Gymnasium": (("torch", "gymnasium"), control_peers.torch_and_numpy, None),
    "Stable-Baselines3": (("stable_baselines3",), control_peers.stable_baselines, 1 / 20),
}


def ours(numbers: control_peers.Numbers, *, bootstrap: bool, updates: int) -> tuple[Any, Any]:
    """A state, and a compiled run of so many updates."""
    agent = agents.ppo(
        control.cart_pole(),
        num_envs=numbers.num_envs,
        num_steps=numbers.num_steps,
        num_epochs=numbers.epochs,
        num_minibatches=numbers.minibatches,
        learning_rate=numbers.rate,
        bootstrap_truncated=bootstrap,
    )
    train = jax.jit(functools.partial(agents.train, agent, num_updates=updates))
    return agent.init(jax.random.key(0)), lambda state: train(state)


def products(numbers: control_peers.Numbers) -> Callable[[], Any]:
    """The matrix products of one of our updates and nothing else, without bootstrapping."""
    sizes = (4, 64, 64)

    def outputs(matrices: Any, x: Array) -> Array:
        for matrix in matrices:
            x = x @ matrix
        return x

    def error(nets: Any, x: Array) -> tuple[Array, dict[str, Array]]:
        return sum((jnp.sum(outputs(net, x) ** 2) for net in nets), jnp.float32(0)), {}

    @jax.jit
    def run(nets: Any, seen: Array, part: Array) -> Any:
        def act(x: Array, _: None) -> tuple[Array, None]:
            actor, critic = (outputs(net, x) for net in nets)
            return x + 1e-9 * (actor[:, :1] + critic), None

        def learn(nets: Any, _: None) -> tuple[Any, None]:
            grads = on_policy.gradient_in_blocks(error, nets, part)[0]
            return jax.tree.map(lambda w, g: w - 1e-9 * g, nets, grads), None

        last, _ = jax.lax.scan(act, seen, None, numbers.num_steps)
        steps = numbers.epochs * numbers.minibatches
        return last, jax.lax.scan(learn, nets, None, steps)[0]

    rng = np.random.default_rng(0)
    nets = [
        [0.1 * rng.normal(size=shape).astype(np.float32) for shape in itertools.pairwise(ends)]
        for ends in ((*sizes, 2), (*sizes, 1))
    ]
    rows = numbers.num_envs * numbers.num_steps // numbers.minibatches
    seen, part = (rng.normal(size=(n, 4)).astype(np.float32) for n in (numbers.num_envs, rows))
    return functools.partial(run, nets, seen, part)


def compared(num_envs: int, runs: int) -> list[harness.Row]:
    """Both forms of ours beside the one file, and one beside what learns in torch."""
    numbers = control_peers.Numbers(num_envs)
    updates = max(1, 256 // num_envs)
    shown = harness.rate(updates * num_envs * numbers.num_steps, "steps")
    name = f"PPO, {num_envs:,} environments"
    rows = []
    their_state, their_update = control_peers.one_file_jax(numbers)

    @jax.jit
    def theirs(state: Any) -> Any:
        return jax.lax.scan(lambda s, _: (their_update(s), None), state, None, updates)[0]

    for bootstrap in (False, True):
        state, run = ours(numbers, bootstrap=bootstrap, updates=updates)
        rows.append(
            harness.paired(
                name + (", time limits bootstrapped" if bootstrap else ""),
                "one file on gymnax",
                functools.partial(run, state),
                functools.partial(theirs, their_state),
                runs=runs,
                shown=shown,
                limit=None if bootstrap else 1.0,
            )
        )
    state, run = ours(numbers, bootstrap=False, updates=1)
    rows.append(
        harness.paired(
            name,
            "its matrix products alone",
            functools.partial(run, state),
            products(numbers),
            runs=runs,
            shown=harness.rate(num_envs * numbers.num_steps, "steps"),
        )
    )
    few = 1 if num_envs > 1000 else 2
    for peer, (modules, make, limit) in PEERS.items():
        if not all(importlib.util.find_spec(x) for x in modules):
            continue
        state, run = ours(numbers, bootstrap=True, updates=updates)
        update = make(numbers)

        def their_updates(update: Callable[[], None] = update) -> None:
            for _ in range(updates):
                update()

        rows.append(
            harness.paired(
                name,
                peer,
                functools.partial(run, state),
                their_updates,
                runs=few,
                shown=shown,
                limit=limit if num_envs == 4096 else None,
            )
        )
    return rows


def facts(num_envs: int = 4096, num_steps: int = 128) -> list[harness.Row]:
    """Compilations, the batch's memory and the update's, of the compiled programs themselves."""
    env = control.cart_pole()
    net = agents.actor_critic(env)
    agent = agents.ppo(env, net, num_envs=num_envs, num_steps=num_steps)
    train = jax.jit(functools.partial(agents.train, agent, num_updates=1), donate_argnums=0)
    state = agent.init(jax.random.key(0))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    update = train.lower(shapes).compile().memory_analysis()
    for _ in range(3):
        state, _ = train(state)
    compilations = train._cache_size()  # type: ignore[attr-defined]

    def collect(state: on_policy.State) -> Any:
        return sampling.unroll_environments(
            env, on_policy.decide(net, state.params), state.running, state.key, num_steps=num_steps
        )[1]

    batch = jax.jit(collect).lower(shapes).compile().memory_analysis()
    assert update is not None and batch is not None and isinstance(env.observation, envs.Box)
    temporary, held = update.temp_size_in_bytes, batch.output_size_in_bytes
    # Two observations, an action, reward, log-prob and value of 4 bytes an entry; two flags.
    observation = int(np.prod(env.observation.shape))
    predicted = num_envs * num_steps * (4 * (2 * observation + 4) + 2)

    def megabytes(number: int) -> str:
        return f"{number / 1e6:.1f} MB"

    name = f"PPO, {num_envs:,} environments"
    return [
        harness.Row(
            name=f"{name}: compilations of a run in three sittings",
            peer="one",
            ours=str(compilations),
            theirs="1",
            ratio=compilations,
            limit=1.0,
        ),
        harness.Row(
            name=f"{name}: memory of a batch",
            peer="sum of its fields",
            ours=megabytes(held),
            theirs=megabytes(predicted),
            ratio=held / predicted,
            limit=1.001,
        ),
        harness.Row(
            name=f"{name}: temporary memory of an update",
            peer="the batch",
            ours=megabytes(temporary),
            theirs=megabytes(held),
            ratio=temporary / held,
        ),
    ]


def rows() -> list[harness.Row]:
    """For each number of environments, and the facts."""
    return [row for num_envs, runs in SIZES.items() for row in compared(num_envs, runs)] + facts()


def main(arguments: list[str] | None = None) -> int:
    return harness.main("control", __doc__, rows, arguments)


if __name__ == "__main__":
    sys.exit(main())
