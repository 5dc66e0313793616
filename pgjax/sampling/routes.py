"""The experts a sampler's tokens were sent to, in the rows of its samples."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Int


def assemble_experts(
    prompt_experts: Int[Array, "L P Tp k"],
    prompt_lengths: Int[Array, " P"],
    completion_experts: Int[Array, "N L P G k"],
    counts: Int[Array, "P G"],
) -> Int[Array, "B T L k"]:
    """Rows of prompt and completion, `B = P · G` and `T = Tp + N`, for `Rollout.experts`.

    Padding, and the last token of each completion, which the sampler never runs, get the first k
    experts: what is computed there has no bearing on any token's log-prob.

    Args:
      prompt_experts: of the prompts' tokens.
      prompt_lengths: real tokens of each prompt.
      completion_experts: of the completions' tokens, step by step.
      counts: tokens of each completion.
    """
    steps, layers, prompts, samples, k = completion_experts.shape
    of_prompt = jnp.moveaxis(prompt_experts, 0, 2)[:, None]  # [P, 1, Tp, L, k]
    of_completion = completion_experts.transpose(2, 3, 0, 1, 4)  # [P, G, N, L, k]
    position = jnp.arange(prompt_experts.shape[2] + steps)
    offset = position - prompt_lengths[:, None]  # [P, T]

    def along(values: Array, index: Array) -> Array:
        index = jnp.broadcast_to(index[:, None], (prompts, values.shape[1], len(position)))
        return jnp.take_along_axis(values, index[..., None, None], axis=2)

    run = (offset[:, None] >= 0) & (offset[:, None] < counts[..., None] - 1)
    rows = jnp.where(
        run[..., None, None],
        along(of_completion, jnp.clip(offset, 0, steps - 1)),
        jnp.arange(k),
    )
    inside = (offset < 0)[:, None, :, None, None]
    last = prompt_experts.shape[2] - 1
    rows = jnp.where(inside, along(of_prompt, jnp.minimum(position, last)[None]), rows)
    return rows.reshape(prompts * samples, len(position), layers, k)
