"""Agents on environments: each a composition of the library's parts, trained inside one program."""

from pgjax.agents import off_policy, offline, on_policy
from pgjax.agents.a2c import a2c
from pgjax.agents.agent import Agent, train
from pgjax.agents.beer import LinearHeadCritic, beer, linear_head_critic
from pgjax.agents.behavior_cloning import behavior_cloning
from pgjax.agents.bn_mappo import (
    BayesNetCritic,
    bn_mappo,
    fixed_graph_network,
    learned_graph_network,
)
from pgjax.agents.composite_dqn import composite_dqn
from pgjax.agents.ddpg import ddpg
from pgjax.agents.devices import init_on_devices
from pgjax.agents.dqn import dqn
from pgjax.agents.finite_horizon import ActorQ, actor_q, fit_critics, play
from pgjax.agents.ggd_sac import ggd_critics, ggd_judge, ggd_sac
from pgjax.agents.hybrid_npg import hybrid_npg, policy_steps
from pgjax.agents.iql import iql
from pgjax.agents.mixture import (
    best_expert,
    expert_policy,
    expert_routing,
    gumbel_routed,
    mixture_actor_critic,
    score_routed,
)
from pgjax.agents.networks import (
    ActorCritic,
    Network,
    actor_critic,
    bounded_mean_policy,
    critics,
    deterministic_policy,
    squashed_gaussian_policy,
    value_network,
)
from pgjax.agents.ppo import ppo
from pgjax.agents.pqn import pqn
from pgjax.agents.props import props
from pgjax.agents.q_networks import (
    convolutional_q_network,
    layer_norm_q_network,
    q_network,
)
from pgjax.agents.reinforce import reinforce
from pgjax.agents.residual import residual_actor_critic, with_base_policy
from pgjax.agents.sac import sac
from pgjax.agents.taco import taco
from pgjax.agents.td3 import td3
from pgjax.agents.trpo import npg, trpo

__all__ = [
    "ActorCritic",
    "ActorQ",
    "Agent",
    "BayesNetCritic",
    "LinearHeadCritic",
    "Network",
    "a2c",
    "actor_critic",
    "actor_q",
    "beer",
    "behavior_cloning",
    "best_expert",
    "bn_mappo",
    "bounded_mean_policy",
    "composite_dqn",
    "convolutional_q_network",
    "critics",
    "ddpg",
    "deterministic_policy",
    "dqn",
    "expert_policy",
    "expert_routing",
    "fit_critics",
    "fixed_graph_network",
    "ggd_critics",
    "ggd_judge",
    "ggd_sac",
    "gumbel_routed",
    "hybrid_npg",
    "init_on_devices",
    "iql",
    "layer_norm_q_network",
    "learned_graph_network",
    "linear_head_critic",
    "mixture_actor_critic",
    "npg",
    "off_policy",
    "offline",
    "on_policy",
    "play",
    "policy_steps",
    "ppo",
    "pqn",
    "props",
    "q_network",
    "reinforce",
    "residual_actor_critic",
    "sac",
    "score_routed",
    "squashed_gaussian_policy",
    "taco",
    "td3",
    "train",
    "trpo",
    "value_network",
    "with_base_policy",
]
