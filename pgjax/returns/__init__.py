"""Returns, advantages and off-policy targets, all on one first-order linear recurrence.

Conventions shared by every function here:

* Time is the last axis; any batch axes stand in front. All time-indexed arguments have the same
  shape `[..., T]`, T >= 1. Index t belongs to the transition (s_t, a_t, r_t, s_{t+1}).
* `discounts` is γ(1 - terminated), in [0, 1]: 0 after a terminal step, so nothing behind it counts.
* `next_values[t]` is the value of s_{t+1}, the state *before* any reset. Where an episode goes on
  it is the next step's value; see `next_values_within` for rows of tokens.
* `truncated` marks steps whose record ends although the episode does not: what was collected
  afterwards is another episode, so nothing is carried over the step, but its `next_values` is
  still bootstrapped from. The last step of the array always counts as such an end.
* `mask` is true at the steps that count. The others are skipped: the result at true positions is
  that of the sequence with the false columns cut out, and it is 0 at false positions. Whatever
  stands there, NaN included, reaches neither values nor gradients; a `truncated` flag there is cut
  out too, so put it on the last true step.
* Results are float32, or float64 when a floating argument is. True positions must be finite.
* Gradients flow through everything; targets usually want `jax.lax.stop_gradient` around them.
"""

from __future__ import annotations

from pgjax.returns.next_values import next_values_within
from pgjax.returns.off_policy import VTrace, retrace, v_trace
from pgjax.returns.on_policy import discounted, gae, lambda_returns, n_step
from pgjax.returns.recurrence import linear_recurrence, linear_recurrence_sequential
from pgjax.returns.turns import at_turns, trajectory_rows, turn_returns, turn_sizes, turn_totals

__all__ = [
    "VTrace",
    "at_turns",
    "discounted",
    "gae",
    "lambda_returns",
    "linear_recurrence",
    "linear_recurrence_sequential",
    "n_step",
    "next_values_within",
    "retrace",
    "trajectory_rows",
    "turn_returns",
    "turn_sizes",
    "turn_totals",
    "v_trace",
]
