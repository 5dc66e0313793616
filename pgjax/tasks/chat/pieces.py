"""Text to ids and back, and the exact bytes that each id stands for."""

from __future__ import annotations

import functools
import re
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def encode(tokenizer: Any, text: str) -> np.ndarray:
    """Token ids of a text, without special tokens of the tokenizer's own: int32 `[N]`."""
    return np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)


def decode(tokenizer: Any, tokens: Iterable[int], *, special: bool = False) -> str:
    """The text of ids, exactly: no spaces are tidied up.

    With a byte-level tokenizer that does not normalise, `decode(encode(x)) == x` for every text.
    Bytes that are not valid UTF-8 (a completion cut inside a character) become U+FFFD; ids beyond
    the tokenizer's, which a model with a padded vocabulary can sample, are left out.

    Args:
      tokenizer: a `transformers` tokenizer.
      tokens: ids.
      special: whether special tokens (end of turn, padding) are written out; they are left out
        by default, as a verifier wants.
    """
    ids = [int(t) for t in tokens]
    return tokenizer.decode(
        ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False
    )


def token_bytes(tokenizer: Any, tokens: Iterable[int]) -> list[bytes]:
    """The UTF-8 bytes of each token; added tokens stand for the text they are written as.

    A character may be spread over several tokens, so single tokens need not be valid UTF-8; their
    concatenation is the text (SentencePiece vocabularies may put a space in front). An id beyond
    the tokenizer's, which a model with a padded vocabulary can sample, stands for no bytes.

    Raises:
      ValueError: a negative id.
    """
    table = _table(tokenizer)
    return [table.bytes_of(tokenizer, int(token)) for token in tokens]


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of the tokens that are control characters rather than text."""
    return _table(tokenizer).special


@functools.cache
def _alphabet() -> dict[str, int]:
    """The printable characters by which byte-level vocabularies write bytes (GPT-2's)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


class _Table:
    """Bytes by id, filled as ids are seen."""

    def __init__(self, tokenizer: Any) -> None:
        added = dict(tokenizer.added_tokens_decoder)
        self.added = {int(i): str(getattr(t, "content", t)) for i, t in added.items()}
        control = {int(i) for i, t in added.items() if getattr(t, "special", False)}
        self.special = frozenset(control | {int(i) for i in tokenizer.all_special_ids})
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = None if backend is None else backend.decoder
        # A decoder's state is its JSON description; there is no other way to ask for its kind.
        self.byte_level = decoder is not None and b"ByteLevel" in decoder.__getstate__()
        self.size = len(tokenizer)
        self.known: dict[int, bytes] = {}

    def bytes_of(self, tokenizer: Any, token: int) -> bytes:
        found = self.known.get(token)
        if found is None:
            found = self.known[token] = self._make(tokenizer, token)
        return found

    def _make(self, tokenizer: Any, token: int) -> bytes:
        if token in self.added:
            return self.added[token].encode()
        if token < 0:
            raise ValueError(f"tokens: expected ids of at least 0, got {token}")
        name = tokenizer.convert_ids_to_tokens(token)
        if name is None:
            return b""
        if self.byte_level:
            alphabet = _alphabet()
            if all(c in alphabet for c in name):
                return bytes(alphabet[c] for c in name)
            return name.encode()
        byte = _BYTE.fullmatch(name)
        return bytes([int(byte[1], 16)]) if byte else name.replace("▁", " ").encode()


_tables: weakref.WeakKeyDictionary[Any, _Table] = weakref.WeakKeyDictionary()


def _table(tokenizer: Any) -> _Table:
    found = _tables.get(tokenizer)
    if found is None or found.size != len(tokenizer):  # tokens may be added later
        found = _tables[tokenizer] = _Table(tokenizer)
    return found


def spans_of_tokens(tokenizer: Any, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens of a whole text and the part of it that each one writes.

    Byte-level vocabularies say exactly which bytes a token is. Where the tokens' bytes are not the
    text's (a tokenizer that normalises), the offsets the tokenizer reports are used.

    Returns:
      tokens int32 `[N]`, starts and ends int `[N]`, in bytes of the text's UTF-8.
    """
    tokens = encode(tokenizer, text)
    pieces, whole = token_bytes(tokenizer, tokens), text.encode()
    joined = b"".join(pieces)
    shift = {whole: 0, b" " + whole: 1}.get(joined)
    if shift is not None:
        ends = np.cumsum([len(p) for p in pieces], dtype=np.int64) - shift
        starts = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
        return tokens, np.maximum(starts, 0), ends
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            "tokenizer: it changes the text and reports no offsets; expected a fast tokenizer "
            "(one with a tokenizer.json)"
        )
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return (tokens, *_byte_offsets(text, found["offset_mapping"]))


def _byte_offsets(text: str, offsets: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Character offsets as byte offsets, without gaps: spaces left out belong to what follows."""
    position = np.concatenate([[0], np.cumsum([len(c.encode()) for c in text], dtype=np.int64)])
    starts, ends, reached = [], [], 0
    for start, end in offsets:
        starts.append(min(start, reached))
        ends.append(end)
        reached = max(reached, end)
    # Tokens of one character share its offsets and all start where it starts.
    for i, (start, end) in enumerate(offsets):
        if i and (start, end) == tuple(offsets[i - 1]):
            starts[i] = starts[i - 1]
    return position[starts], position[ends]
