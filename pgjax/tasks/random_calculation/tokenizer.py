"""The fixed vocabulary of 19 symbols, one character a token."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

PAD = 0
EOS = 1
CHARACTERS = "0123456789+-*/()="
VOCABULARY = ("<pad>", "<eos>", *CHARACTERS)
VOCAB_SIZE = len(VOCABULARY)
DIGIT_0 = VOCABULARY.index("0")
EQUALS = VOCABULARY.index("=")
_IDS = {c: i for i, c in enumerate(VOCABULARY) if i > EOS}


def encode(text: str) -> np.ndarray:
    """Token ids of a text, without an end of sequence.

    Args:
      text: characters of "0123456789+-*/()=" only; spaces are not part of the vocabulary.

    Returns:
      int32 `[len(text)]`, ids in [2, 19).

    Raises:
      ValueError: a character outside the vocabulary, with its position.
    """
    try:
        return np.array([_IDS[c] for c in text], np.int32)
    except KeyError as error:
        raise ValueError(
            f"text: expected characters of {CHARACTERS!r}, got {error.args[0]!r} at position "
            f"{text.index(error.args[0])} of {text!r}"
        ) from None


def decode(tokens: Iterable[int]) -> str:
    """The text of a row of ids up to its first end of sequence; padding is left out.

    Args:
      tokens: ids in [0, 19).

    Raises:
      ValueError: an id outside the vocabulary.
    """
    characters = []
    for token in tokens:
        t = int(token)
        if not 0 <= t < VOCAB_SIZE:
            raise ValueError(f"tokens: expected ids in [0, {VOCAB_SIZE}), got {t}")
        if t == EOS:
            break
        if t != PAD:
            characters.append(VOCABULARY[t])
    return "".join(characters)
