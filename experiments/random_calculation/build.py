"""Objective, optimizer, decoder, reward and batches, as configured."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import pgjax as pg
from experiments.random_calculation.config import Config
from experiments.shared import objectives, optimizers
from pgjax.tasks import random_calculation as task
from pgjax.train import text


def make_objective(config: Config) -> pg.Objective:
    """The recipe with its options, for instance `kl_coefficient=0.01`."""
    return objectives.make_objective(
        config.objective,
        config.objective_options,
        aggregate=config.aggregate,
        known={
            "length": max_new_tokens(config),
            "max_length": max_new_tokens(config),
            "length_reference": max_new_tokens(config),
            "group_size": config.rl.samples,
            "steps": config.rl.steps,
            "learning_rate": config.rl.learning_rate,
            "vocab_size": task.VOCAB_SIZE,
            "hidden_size": config.model.hidden_size,
        },
    )


def answers(samples: Any, batch: Any) -> dict[str, Any]:
    """Which completions state the same number; one that states none is alone."""
    del batch
    values, ok = task.parse_answer(samples.tokens, samples.mask)
    return {"answer_ids": jnp.where(ok, values, -1 - jnp.arange(values.shape[0]))}


def make_optimizer(config: Config, shardings: Any = None) -> optax.GradientTransformation:
    """Clipping by global norm, then the named optimizer with a linearly warmed-up rate."""
    rl = config.rl
    own = rl.adam_learning_rate
    optimizer = optimizers.make(
        config.optimizer,
        optimizers.rising(rl.learning_rate, rl.warmup_steps),
        adam_rate=None if own is None else optimizers.rising(own, rl.warmup_steps),
        weight_decay=rl.weight_decay,
        betas=(0.9, 0.99),
        shardings=shardings,
    )
    return optax.chain(optax.clip_by_global_norm(rl.clip_norm), optimizer)


def make_warmup_optimizer(config: Config) -> optax.GradientTransformation:
    """Muon on the layers' matrices, AdamW on the rest; warm-up, then cosine to a tenth."""
    warmup = config.warmup

    def schedule(peak: float) -> optax.Schedule:
        steps = max(warmup.steps, 1)
        return optax.warmup_cosine_decay_schedule(0.0, peak, min(50, steps // 4), steps, 0.1 * peak)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(
            schedule(warmup.learning_rate),
            weight_decay=0.01,
            adam_b1=0.9,
            adam_b2=0.98,
            adam_weight_decay=0.01,
            adam_learning_rate=schedule(warmup.adam_learning_rate),
            muon_weight_dimension_numbers=optimizers.matrix_axes,
        ),
    )


def prompt_length(config: Config) -> int:
    levels = config.warmup.levels + config.rl.levels + config.evaluation.levels
    return max(task.prompt_length_bound(task.PRESETS[config.data_preset], n) for n in levels)


def response_length(config: Config, levels: tuple[int, ...]) -> int:
    """Tokens of the longest worked response at these levels, end of sequence included."""
    return max(task.response_length_bound(task.PRESETS[config.data_preset], n) for n in levels)


def max_new_tokens(config: Config) -> int:
    return response_length(config, config.rl.levels + config.evaluation.levels)


def widths(length: int) -> tuple[int, ...]:
    """Row lengths at which an update is compiled: a third and two thirds of the longest row."""
    return (length // 3, 2 * length // 3)


def make_decoder(config: Config, mesh: Any) -> tuple[pg.models.FunctionalDecoder, Any]:
    model = config.model
    key, head_key = jax.random.split(jax.random.key(config.seed))
    decoder_config = pg.models.DecoderConfig(
        vocab_size=task.VOCAB_SIZE,
        hidden_size=model.hidden_size,
        num_layers=model.num_layers,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        mlp_size=model.mlp_size,
        activation=model.activation,
        gated=model.gated,
        rope_theta=1000.0,
        tied_embeddings=False,
        max_length=prompt_length(config)
        + max(max_new_tokens(config), response_length(config, config.warmup.levels)),
        dtype=model.dtype,
        remat=model.remat,
    )
    decoder, params = pg.models.init(decoder_config, key)
    decoder = dataclasses.replace(decoder, mesh=mesh)
    params = {"decoder": params}
    if config.objective == "ppo":
        params["value_head"] = pg.models.value_head_init(decoder_config, head_key)
    return decoder, params


def make_reward(
    config: Config, decoder: pg.models.FunctionalDecoder, initial: Any
) -> text.RewardFunction:
    """The reward of a completion, judged on the device."""

    def exact(samples: Any, batch: Any, key: Any) -> Any:
        reference = jnp.asarray(batch["answers"])[samples.prompt_ids]
        return pg.rewards.exact_reward(*graded(samples, reference))

    def graded(samples: Any, reference: Any) -> tuple[Any, Any, Any]:
        values, ok = task.parse_answer(samples.tokens, samples.mask)
        return values, reference, ok

    def continuous(samples: Any, batch: Any, key: Any) -> Any:
        reference = jnp.asarray(batch["answers"])[samples.prompt_ids]
        return pg.rewards.numeric_reward(*graded(samples, reference))

    def random(samples: Any, batch: Any, key: Any) -> Any:
        return pg.rewards.random_reward(key, samples.tokens.shape[0], gamma=0.5)

    def inverted(samples: Any, batch: Any, key: Any) -> Any:
        return pg.rewards.inverted_reward(exact(samples, batch, key))

    def majority_incorrect(samples: Any, batch: Any, key: Any) -> Any:
        """1 for the wrong answer the *initial* model gives most often to this prompt."""
        before = generate(config, decoder, initial, batch, key)
        values, ok = task.parse_answer(before.tokens, before.mask)
        shape = (-1, config.rl.samples)
        label, exists = pg.rewards.majority_incorrect_label(
            values.reshape(shape), ok.reshape(shape), jnp.asarray(batch["answers"])
        )
        ids = samples.prompt_ids
        values, reference, ok = graded(samples, label[ids])
        return pg.rewards.exact_reward(values, reference, ok & exists[ids])

    functions = {
        "exact": exact,
        "continuous": continuous,
        "random": random,
        "inverted": inverted,
        "majority_incorrect": majority_incorrect,
    }
    function = functions[config.reward]
    return function if config.reward == "majority_incorrect" else jax.jit(function)


def generate(
    config: Config, decoder: pg.models.FunctionalDecoder, params: Any, batch: Any, key: Any
) -> pg.sampling.Samples:
    return pg.sampling.generate(
        decoder,
        params["decoder"],
        batch["prompts"],
        batch["prompt_lengths"],
        key,
        num_samples=config.rl.samples,
        max_new_tokens=max_new_tokens(config),
        temperature=config.rl.temperature,
        stop_tokens=(task.EOS,),
    )


def evaluation_batches(
    source: task.Source, levels: tuple[int, ...], per_level: int, length: int
) -> list[dict[str, np.ndarray]]:
    """The first `per_level` prompts of every level, easy ones first, in batches of one size."""
    rows = pg.tasks.prompt_arrays(source, prompt_length=length, levels=levels, per_level=per_level)
    order = np.argsort(rows["levels"], kind="stable")
    size = max(d for d in range(1, 129) if len(order) % d == 0)
    return [
        {name: values[part] for name, values in rows.items()} for part in order.reshape(-1, size)
    ]
