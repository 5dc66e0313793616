"""A tiny transformer that answers in a format, and is to learn which digits to answer with.

A prompt is a few digits and a question mark; the answer repeats them between an opening and a
closing token. `pretrained` has read demonstrations of that form of which most have random digits,
so that it starts with the format and with little accuracy. Decoder, sampler and update are the
ones that real checkpoints go through.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

import pgjax as pg
from experiments.shared import reproduction
from experiments.shared.imitation import imitated

OPEN, CLOSE, ASK, FIRST_DIGIT = 0, 1, 2, 3


@dataclasses.dataclass(frozen=True)
class Digits:
    """The task.

    Attributes:
      count: digits in a prompt, and in its answer.
      choices: different digits.
      demonstrated: share of demonstrations whose digits are right, or one such share for each
        kind of prompt: `every_prompt` goes through the kinds in turn.
      by_heart: the answer to a prompt is not its own digits but those of another one, always the
        same, so that nothing is learnt about one prompt from the others.
      prompts: drawn for every batch, all different.
      group_size: completions of each.
    """

    count: int = 2
    choices: int = 6
    demonstrated: float | tuple[float, ...] = 0.3
    by_heart: bool = False
    prompts: int = 16
    group_size: int = 8

    @property
    def vocab_size(self) -> int:
        return FIRST_DIGIT + self.choices

    @property
    def prompt_length(self) -> int:
        return self.count + 1

    @property
    def max_new_tokens(self) -> int:
        """One more than a well-formed answer has, so that it can be closed too late."""
        return self.count + 3

    def every_prompt(self) -> np.ndarray:
        digits = range(FIRST_DIGIT, self.vocab_size)
        rows = [(*row, ASK) for row in itertools.product(digits, repeat=self.count)]
        return np.array(rows, np.int32)

    def kinds(self) -> np.ndarray:
        """Of which kind each of `every_prompt` is."""
        return np.arange(self.choices**self.count) % np.size(self.demonstrated)

    def answers(self, prompts: Array) -> Int[Array, "P count"]:
        """The right digits of each prompt."""
        digits = prompts[:, : self.count]
        if not self.by_heart:
            return digits
        every = self.every_prompt()[:, : self.count]
        shuffled = jnp.asarray(np.random.default_rng(0).permutation(every))
        place = self.choices ** jnp.arange(self.count)[::-1]
        return shuffled[(digits - FIRST_DIGIT) @ place]

    def grade(self, tokens: Array) -> tuple[Bool[Array, " B"], Float[Array, " B"]]:
        """Whether each completion is well formed, and its share of right digits in place."""
        completion = tokens[:, self.prompt_length :]
        digits = completion[:, 1 : 1 + self.count]
        formed = (completion[:, 0] == OPEN) & (completion[:, 1 + self.count] == CLOSE)
        formed &= jnp.all(digits >= FIRST_DIGIT, axis=1)
        return formed, jnp.mean(digits == self.answers(tokens), axis=1)


def make_decoder(
    task: Digits, *, width: int = 32, layers: int = 2, **options: Any
) -> pg.models.FunctionalDecoder:
    """A Llama of that size for the task's vocabulary; options are `DecoderConfig`'s."""
    config = pg.models.DecoderConfig(
        vocab_size=task.vocab_size,
        hidden_size=width,
        num_layers=layers,
        num_heads=2,
        num_kv_heads=2,
        mlp_size=4 * width,
        rope_theta=100.0,
        tied_embeddings=False,
        max_length=task.prompt_length + task.max_new_tokens,
        remat=None,
        **options,
    )
    return pg.models.init(config, jax.random.key(0))[0]


@functools.partial(jax.jit, static_argnames=("task", "decoder", "updates", "learning_rate"))
def pretrained(
    task: Digits,
    decoder: pg.models.FunctionalDecoder,
    key: PRNGKeyArray,
    *,
    updates: int,
    learning_rate: float = 3e-3,
) -> Any:
    """Parameters after that many updates of Adam on 64 demonstrations each."""
    params = {"decoder": pg.models.init(decoder.config, key)[1]}
    if updates == 0:
        return params
    return imitated(
        pg.train.language_model_outputs(decoder),
        params,
        lambda batch_key: _demonstrations(task, batch_key, 64),
        key,
        updates=updates,
        learning_rate=learning_rate,
    )


def _demonstrations(task: Digits, key: PRNGKeyArray, size: int) -> pg.Rollout:
    prompt_key, digits_key, right_key = jax.random.split(key, 3)
    drawn = jax.random.randint(prompt_key, (size,), 0, len(task.every_prompt()))
    prompts = jnp.asarray(task.every_prompt())[drawn]
    shares = jnp.atleast_1d(jnp.asarray(task.demonstrated))[jnp.asarray(task.kinds())[drawn]]
    digits = jax.random.randint(digits_key, (size, task.count), FIRST_DIGIT, task.vocab_size)
    right = jax.random.uniform(right_key, (size, 1)) < shares[:, None]
    digits = jnp.where(right, task.answers(prompts), digits)
    return pg.train.demonstrations(*_answered(task, prompts, digits))


def _answered(task: Digits, prompts: Array, digits: Array) -> tuple[Array, Bool[Array, "B T"]]:
    """Prompts with these digits as well-formed answers, and which tokens are the answers'."""
    rows = jnp.concatenate([prompts, jnp.pad(digits, ((0, 0), (1, 1)))], axis=1)
    rows = rows.at[:, task.prompt_length].set(OPEN).at[:, -1].set(CLOSE)
    return rows, jnp.broadcast_to(jnp.arange(rows.shape[1]) >= task.prompt_length, rows.shape)


def accuracy(task: Digits, decoder: pg.models.FunctionalDecoder, params: Any) -> Float[Array, " P"]:
    """The probability of the right, well-formed answer to each of `every_prompt`, exact."""
    prompts = jnp.asarray(task.every_prompt())
    rows, mask = _answered(task, prompts, task.answers(prompts))
    outputs = pg.train.language_model_outputs(decoder)
    found = outputs(params, pg.train.demonstrations(rows, mask), frozenset())
    return jnp.exp(jnp.sum(jnp.where(mask, found.logprobs, 0.0), axis=1))


def sample(
    task: Digits,
    decoder: pg.models.FunctionalDecoder,
    params: Any,
    key: PRNGKeyArray,
    **options: Any,
) -> pg.sampling.Samples:
    """Groups of completions of prompts drawn without repetition."""
    prompt_key, key = jax.random.split(key)
    prompts = jnp.asarray(task.every_prompt())
    drawn = jax.random.permutation(prompt_key, prompts)[: task.prompts]
    return pg.sampling.generate(
        decoder,
        params["decoder"],
        drawn,
        jnp.full(len(drawn), task.prompt_length),
        key,
        num_samples=task.group_size,
        max_new_tokens=task.max_new_tokens,
        stop_tokens=(CLOSE,),
        **options,
    )


class Curves(Protocol):
    """Runs at every rate from every seed, and their curves; see `learner`."""

    def __call__(
        self, *, rates: Sequence[float], seeds: int, first_seed: int = 0, label: str = "runs"
    ) -> dict[str, Float[np.ndarray, "R S K"]]: ...


def learner(
    task: Digits,
    decoder: pg.models.FunctionalDecoder,
    objective: pg.Objective,
    make_optimizer: Callable[[Any], optax.GradientTransformation],
    *,
    steps: int,
    pretraining: int,
    reward: Callable[[Array, Array], Array],
    draw: Callable[[Any, PRNGKeyArray], pg.sampling.Samples] | None = None,
    prepare: Callable[[Any, pg.Rollout], pg.Rollout] | None = None,
    measure: Callable[[pg.train.TrainState, pg.Rollout], dict[str, Array]] | None = None,
    **update_options: Any,
) -> Curves:
    """Reinforcement of the task by one method, compiled once for all learning rates and seeds.

    Args:
      task, decoder: what is learnt by what.
      objective: with which loss; the reference policy is the pretrained one.
      make_optimizer: from a learning rate.
      steps: batches.
      pretraining: updates of `pretrained`.
      reward: of `Digits.grade`'s two answers.
      draw: `(params, key) -> samples`; default: `sample` from the policy itself.
      prepare: `(params, rollout) -> rollout`, before the update.
      measure: further numbers, from the state before the update and the prepared rollout.
      **update_options: of `train.make_update`.

    Returns:
      a function of `rates`, `seeds`, `first_seed` and the progress bar's `label`. It gives
      `[R, S, K]` for each metric of the update and of `measure`, and for `formed`, `right`.
    """
    outputs = pg.train.language_model_outputs(decoder, support_size=task.vocab_size)
    draw = functools.partial(sample, task, decoder) if draw is None else draw

    @jax.jit
    def run(rate: Array, start: Any, draw_key: PRNGKeyArray) -> dict[str, Array]:
        optimizer = make_optimizer(rate)
        update = pg.train.make_update(outputs, objective, optimizer, **update_options)
        memory = None if objective.memory is None else objective.memory.init()
        state = pg.train.TrainState(
            params=start,
            opt_state=optimizer.init(start),
            step=jnp.int32(0),
            key=draw_key,
            memory=memory,
        )

        def step(state: Any, _: None) -> tuple[Any, dict[str, Array]]:
            samples = draw(state.params, jax.random.fold_in(draw_key, state.step))
            formed, right = task.grade(samples.tokens)
            rollout = pg.train.to_rollout(samples, reward(formed, right).astype(jnp.float32))
            if prepare is not None:
                rollout = prepare(state.params, rollout)
            found = {} if measure is None else measure(state, rollout)
            state, metrics = update(state, rollout, start)
            found |= {"formed": formed.mean(), "right": right.mean()}
            return state, {**metrics, **found, "reward": rollout.rewards.mean()}

        return jax.lax.scan(step, state, None, length=steps)[1]

    def curves_of(rate: float, seed: int) -> dict[str, np.ndarray]:
        start, draw_key = _start(task, decoder, seed, pretraining)
        return jax.tree.map(np.asarray, run(jnp.float32(rate), start, draw_key))

    def curves(
        *, rates: Sequence[float], seeds: int, first_seed: int = 0, label: str = "runs"
    ) -> dict[str, np.ndarray]:
        pairs = list(itertools.product(rates, range(first_seed, first_seed + seeds)))
        found = [curves_of(rate, seed) for rate, seed in reproduction.track(pairs, label)]
        shape = (len(rates), seeds, steps)
        return {name: np.stack([x[name] for x in found]).reshape(shape) for name in found[0]}

    return curves


@functools.lru_cache(maxsize=64)
def _start(
    task: Digits, decoder: pg.models.FunctionalDecoder, seed: int, updates: int
) -> tuple[Any, PRNGKeyArray]:
    """A seed's pretrained parameters, the same for all rates and methods, and its other key."""
    start_key, draw_key = jax.random.split(jax.random.key(seed))
    return pretrained(task, decoder, start_key, updates=updates), draw_key


def increasing(steps: int, rate: Any) -> optax.Schedule:
    """A tenth of a learning rate, growing to the whole over the first steps."""
    return optax.linear_schedule(0.1 * rate, rate, steps)
