"""What an objective reads of the current policy, computed from parameters and a rollout."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pgjax import _checks, logprobs, models
from pgjax.train import packing
from pgjax.types import PolicyOutputs, Rollout

OutputsFunction = Callable[[Any, Rollout, frozenset[str]], PolicyOutputs]


def language_model_outputs(
    decoder: models.FunctionalDecoder,
    *,
    temperature: float = 1.0,
    packed_shares: Sequence[float] = (),
    support_size: int = 64,
) -> OutputsFunction:
    """`outputs(params, rollout, needs) -> PolicyOutputs` of a decoder.

    Args:
      decoder: from `pgjax.models`.
      temperature: of the distribution whose log-probs are trained; the sampler's, so that
        `behavior_logprobs` without further filters are of the same distribution.
      packed_shares: in (0, 1), for instance `(0.25, 0.5, 0.75)`: the decoder also runs on so many
        rows of the batch's, into which the sequences are packed where they fit, the smallest
        sufficient number being chosen without compiling again. The results are the same and
        padding is not computed. Meant for batches that are not sharded along their rows.
      support_size: how many of the most likely tokens an asked-for `support` holds.

    Returns:
      a function of `params` (a dict with the decoder's under "decoder" and, for objectives that
      need `values`, a value head's under "value_head"), a rollout, and the optional fields wanted.
      Values are those of the state in which token t is chosen: the hidden state before it. No
      array of shape `[B, T, V]` is made. A rollout's `experts` are used instead of the routers'
      own choice.

    Raises:
      ValueError: shares outside (0, 1), a support of no tokens.
    """
    _checks.in_range("support_size", support_size, 1)
    for share in packed_shares:
        if not 0 < share < 1:
            raise ValueError(f"packed_shares: expected numbers in (0, 1), got {share}")

    def of_tokens(
        params: Any, tokens: Array, mask: Array, needs: frozenset[str], **options: Any
    ) -> dict[str, Any]:
        hidden = decoder.apply(params["decoder"], tokens, **options)
        settings: dict[str, Any] = {
            "temperature": temperature,
            "soft_cap": decoder.config.logit_soft_cap,
        }
        unembedding = decoder.unembedding(params["decoder"])
        if decoder.config.tied_embeddings:  # the table as it lies in memory, not a transposed copy
            unembedding, settings["vocab_axis"] = params["decoder"]["embedding"], 0
        result: dict[str, Any] = {}
        if "entropy" in needs:
            result["logprobs"], result["entropy"] = logprobs.from_hidden_with_entropy(
                hidden, unembedding, tokens, **settings
            )
        else:
            result["logprobs"] = logprobs.from_hidden(hidden, unembedding, tokens, **settings)
        if "values" in needs:
            if "value_head" not in params:
                raise ValueError(
                    "params: this objective needs values, so a 'value_head' beside 'decoder'; "
                    f"got {sorted(params)}"
                )
            values = models.value_head_apply(params["value_head"], hidden)
            result["values"] = logprobs.shift_right(values)
        for name, power in (("square_sum", 2), ("cube_sum", 3)):
            if name in needs:
                result[name] = logprobs.power_sum(
                    hidden,
                    unembedding,
                    tokens,
                    power=power,
                    logprobs=result["logprobs"],
                    **settings,
                )
        if "feature_square_norm" in needs:
            norms = jnp.sum(jnp.square(hidden.astype(jnp.float32)), axis=-1)
            result["feature_square_norm"] = logprobs.shift_right(norms)
        if "score_features" in needs:
            result["score_features"] = logprobs.score_features(
                hidden, unembedding, tokens, mask, **settings
            )
        if "support" in needs:
            result["support"] = logprobs.token_support(
                hidden,
                unembedding,
                tokens,
                size=min(support_size, decoder.config.vocab_size),
                logprobs=result["logprobs"],
                **settings,
            )
        if "features" in needs:
            result["features"] = hidden
        return result

    def packed(params: Any, rollout: Rollout, needs: frozenset[str]) -> dict[str, Any]:
        batch, width = rollout.tokens.shape
        # Nothing behind a row's last chosen token has any bearing on what is asked.
        lengths = jnp.max(jnp.where(rollout.mask, jnp.arange(1, width + 1), 0), axis=1)
        plan = packing.plan(lengths.astype(jnp.int32), width=width)

        def at(num_rows: int, params: Any) -> dict[str, Array]:
            rows = packing.pack(rollout.tokens, plan, num_rows=num_rows)
            replayed = rollout.experts
            experts = None if replayed is None else _by_layer(_packed_experts(replayed, rows))
            found = of_tokens(
                params,
                rows.tokens,
                rows.segment_ids > 0,
                needs,
                positions=rows.positions,
                segment_ids=rows.segment_ids,
                experts=experts,
            )
            return {name: packing.unpack(values, plan) for name, values in found.items()}

        ladder = sorted({math.ceil(share * batch) for share in packed_shares} | {batch})
        rung = jnp.sum(plan.rows > jnp.array(ladder))
        return jax.lax.switch(rung, [functools.partial(at, n) for n in ladder], params)

    def outputs(params: Any, rollout: Rollout, needs: frozenset[str]) -> PolicyOutputs:
        # Sums over a sequence, and supports, are not taken apart again once it is packed.
        if packed_shares and not needs & {"score_features", "support"}:
            found = packed(params, rollout, needs)
        else:
            experts = None if rollout.experts is None else _by_layer(rollout.experts)
            found = of_tokens(params, rollout.tokens, rollout.mask, needs, experts=experts)
        whole = {name: found.pop(name, None) for name in ("features", "score_features", "support")}
        masked: dict[str, Any] = {
            name: logprobs.where_mask(x, rollout.mask) for name, x in found.items()
        }
        return PolicyOutputs(**masked, **whole)

    return outputs


def record_experts(decoder: models.FunctionalDecoder, params: Any, rollout: Rollout) -> Rollout:
    """The rollout with the experts these parameters choose for its tokens, to be replayed.

    Recorded before the first update on a batch they make every later minibatch use the routes of
    the policy it started from (R2); a sampler's own record, `Samples.experts`, also removes the
    difference between the sampler's routes and the learner's (R3).

    Args:
      decoder: with a mixture of experts.
      params: as for `language_model_outputs`.
      rollout: its `experts` are replaced.

    Source: Zheng et al., "Stabilizing Reinforcement Learning with LLMs", 2025, arXiv:2512.01374.
    """
    _, routing = decoder.apply_with_routing(params["decoder"], rollout.tokens)
    return rollout.replace(experts=jnp.moveaxis(routing.experts, 0, 2))


def _by_layer(experts: Array) -> Array:
    """`[B, T, L, k]`, as a rollout holds them, with the layers in front."""
    return jnp.moveaxis(experts, 2, 0)


def _packed_experts(experts: Array, rows: packing.Packed) -> Array:
    """Each packed token's experts; padding gets the first ones, which are as good as any."""
    sequence = jnp.maximum(rows.segment_ids - 1, 0)
    found = experts[sequence, rows.positions]
    return jnp.where((rows.segment_ids > 0)[..., None, None], found, jnp.arange(found.shape[-1]))
