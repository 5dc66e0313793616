"""Rewards to advantages.

A sample whose reward is not finite (its verifier failed) counts in no statistic and gets advantage
0. Results carry no `stop_gradient`: the surrogates apply it.
"""

from __future__ import annotations

from pgjax.advantages.batch import batch_normalize, group_mean_batch_std
from pgjax.advantages.group import centered, group_normalize, leave_one_out
from pgjax.advantages.token import at_last_token, kl_shaped_returns, to_tokens, token_whiten

__all__ = [
    "at_last_token",
    "batch_normalize",
    "centered",
    "group_mean_batch_std",
    "group_normalize",
    "kl_shaped_returns",
    "leave_one_out",
    "to_tokens",
    "token_whiten",
]
