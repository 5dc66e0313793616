"""Verifiers and programs that may hang, crash, flood memory or leave processes behind."""

from pgjax.rewards.isolated.pool import VerifierPool
from pgjax.rewards.isolated.program import ProgramResult, run_program
from pgjax.rewards.isolated.sandbox import Limits

__all__ = ["Limits", "ProgramResult", "VerifierPool", "run_program"]
