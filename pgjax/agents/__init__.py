"""Agents on environments: each a composition of the library's parts, trained inside one program."""

from pgjax.agents import off_policy, offline, on_policy
from pgjax.agents.a2c import a2c
from pgjax.agents.agent import Agent, train
from pgjax.agents.behavior_cloning import behavior_cloning
from pgjax.agents.ddpg import ddpg
from pgjax.agents.dqn import dqn
from pgjax.agents.iql import iql
from pgjax.agents.networks import (
    ActorCritic,
    Network,
    actor_critic,
    bounded_mean_policy,
    critics,
    deterministic_policy,
    layer_norm_q_network,
    q_network,
    squashed_gaussian_policy,
    value_network,
)
from pgjax.agents.ppo import ppo
from pgjax.agents.pqn import pqn
from pgjax.agents.reinforce import reinforce
from pgjax.agents.sac import sac
from pgjax.agents.td3 import td3
from pgjax.agents.trpo import npg, trpo

__all__ = [
    "ActorCritic",
    "Agent",
    "Network",
    "a2c",
    "actor_critic",
    "behavior_cloning",
    "bounded_mean_policy",
    "critics",
    "ddpg",
    "deterministic_policy",
    "dqn",
    "iql",
    "layer_norm_q_network",
    "npg",
    "off_policy",
    "offline",
    "on_policy",
    "ppo",
    "pqn",
    "q_network",
    "reinforce",
    "sac",
    "squashed_gaussian_policy",
    "td3",
    "train",
    "trpo",
    "value_network",
]
