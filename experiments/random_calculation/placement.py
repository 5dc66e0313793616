"""Which devices sample and which learn."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import Mesh

import pgjax as pg
from experiments.random_calculation import build
from experiments.random_calculation.config import Config


def meshes(config: Config) -> tuple[Mesh, Mesh | None]:
    """The learner's, and that of the devices which only sample, if there are such."""
    wanted = config.placement.sampling_mesh
    if not wanted:
        return pg.parallel.make_mesh(config.mesh), None
    devices = jax.devices()
    count = math.prod(pg.parallel.parse_mesh(wanted).values())
    if not 0 < count < len(devices):
        raise ValueError(
            f"placement.sampling_mesh: expected the number of each axis, and fewer than the "
            f"{len(devices)} devices there are, got {wanted!r}"
        )
    learners, samplers = devices[:-count], devices[-count:]
    return (
        pg.parallel.make_mesh(config.mesh, devices=learners),
        pg.parallel.make_mesh(wanted, devices=samplers),
    )


def split_step(
    config: Config,
    decoder: pg.models.FunctionalDecoder,
    mesh: Mesh,
    sampling_mesh: Mesh,
    update: Any,
    reference: Any,
    sampling: dict[str, Any],
) -> pg.train.SplitStep:
    """The step where the two work at once."""
    sampler = dataclasses.replace(decoder, mesh=sampling_mesh)
    whole = pg.parallel.replicated(sampling_mesh)
    # One spurious reward asks the initial model as well, where it samples.
    initial = jax.device_put(reference, whole) if config.reward == "majority_incorrect" else None
    rows = {m: pg.parallel.batch_sharding(m) for m in (mesh, sampling_mesh)}
    return pg.train.SplitStep(
        pg.train.make_collect(sampler, build.make_reward(config, sampler, initial), **sampling),
        update,
        staleness=config.placement.staleness,
        rollout_shardings=whole,
        place_prompts=lambda batch: jax.device_put(batch, rows[sampling_mesh]),
        place_rollout=lambda rollout: jax.device_put(rollout, rows[mesh]),
        reference_params=reference,
    )
