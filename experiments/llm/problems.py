"""The problems of a run, in three parts, and their batches."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.llm.config import Data
from pgjax import tasks
from pgjax.tasks import chat, text_problems


@dataclasses.dataclass(frozen=True)
class Parts:
    """Problems to train on, to follow training with, and to judge it by."""

    train: text_problems.Problems
    validation: text_problems.Problems
    test: text_problems.Problems


def load(data: Data, task: str, test_task: str | None, seed: int) -> Parts:
    """The three parts; no question is in two of them."""
    train, held_out = text_problems.split(_load(data, task, data.split, seed), held_out=0.2)
    validation, test = text_problems.split(held_out, held_out=0.5, salt="test")
    if test_task is not None:
        test = _load(data, test_task, data.test_split, seed + 1)
    return Parts(train, validation, test)


def _load(data: Data, task: str, split: str, seed: int) -> text_problems.Problems:
    if task == "synthetic":
        return text_problems.synthetic(data.count, seed=seed)
    if task.endswith((".jsonl", ".json")) or pathlib.Path(task).exists():
        return text_problems.load_jsonl(task)
    directory = None if data.data_dir is None else str(data.data_dir)
    return text_problems.load_tfds(task, split, data_dir=directory)


def encoder(data: Data, tokenizer: Any) -> Callable[[str], np.ndarray]:
    """From a question to the prompt's token ids."""
    if data.prompt == "plain":
        return lambda question: chat.encode(tokenizer, question + data.suffix)
    return chat.prompt_encoder(tokenizer, system=data.system, suffix=data.suffix)


def evaluation_batches(
    problems: text_problems.Problems,
    data: Data,
    encode: Callable[[str], np.ndarray],
    pad: int,
    *,
    count: int,
    batch: int,
) -> list[dict[str, Any]]:
    """The first `count` problems in batches of one size; the last one is filled up by repetition.

    Rows that repeat a problem have `counts` false.
    """
    chosen = list(range(min(count, len(problems))))
    batches = []
    for start in range(0, len(chosen), batch):
        rows = chosen[start : start + batch]
        filled = rows + [rows[-1]] * (batch - len(rows)) if start else rows
        items = [problems[i] for i in filled]
        tokens = [encode(item["prompt"]) for item in items]
        width = next(w for w in sorted(data.prompt_lengths) if w >= max(map(len, tokens)))
        prompts = np.full((len(items), width), pad, np.int32)
        for row, ids in zip(prompts, tokens, strict=True):
            row[: len(ids)] = ids
        batches.append(
            {
                "prompts": prompts,
                "prompt_lengths": np.array([len(ids) for ids in tokens], np.int32),
                "references": [item["answer"] for item in items],
                "levels": np.array([item["level"] for item in items], np.int32),
                "counts": np.arange(len(items)) < len(rows),
            }
        )
    return batches


def demonstrations(
    problems: text_problems.Problems,
    data: Data,
    tokenizer: Any,
    pad: int,
    *,
    lengths: tuple[int, ...],
    batch_size: int,
    seed: int,
    shard_index: int = 0,
    shard_count: int = 1,
) -> tuple[Any, int]:
    """Endless batches of tokens and masks, and how many problems were too long for them."""

    def encode(item: Any) -> tuple[np.ndarray, np.ndarray]:
        answer = item.get("solution") or f"\\boxed{{{item['answer']}}}"
        if data.prompt == "plain":
            question = chat.encode(tokenizer, item["prompt"] + data.suffix)
            response = chat.encode(tokenizer, answer)
            end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
            tokens = np.concatenate([question, response, np.array(end, np.int32)])
            return tokens.astype(np.int32), np.arange(len(tokens)) >= len(question)
        messages = [
            {"role": "user", "content": item["prompt"] + data.suffix},
            {"role": "assistant", "content": answer},
        ]
        if data.system is not None:
            messages.insert(0, {"role": "system", "content": data.system})
        conversation = chat.encode_conversation(tokenizer, messages)
        return conversation.tokens, conversation.mask

    longest = max(lengths)
    fitting = problems.where(
        lambda p: len(encode({**p._asdict(), "prompt": p.question})[0]) <= longest,
        name=f"{problems.name}, at most {longest} tokens",
    )
    loader = tasks.loaders.examples_loader(
        fitting,
        encode=encode,
        length=lengths,
        batch_size=batch_size,
        seed=seed,
        shard_index=shard_index,
        shard_count=shard_count,
        pad=pad,
    )
    return loader, len(problems) - len(fitting)
