"""What every way of sampling returns: rows of prompt, completion and padding."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pgjax.types import _Replaceable, pytree_dataclass


@pytree_dataclass
class Samples(_Replaceable):
    """`B = P · G` sampled sequences, the G of each prompt next to each other.

    Attributes:
      tokens: prompt, completion (starting right after the prompt's last real token), padding.
      mask: true on sampled tokens, the stop token included.
      behavior_logprobs: log-probs under the distribution that was sampled: after temperature and
        filters, renormalised. 0 where `mask` is false.
      logprobs: log-probs under the model itself (temperature 1, no filters), 0 off the mask.
      lengths: real tokens of each row, prompt and completion together.
      truncated: true where the budget ended before a stop token was sampled.
      prompt_ids: index of each row's prompt.
      steps: steps the loop took; below `max_new_tokens` where all sequences stopped early.
      experts: the experts each layer sent each token to, where they were recorded.
    """

    tokens: Int[Array, "B T"]
    mask: Bool[Array, "B T"]
    behavior_logprobs: Float[Array, "B T"]
    logprobs: Float[Array, "B T"]
    lengths: Int[Array, " B"]
    truncated: Bool[Array, " B"]
    prompt_ids: Int[Array, " B"]
    steps: Int[Array, ""]
    experts: Int[Array, "B T L k"] | None = None


def assemble(
    prompts: Int[Array, "P Tp"],
    prompt_lengths: Int[Array, " P"],
    *,
    tokens: Int[Array, "P G N"],
    behavior_logprobs: Float[Array, "P G N"],
    logprobs: Float[Array, "P G N"],
    counts: Int[Array, "P G"],
    stopped: Bool[Array, "P G"],
    pad_token: Int[Array, ""],
    steps: Int[Array, ""],
) -> Samples:
    """Rows in which each completion follows the real end of its prompt.

    Args:
      prompts: right-padded.
      prompt_lengths: real tokens of each prompt.
      tokens, behavior_logprobs, logprobs: of the completions; what lies behind `counts` is ignored.
      counts: tokens of each completion.
      stopped: true where the last of them is a stop token.
      pad_token: fills the rows after the completion.
      steps: steps the loop took.
    """
    num_prompts, num_samples, max_new_tokens = tokens.shape
    width = prompts.shape[1] + max_new_tokens
    position = jnp.arange(width)
    offset = position - prompt_lengths[:, None]  # [P, T]: which new token a position holds
    mask = (offset[:, None] >= 0) & (offset[:, None] < counts[..., None])  # [P, G, T]
    source = jnp.clip(offset, 0, max_new_tokens - 1)[:, None]

    def rows(values: Array, elsewhere: Array) -> Array:
        placed = jnp.take_along_axis(values, source, axis=-1)
        return jnp.where(mask, placed, elsewhere).reshape(-1, width)

    padded = jnp.pad(prompts, ((0, 0), (0, max_new_tokens)))
    outside = jnp.where(position < prompt_lengths[:, None], padded, pad_token)[:, None]
    zero = jnp.zeros((), jnp.float32)
    return Samples(
        tokens=rows(tokens, outside),
        mask=mask.reshape(-1, width),
        behavior_logprobs=rows(behavior_logprobs, zero),
        logprobs=rows(logprobs, zero),
        lengths=(prompt_lengths[:, None] + counts).reshape(-1),
        truncated=~stopped.reshape(-1),
        prompt_ids=jnp.repeat(jnp.arange(num_prompts, dtype=jnp.int32), num_samples),
        steps=steps,
    )
