"""Model, adapters, optimizer and what of it all is trained, as configured."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import pgjax as pg
from experiments.llm.config import RL, Common, Tuning
from experiments.shared import optimizers
from pgjax.models import lora, quantization
from pgjax.tasks import chat


@dataclasses.dataclass(frozen=True)
class Policy:
    """A loaded model, split into what is trained and what is frozen.

    Attributes:
      decoder: its functions.
      trainable: the parameters that an update changes, `{"decoder": ..., "value_head": ...}`.
      frozen: the rest, for `train.combine`; None where all is trained.
      tokenizer: of the checkpoint.
      stop_tokens: ids that end a completion.
      pad: id of padding.
    """

    decoder: pg.models.FunctionalDecoder
    trainable: dict[str, Any]
    frozen: Any
    tokenizer: Any
    stop_tokens: tuple[int, ...]
    pad: int

    def whole(self, trainable: Any) -> Any:
        """All parameters, given those that are trained."""
        return pg.train.combine(trainable, self.frozen)


def load_policy(config: Common, tuning: Tuning, mesh: Any, *, with_values: bool) -> Policy:
    """The checkpoint at `config.model`, placed on the mesh, with fresh adapters or a value head."""
    tokenizer = chat.load_tokenizer(config.model)
    adapters_only = tuning.train == "lora"
    if tuning.base != "as_loaded" and not adapters_only:
        raise ValueError(
            f"tuning.base: {tuning.base} parameters cannot be trained; use --tuning.train lora"
        )
    decoder, params = pg.models.from_pretrained(
        config.model,
        mesh=mesh,
        dtype=tuning.dtype,
        param_dtype=tuning.dtype if adapters_only else tuning.param_dtype,
        remat=tuning.remat,
    )
    chat.check_vocabulary(tokenizer, decoder.config)
    trainable: dict[str, Any] = {"decoder": params}
    frozen = None
    if adapters_only:
        key = jax.random.key(config.seed)
        adapters = lora.init(
            params, key, rank=tuning.rank, alpha=tuning.alpha, targets=tuning.targets
        )
        axes = lora.logical_axes(decoder.logical_axes(), adapters)
        adapters = pg.parallel.shard(adapters, pg.parallel.shardings(axes, mesh, shapes=adapters))
        quantize = {"int8": quantization.int8, "nf4": quantization.nf4}.get(tuning.base)
        frozen = {"decoder": params if quantize is None else quantize(params)}
        trainable = {"decoder": adapters}
    if with_values:
        head = pg.models.value_head_init(decoder.config, jax.random.key(config.seed))
        axes = pg.models.value_head_logical_axes()
        placed = pg.parallel.shardings(axes, mesh, shapes=head)
        trainable["value_head"] = pg.parallel.shard(head, placed)
    return Policy(
        decoder=decoder,
        trainable=trainable,
        frozen=frozen,
        tokenizer=tokenizer,
        stop_tokens=tuple(chat.stop_token_ids(tokenizer, config.model)),
        pad=chat.pad_token_id(tokenizer),
    )


def check_mixture(decoder: pg.models.FunctionalDecoder) -> None:
    """Routes can only be replayed where there are any."""
    if decoder.config.moe is None:
        raise ValueError("rl.routing_replay: this model has no mixture of experts; leave it out")


def sampler(rl: RL) -> Callable[..., pg.sampling.Samples]:
    """`sampling.generate`, or its likeness, as the options ask for it."""
    options: dict[str, Any] = {"record_experts": True} if rl.routing_replay == "sampler" else {}
    if rl.slots is None:
        return functools.partial(pg.sampling.generate, **options)
    return functools.partial(pg.sampling.generate_continuous, num_slots=rl.slots, **options)


def reference_of(policy: Policy, needed: bool) -> Any | None:
    """Parameters of the policy before training, for objectives that penalise leaving it."""
    if not needed:
        return None
    if policy.frozen is not None:
        return policy.frozen
    return {"decoder": jax.tree.map(jnp.copy, policy.trainable["decoder"])}


def make_optimizer(tuning: Tuning, trainable: Any) -> optax.GradientTransformation:
    """Clipping by global norm, then the named optimizer with a linearly warmed-up rate."""
    own = tuning.adam_learning_rate
    optimizer = optimizers.make(
        tuning.optimizer,
        optimizers.rising(tuning.learning_rate, tuning.warmup_steps),
        adam_rate=None if own is None else optimizers.rising(own, tuning.warmup_steps),
        weight_decay=tuning.weight_decay,
        shardings=trainable,
    )
    return optax.chain(optax.clip_by_global_norm(tuning.clip_norm), optimizer)


def export(config: Common, policy: Policy, trainable: Any, directory: Any) -> None:
    """Writes the trained model, value head and, where PEFT has a form for them, the adapters."""
    params = policy.whole(trainable)["decoder"]
    if policy.frozen is not None:
        params = lora.merge(policy.frozen["decoder"], trainable["decoder"])
    pg.models.save_pretrained(
        directory / "model", policy.decoder, params, source=config.model, overwrite=True
    )
    if "value_head" in trainable:
        pg.models.save_head(directory / "model", trainable["value_head"], kind="value")
    if policy.frozen is None:
        return
    try:
        lora.save_peft(
            directory / "adapter",
            trainable["decoder"],
            base_model=str(config.model),
            config=policy.decoder.config,
        )
    except ValueError as error:  # experts' adapters, say; the merged model holds them all the same
        print(f"adapters not written in PEFT's format: {error}")
