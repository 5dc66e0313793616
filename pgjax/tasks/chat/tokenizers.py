"""Opening a tokenizer, and the ids that end, stop and pad a row."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

# A chat template without surprises: no default system message, nothing stripped.
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_FILES = (
    *("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("vocab.json", "vocab.txt", "tekken.json", "tiktoken.model"),
)
_PADS = ("<|finetune_right_pad_id|>", "<|pad|>", "<pad>", "[PAD]")


def load_tokenizer(directory: str | os.PathLike[str]) -> Any:
    """Opens the tokenizer of a checkpoint's directory; nothing is downloaded and no code is run.

    Args:
      directory: holds `tokenizer.json` (or a SentencePiece model or a vocabulary),
        `tokenizer_config.json` and, for chat models, the chat template.

    Returns:
      a `transformers` tokenizer.

    Raises:
      ImportError: transformers is missing.
      FileNotFoundError: no such directory, or no tokenizer in it.
      ValueError: files that cannot be read as a tokenizer; no end of sequence, neither in the
        tokenizer nor in the directory's `generation_config.json`.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError("load_tokenizer needs transformers: pip install 'pgjax[hf]'") from error
    path = pathlib.Path(directory)
    if not path.is_dir():
        raise FileNotFoundError(f"directory: expected an existing directory, got {str(path)!r}")
    if not any((path / name).is_file() for name in _FILES):
        found = sorted(p.name for p in path.iterdir())
        raise FileNotFoundError(
            f"directory: expected one of {', '.join(_FILES)} in {str(path)!r}, found "
            f"{', '.join(found) or 'nothing'}"
        )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise ValueError(
            f"directory: {str(path)!r} does not hold a readable tokenizer: {error}"
        ) from error
    stop_token_ids(tokenizer, path)
    return tokenizer


def check_vocabulary(tokenizer: Any, config: Any) -> None:
    """Raises ValueError where the tokenizer has ids that the model has no embedding for.

    Models often have more rows than the tokenizer has ids, padded to a round number: that is fine.

    Args:
      tokenizer: a `transformers` tokenizer.
      config: a `DecoderConfig`, or anything with `vocab_size`.
    """
    highest = max(tokenizer.get_vocab().values())
    if highest >= config.vocab_size:
        tokens = tokenizer.convert_ids_to_tokens(highest)
        raise ValueError(
            f"tokenizer: has ids up to {highest} ({tokens!r}), but the model's vocab_size is "
            f"{config.vocab_size}; is this the tokenizer of another model?"
        )


def stop_token_ids(
    tokenizer: Any, generation_config: str | os.PathLike[str] | None = None
) -> tuple[int, ...]:
    """The ids that end an assistant's turn, in ascending order.

    They are the tokenizer's end of sequence, and those of the checkpoint's
    `generation_config.json`, which for chat models lists the end of turn as well.

    Args:
      tokenizer: a `transformers` tokenizer.
      generation_config: that file, or a directory that may hold it; None: the tokenizer alone.

    Raises:
      FileNotFoundError: a path that does not exist.
      ValueError: a file that is no JSON object or whose ids are not integers; no id at all.
    """
    ids = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    if generation_config is not None:
        path = pathlib.Path(generation_config)
        if not path.exists():
            raise FileNotFoundError(f"generation_config: no such file or directory, {str(path)!r}")
        if path.is_dir():
            path = path / "generation_config.json"
        if path.is_file():
            ids |= _listed(path)
    if not ids:
        raise ValueError(
            "tokenizer: it has no end of sequence; set `tokenizer.eos_token`, or `eos_token` in "
            "tokenizer_config.json, to the token that ends an assistant's turn"
        )
    return tuple(sorted(ids))


def _listed(path: pathlib.Path) -> set[int]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"generation_config: {str(path)!r} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"generation_config: expected a JSON object in {str(path)!r}")
    given = content.get("eos_token_id")
    listed = [] if given is None else given if isinstance(given, list) else [given]
    for value in listed:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"generation_config: eos_token_id: expected integers, got {given!r}")
    return set(listed)


def pad_token_id(tokenizer: Any) -> int:
    """What fills the rest of a row: the tokenizer's own padding, else a reserved one, else its eos.

    Rows are right-padded and come with masks and lengths, so padding with the end of sequence does
    no harm: nothing attends to it and nothing is learned from it.

    Raises:
      ValueError: a tokenizer with none of them.
    """
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    known = tokenizer.get_vocab()
    for name in _PADS:
        if name in known:
            return int(known[name])
    return stop_token_ids(tokenizer)[0]
