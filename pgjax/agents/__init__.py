"""Agents on environments: each a composition of the library's parts, trained inside one program."""

from pgjax.agents import on_policy
from pgjax.agents.agent import Agent, train
from pgjax.agents.networks import ActorCritic, actor_critic
from pgjax.agents.ppo import ppo

__all__ = ["ActorCritic", "Agent", "actor_critic", "on_policy", "ppo", "train"]
