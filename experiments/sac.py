"""Trains SAC on an environment, many seeds at once in one compiled program.

Ends and exits as `experiments.ppo` does.
"""

from __future__ import annotations

import sys

from experiments.control import off_policy, run
from pgjax import agents, envs


def make_agent(env: envs.Environment, updates: int, config: off_policy.Config) -> agents.Agent:
    return agents.sac(
        env,
        agents.squashed_gaussian_policy(env, hidden=config.hidden),
        agents.critics(env, hidden=config.hidden),
        **config.options(),
    )


def main(arguments: list[str] | None = None) -> int:
    return run.main(
        "sac", off_policy.Config(), make_agent, description=__doc__, arguments=arguments
    )


if __name__ == "__main__":
    sys.exit(main())
