"""Problems small enough to enumerate: short sequences of tokens, known rewards, any policy.

A bandit, a tree and a token MDP are all a `TokenProblem`: a prompt, then positions at which the
policy or nature draws a token, or nobody. What is random about rewards or observations is a token
that nature draws, so that a sequence determines its reward and all sequences can be summed over.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from pgjax import _checks
from pgjax.types import PolicyOutputs, Rollout, TokenSupport

NOBODY, POLICY, NATURE = 0, 1, 2
MAX_SEQUENCES = 200_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenProblem:
    """Prompts, a parametric policy over short sequences, and what each sequence is worth.

    Tokens are int32 `[B, 1 + horizon]`: the prompt's index, then one token a position. All
    functions are pure JAX and take whole rows; what they give for position t may depend on the
    tokens before t alone, except `reward` and `extras`, which see all.

    Attributes:
      num_prompts: P; a batch draws the same number of samples for each.
      num_actions: A, the tokens of policy and nature.
      horizon: positions after the prompt.
      logits: `(params, tokens) -> f32[B, T, A]`, the policy's at every position.
      reward: `tokens -> f32[B]`, or `f32[B, T]` per token.
      roles: `tokens -> int32[B, T]`: `POLICY`, `NATURE` or `NOBODY` draws position t, who then
        leaves token 0; None: the policy draws all.
      nature: `tokens -> f32[B, T, A]`, probabilities of nature's tokens.
      extras: `tokens -> {name: [B] or [B, T]}`, what becomes `Rollout.extras`; None: nothing.
    """

    num_prompts: int
    num_actions: int
    horizon: int
    logits: Callable[[Any, Int[Array, "B T"]], Float[Array, "B T A"]]
    reward: Callable[[Int[Array, "B T"]], Array]
    roles: Callable[[Int[Array, "B T"]], Int[Array, "B T"]] | None = None
    nature: Callable[[Int[Array, "B T"]], Float[Array, "B T A"]] | None = None
    extras: Callable[[Int[Array, "B T"]], dict[str, Array]] | None = None

    def __post_init__(self) -> None:
        for name in ("num_prompts", "num_actions", "horizon"):
            _checks.in_range(name, getattr(self, name), 1)


def bandit(rewards: Float[Array, "P A"]) -> TokenProblem:
    """One token a prompt; the policy's parameters are its logits `[P, A]`."""
    table = jnp.asarray(rewards)
    _checks.rank("rewards", table, 2)

    def logits(params: Array, tokens: Array) -> Array:
        rows = params[tokens[:, 0]]
        return jnp.stack([jnp.zeros_like(rows), rows], axis=1)

    return TokenProblem(
        num_prompts=table.shape[0],
        num_actions=table.shape[1],
        horizon=1,
        logits=logits,
        reward=lambda tokens: table[tokens[:, 0], tokens[:, 1]],
    )


def roles(problem: TokenProblem, tokens: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Who draws each token; nobody draws the prompt."""
    if problem.roles is None:
        return jnp.broadcast_to(
            jnp.where(jnp.arange(tokens.shape[1]) > 0, POLICY, NOBODY), tokens.shape
        )
    found = problem.roles(tokens)
    return jnp.where(jnp.arange(tokens.shape[1]) > 0, found, NOBODY)


def outputs(problem: TokenProblem, params: Any, rollout: Rollout, needs: frozenset[str]) -> Any:
    """What the policy says of a rollout's tokens: an outputs function for `train.make_update`.

    Bind the problem with `functools.partial`. The policy's logits count as a linear head without a
    basis, so `score_features` is the mean of `e(y_t) - p_t` over a sequence's tokens, `features`
    are a single 1 and `feature_square_norm` is 1. The `support` is all actions. `values` are 0.
    """
    logits = problem.logits(params, rollout.tokens)
    logprobs = jax.nn.log_softmax(logits)
    probabilities = jnp.exp(logprobs)
    mask = rollout.mask

    def masked(x: Array) -> Array:
        return jnp.where(mask, x, 0.0)

    found: dict[str, Any] = {
        "logprobs": masked(
            jnp.take_along_axis(logprobs, rollout.tokens[..., None], axis=-1)[..., 0]
        )
    }
    if "entropy" in needs:
        found["entropy"] = masked(-jnp.sum(probabilities * logprobs, axis=-1))
    for name, power in (("square_sum", 2), ("cube_sum", 3)):
        if name in needs:
            found[name] = masked(jnp.sum(probabilities**power, axis=-1))
    if "feature_square_norm" in needs:
        found["feature_square_norm"] = masked(jnp.ones_like(found["logprobs"]))
    if "score_features" in needs:
        one_hot = jax.nn.one_hot(rollout.tokens, problem.num_actions, dtype=probabilities.dtype)
        total = jnp.sum(jnp.where(mask[..., None], one_hot - probabilities, 0.0), axis=1)
        found["score_features"] = total / jnp.maximum(mask.sum(-1, keepdims=True), 1)
    if "features" in needs:
        found["features"] = jnp.ones((*mask.shape, 1), probabilities.dtype)
    if "support" in needs:
        ids = jnp.broadcast_to(jnp.arange(problem.num_actions), probabilities.shape)
        found["support"] = TokenSupport(probabilities, ids, rollout.tokens)
    if "values" in needs:
        found["values"] = jnp.zeros_like(found["logprobs"])
    return PolicyOutputs(**found)


def log_probability(
    problem: TokenProblem, params: Any, tokens: Int[Array, "B T"]
) -> Float[Array, " B"]:
    """Log-probability of each sequence given its prompt, nature's draws included."""
    drawn_by = roles(problem, tokens)

    def chosen(logprobs: Array) -> Array:
        return jnp.take_along_axis(logprobs, tokens[..., None], axis=-1)[..., 0]

    policy = chosen(jax.nn.log_softmax(problem.logits(params, tokens)))
    total = jnp.where(drawn_by == POLICY, policy, 0.0)
    if problem.nature is not None:
        total += jnp.where(drawn_by == NATURE, jnp.log(chosen(problem.nature(tokens))), 0.0)
    return total.sum(-1)


def all_sequences(problem: TokenProblem) -> Int[np.ndarray, "K T"]:
    """Every sequence of every prompt, ordered by prompt.

    Raises:
      ValueError: more than 200,000 of them.
    """
    rows = np.zeros((problem.num_prompts, 1 + problem.horizon), np.int32)
    rows[:, 0] = np.arange(problem.num_prompts)
    for position in range(1, problem.horizon + 1):
        with jax.ensure_compile_time_eval():  # also while someone's jit is being traced
            drawn = np.asarray(roles(problem, jnp.asarray(rows)))[:, position]
        counts = np.where(drawn == NOBODY, 1, problem.num_actions)
        if counts.sum() > MAX_SEQUENCES:
            raise ValueError(
                f"problem: expected at most {MAX_SEQUENCES} sequences, got {counts.sum()} at "
                f"position {position} already"
            )
        rows = np.repeat(rows, counts, axis=0)
        ends = np.cumsum(counts)
        rows[:, position] = np.arange(len(rows)) - np.repeat(ends - counts, counts)
    return rows


def expected_reward(problem: TokenProblem, params: Any) -> Float[Array, ""]:
    """`J = mean over prompts of E[R]`, exactly and differentiably; per-token rewards are summed."""
    tokens = jnp.asarray(all_sequences(problem))
    rewards = problem.reward(tokens)
    if rewards.ndim == 2:
        rewards = jnp.where(roles(problem, tokens) == POLICY, rewards, 0.0).sum(-1)
    weights = jnp.exp(log_probability(problem, params, tokens))
    return jnp.sum(weights * rewards) / problem.num_prompts


def rollout_of(
    problem: TokenProblem,
    tokens: Int[Array, "B T"],
    behavior_params: Any,
    *,
    reference_params: Any | None = None,
) -> Rollout:
    """The rollout that holds these sequences.

    Args:
      problem: whose sequences they are.
      tokens: any sequences, groups being those of one prompt.
      behavior_params: of the policy that is said to have drawn them.
      reference_params: of the reference policy; default: the behaviour.
    """
    mask: Bool[Array, "B T"] = roles(problem, tokens) == POLICY

    def logprobs(params: Any) -> Array:
        rows = jax.nn.log_softmax(problem.logits(params, tokens))
        return jnp.where(mask, jnp.take_along_axis(rows, tokens[..., None], axis=-1)[..., 0], 0.0)

    behavior = logprobs(behavior_params)
    return Rollout(
        tokens=tokens,
        mask=mask,
        behavior_logprobs=behavior,
        rewards=problem.reward(tokens).astype(behavior.dtype),
        group_ids=tokens[:, 0],
        truncated=jnp.zeros(tokens.shape[0], bool),
        reference_logprobs=behavior if reference_params is None else logprobs(reference_params),
        values=jnp.zeros_like(behavior),
        extras=None if problem.extras is None else problem.extras(tokens),
    )


def sample(
    problem: TokenProblem,
    params: Any,
    key: PRNGKeyArray,
    *,
    group_size: int,
    reference_params: Any | None = None,
) -> Rollout:
    """`group_size` sequences of each prompt, groups one after the other."""
    _checks.in_range("group_size", group_size, 1)
    prompts = jnp.repeat(jnp.arange(problem.num_prompts, dtype=jnp.int32), group_size)
    tokens = jnp.zeros((prompts.size, 1 + problem.horizon), jnp.int32).at[:, 0].set(prompts)
    for position, step_key in enumerate(jax.random.split(key, problem.horizon), start=1):
        drawn_by = roles(problem, tokens)[:, position]
        logits = problem.logits(params, tokens)[:, position]
        if problem.nature is not None:
            nature = jnp.log(problem.nature(tokens)[:, position])
            logits = jnp.where((drawn_by == NATURE)[:, None], nature, logits)
        drawn = jax.random.categorical(step_key, logits).astype(jnp.int32)
        tokens = tokens.at[:, position].set(jnp.where(drawn_by == NOBODY, 0, drawn))
    return rollout_of(problem, tokens, params, reference_params=reference_params)
