"""The real update and the real decoding step, compiled for a mesh, and what they hold and send."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

import pgjax as pg
from experiments.shared import optimizers
from pgjax import models, parallel
from pgjax.models.cache import empty_completion_cache


@dataclasses.dataclass(frozen=True)
class Facts:
    """Of one compiled program, on one device.

    Attributes:
      memory: bytes by what they hold.
      sent: bytes that a device sends, by kind of collective and whether in a loop.
      exact: whether the trip counts of all loops with collectives are known.
      seconds: that compiling took.
    """

    memory: Mapping[str, int]
    sent: Mapping[str, float]
    exact: bool
    seconds: float

    @property
    def total(self) -> int:
        return sum(self.memory.values())


def on_one_device(tree: Any) -> int:
    """Bytes of a tree of placed shapes on one of its devices."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    )


def placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def _facts(lowered: Any, mesh: Mesh, memory: dict[str, int]) -> Facts:
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    analysis = compiled.memory_analysis()
    memory["temporary"] = int(analysis.temp_size_in_bytes)
    memory["outputs"] = max(0, int(analysis.output_size_in_bytes - analysis.alias_size_in_bytes))
    sent: dict[str, float] = {}
    found = parallel.collectives(compiled.as_text(), mesh.size)
    for one in found:
        key = f"{one.kind}, {'each layer' if one.in_loop else 'once'}"
        sent[key] = sent.get(key, 0.0) + one.moved
    return Facts(memory, sent, all(one.exact for one in found), seconds)


def update_facts(
    config: models.DecoderConfig,
    mesh: Mesh,
    *,
    objective: pg.Objective,
    optimizer: optimizers.OptimizerName,
    rows: int,
    length: int,
    samples: int,
    microbatches: int,
) -> Facts:
    """A step of training on `rows` rows of `length` tokens, groups of `samples`, in so many parts.

    Groups that would not stay whole in a part are cut, as only objectives that allow it can be.
    """
    decoder = models.FunctionalDecoder(config, mesh)
    shapes = {"decoder": models.abstract_params(config)}
    axes: dict[str, Any] = {"decoder": decoder.logical_axes()}
    if "values" in objective.needs:
        shapes["value_head"] = jax.eval_shape(
            lambda: models.value_head_init(config, jax.random.key(0))
        )
        axes["value_head"] = models.value_head_logical_axes()
    places = parallel.shardings(axes, mesh, shapes=shapes)
    params = placed(shapes, places)
    transform = optimizers.make(
        optimizer, optax.constant_schedule(1e-6), weight_decay=0.0, shardings=params
    )

    def init(params: Any) -> pg.train.TrainState:
        memory = objective.memory
        return pg.train.TrainState(
            params=params,
            opt_state=transform.init(params),
            step=jnp.int32(0),
            key=jax.random.key(0),
            memory=None if memory is None else memory.init(),
        )

    state = jax.eval_shape(init, params)
    where = parallel.shardings_like(state, shapes, places)
    state = placed(state, where)
    batch_place = parallel.batch_sharding(mesh)

    def row(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_place)

    each = {
        "reference_logprobs": row((rows, length), jnp.float32),
        "proximal_logprobs": row((rows, length), jnp.float32),
        "values": row((rows, length), jnp.float32),
    }
    batch = pg.Rollout(
        tokens=row((rows, length), jnp.int32),
        mask=row((rows, length), jnp.bool_),
        behavior_logprobs=row((rows, length), jnp.float32),
        rewards=row((rows,), jnp.float32),
        group_ids=row((rows,), jnp.int32),
        **{name: x for name, x in each.items() if name in objective.needs},
    )
    update: Any = pg.train.make_update(
        pg.train.language_model_outputs(decoder),
        objective,
        transform,
        num_microbatches=microbatches,
        group_size=samples if rows % (microbatches * samples) == 0 else None,
        state_shardings=where,
    )
    memory = {
        "parameters": on_one_device(state.params),
        "optimizer": on_one_device(state.opt_state),
        "batch": on_one_device(batch),
    }
    return _facts(update.lower(state, batch), mesh, memory)


def decode_facts(
    config: models.DecoderConfig,
    mesh: Mesh,
    *,
    prompts: int,
    samples: int,
    prompt_length: int,
    new_tokens: int,
) -> Facts:
    """One token of every completion over a cache, to logits."""
    config = dataclasses.replace(config, param_dtype=config.dtype)
    decoder = models.FunctionalDecoder(config, mesh)
    shapes = models.abstract_params(config)
    params = placed(shapes, parallel.shardings(decoder.logical_axes(), mesh, shapes=shapes))
    shape: Any = jax.ShapeDtypeStruct
    _, prefix = jax.eval_shape(
        decoder.prefill,
        shapes,
        shape((prompts, prompt_length), jnp.int32),
        shape((prompts,), jnp.int32),
    )
    completion = jax.eval_shape(
        lambda: empty_completion_cache(
            config, num_prompts=prompts, num_samples=samples, num_slots=new_tokens
        )
    )

    def spread(tree: Any) -> Any:
        """Caches over prompts and heads, all else over prompts."""

        def axes(x: Any) -> tuple[str | None, ...]:
            first = (None, "batch", "kv_heads") if x.ndim > 3 else ("batch",)
            return (*first, *[None] * (x.ndim - len(first)))

        return placed(tree, parallel.shardings(jax.tree.map(axes, tree), mesh, shapes=tree))

    prefix, completion = spread(prefix), spread(completion)
    tokens = spread(shape((prompts, samples), jnp.int32))
    step = shape((), jnp.int32, sharding=parallel.replicated(mesh))

    def decode(params: Any, tokens: Any, prefix: Any, completion: Any, step: Any) -> Any:
        hidden, completion = decoder.decode_step(params, tokens, prefix, completion, step)
        return jnp.argmax(decoder.logits(params, hidden), -1), completion

    lowered = jax.jit(decode, donate_argnums=3).lower(params, tokens, prefix, completion, step)
    memory = {
        "parameters": on_one_device(params),
        "cache": on_one_device((prefix, completion)),
    }
    return _facts(lowered, mesh, memory)
