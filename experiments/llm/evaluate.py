"""Accuracy of sampled answers under a verifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

import pgjax as pg
from experiments.llm.build import Policy
from experiments.llm.config import Evaluation
from pgjax.rewards import math_answers
from pgjax.tasks import chat
from pgjax.train import evaluation


def graded(
    policy: Policy,
    params: Any,
    batches: Sequence[dict[str, Any]],
    verifier: math_answers.MathVerifier,
    settings: Evaluation,
    seed: int,
) -> evaluation.Graded:
    """Samples and judges answers to all problems that count.

    For the majority vote answers are numbered by problem: those the verifier accepts are one
    answer however they are written, others are told apart by their text.
    """
    samples = 1 if settings.temperature == 0 else settings.samples
    columns: list[tuple[np.ndarray, ...]] = []
    for index, batch in enumerate(batches):
        out = pg.sampling.generate(
            policy.decoder,
            params["decoder"],
            batch["prompts"],
            batch["prompt_lengths"],
            jax.random.fold_in(jax.random.key(seed), index),
            num_samples=samples,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            stop_tokens=policy.stop_tokens,
            pad_token=policy.pad,
        )
        tokens, mask = pg.parallel.fetch((out.tokens, out.mask))
        texts = [
            chat.decode(policy.tokenizer, row[kept].tolist())
            for row, kept in zip(tokens, mask, strict=True)
        ]
        references = np.repeat(np.array(batch["references"], object), samples)
        scores = pg.parallel.on_first(
            lambda: verifier.grade_batch(texts, references.tolist())[0].tolist()  # noqa: B023
        )
        right = np.asarray(scores).reshape(-1, samples) > 0.5
        stated = [math_answers.extract_final(text) for text in texts]
        values, ok, reference = numbered(stated, right)
        counts = batch["counts"]
        lengths = mask.sum(-1).reshape(-1, samples)
        rows = (values, ok, reference, batch["levels"], lengths)
        columns.append(tuple(np.asarray(x)[counts] for x in rows))
    return evaluation.Graded(*(np.concatenate(c) for c in zip(*columns, strict=True)))


def numbered(
    stated: Sequence[str | None], right: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Answers as numbers in order of first appearance, and the right one's (-1 where none is)."""
    prompts, samples = right.shape
    values = np.zeros((prompts, samples), np.int32)
    ok = np.zeros((prompts, samples), bool)
    reference = np.full(prompts, -1, np.int32)
    for p in range(prompts):
        seen: dict[str | bool, int] = {}
        for g in range(samples):
            answer = stated[p * samples + g]
            name: str | bool | None = True if right[p, g] else answer
            if name is None:
                continue
            ok[p, g] = True
            values[p, g] = seen.setdefault(name, len(seen))
            if right[p, g]:
                reference[p] = values[p, g]
    return values, ok, reference


def overall(answers: evaluation.Graded) -> evaluation.Accuracy:
    """Accuracy over all problems, whatever their level."""
    as_one = answers._replace(levels=np.zeros_like(answers.levels))
    return evaluation.accuracy_by_level(as_one, k=answers.values.shape[1])[0]
