"""What an objective reads of the current policy, computed from parameters and a rollout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pgjax import logprobs, models
from pgjax.types import PolicyOutputs, Rollout

OutputsFunction = Callable[[Any, Rollout, frozenset[str]], PolicyOutputs]


def language_model_outputs(
    decoder: models.FunctionalDecoder, *, temperature: float = 1.0
) -> OutputsFunction:
    """`outputs(params, rollout, needs) -> PolicyOutputs` of a decoder.

    Args:
      decoder: from `pgjax.models`.
      temperature: of the distribution whose log-probs are trained; the sampler's, so that
        `behavior_logprobs` without further filters are of the same distribution.

    Returns:
      a function of `params` (a dict with the decoder's under "decoder" and, for objectives that
      need `values`, a value head's under "value_head"), a rollout, and the optional fields wanted.
      Values are those of the state in which token t is chosen: the hidden state before it. No
      array of shape `[B, T, V]` is made.
    """

    def outputs(params: Any, rollout: Rollout, needs: frozenset[str]) -> PolicyOutputs:
        hidden = decoder.apply(params["decoder"], rollout.tokens)
        options: dict[str, Any] = {
            "temperature": temperature,
            "soft_cap": decoder.config.logit_soft_cap,
        }
        unembedding = decoder.unembedding(params["decoder"])
        if decoder.config.tied_embeddings:  # the table as it lies in memory, not a transposed copy
            unembedding, options["vocab_axis"] = params["decoder"]["embedding"], 0
        entropy = values = None
        if "entropy" in needs:
            token_logprobs, entropy = logprobs.from_hidden_with_entropy(
                hidden, unembedding, rollout.tokens, **options
            )
        else:
            token_logprobs = logprobs.from_hidden(hidden, unembedding, rollout.tokens, **options)
        if "values" in needs:
            if "value_head" not in params:
                raise ValueError(
                    "params: this objective needs values, so a 'value_head' beside 'decoder'; "
                    f"got {sorted(params)}"
                )
            values = logprobs.shift_right(models.value_head_apply(params["value_head"], hidden))
        return PolicyOutputs(
            logprobs=logprobs.where_mask(token_logprobs, rollout.mask),
            entropy=None if entropy is None else logprobs.where_mask(entropy, rollout.mask),
            values=None if values is None else logprobs.where_mask(values, rollout.mask),
            features=hidden if "features" in needs else None,
        )

    return outputs
