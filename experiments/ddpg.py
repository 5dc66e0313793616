"""Trains DDPG on an environment, many seeds at once in one compiled program.

Ends and exits as `experiments.ppo` does.
"""

from __future__ import annotations

import sys

from experiments.control import off_policy, run
from pgjax import agents, envs


def make_agent(env: envs.Environment, updates: int, config: off_policy.Noisy) -> agents.Agent:
    return agents.ddpg(
        env,
        agents.deterministic_policy(env, hidden=config.hidden),
        agents.critics(env, num=1, hidden=config.hidden),
        **config.options(),
    )


def main(arguments: list[str] | None = None) -> int:
    return run.main(
        "ddpg", off_policy.Noisy(), make_agent, description=__doc__, arguments=arguments
    )


if __name__ == "__main__":
    sys.exit(main())
