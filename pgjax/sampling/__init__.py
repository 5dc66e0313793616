"""Where rollouts come from: completions by a language model, steps through environments."""

from __future__ import annotations

from pgjax.sampling import engines, replay, speculative
from pgjax.sampling.continuous import generate_continuous
from pgjax.sampling.environments import (
    Decision,
    Episodes,
    Running,
    start_environments,
    unroll_environments,
)
from pgjax.sampling.episodes import episode_returns
from pgjax.sampling.epsilon_greedy import epsilon_greedy
from pgjax.sampling.filters import (
    filter_logits,
    min_p_threshold,
    top_k_threshold,
    top_p_threshold,
)
from pgjax.sampling.multiturn import flatten_turns
from pgjax.sampling.prompts import pad_prompts
from pgjax.sampling.props import Refit, props_loss, props_refit, ros_refit
from pgjax.sampling.samples import Samples
from pgjax.sampling.shuffle import random_order
from pgjax.sampling.text import generate
from pgjax.sampling.vines import Steps, Vines, vine_rollout

__all__ = [
    "Decision",
    "Episodes",
    "Refit",
    "Running",
    "Samples",
    "Steps",
    "Vines",
    "engines",
    "episode_returns",
    "epsilon_greedy",
    "filter_logits",
    "flatten_turns",
    "generate",
    "generate_continuous",
    "min_p_threshold",
    "pad_prompts",
    "props_loss",
    "props_refit",
    "random_order",
    "replay",
    "ros_refit",
    "speculative",
    "start_environments",
    "top_k_threshold",
    "top_p_threshold",
    "unroll_environments",
    "vine_rollout",
]
