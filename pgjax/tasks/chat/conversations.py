"""Conversations as tokens, with a mask of exactly what the assistant wrote."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from pgjax import _checks
from pgjax.tasks.chat import pieces

Message = Mapping[str, Any]
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Conversation(NamedTuple):
    """One conversation.

    Attributes:
      tokens: exactly those of the whole rendered conversation.
      mask: true on the assistant's tokens: what it wrote and the token that ended its turn.
      turn_ids: which of the assistant's turns a masked token belongs to, counted from 0; -1
        elsewhere.
    """

    tokens: Int[np.ndarray, " T"]
    mask: Bool[np.ndarray, " T"]
    turn_ids: Int[np.ndarray, " T"]


def _render(
    tokenizer: Any, messages: Sequence[Message], *, tools: Any, prompt: bool, **options: Any
) -> str:
    return tokenizer.apply_chat_template(
        list(messages), tools=tools, tokenize=False, add_generation_prompt=prompt, **options
    )


def _check(tokenizer: Any, messages: Sequence[Message]) -> None:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "tokenizer: it has no chat template; set `tokenizer.chat_template`, for instance to "
            "`chat.CHATML`, or put the model's chat_template.jinja into the tokenizer's directory"
        )
    if isinstance(messages, str | Mapping) or not len(messages):
        raise ValueError(
            f"messages: expected a non-empty list of role/content mappings, got {messages!r:.80}"
        )
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message:
            raise ValueError(f"messages: expected message {i} to have a role, got {message!r:.80}")


def encode_prompt(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    tools: Sequence[Any] | None = None,
    **options: Any,
) -> list[int]:
    """Tokens of a conversation up to where the assistant's next turn begins.

    Args:
      tokenizer: a `transformers` tokenizer with a chat template.
      messages: mappings with `role`, `content` and whatever else the template reads.
      tools: tool descriptions for the template.
      options: variables of the template, such as `enable_thinking=False`.

    Returns:
      ids, with the header of the assistant's turn (`add_generation_prompt`) at the end.

    Raises:
      ValueError: no chat template, no messages, a message without a role.
    """
    _check(tokenizer, messages)
    text = _render(tokenizer, messages, tools=tools, prompt=True, **options)
    return pieces.encode(tokenizer, text).tolist()


def prompt_encoder(
    tokenizer: Any, *, system: str | None = None, suffix: str = "", **options: Any
) -> Callable[[str], np.ndarray]:
    """A function from a question to its prompt's tokens, for the loaders; it remembers results.

    Args:
      tokenizer: a `transformers` tokenizer with a chat template.
      system: content of a system message in front.
      suffix: put after every question, such as an instruction on the form of the answer.
      options: variables of the template.
    """

    @functools.lru_cache(maxsize=1 << 17)
    def encode(question: str) -> np.ndarray:
        head = [] if system is None else [{"role": "system", "content": system}]
        messages = [*head, {"role": "user", "content": question + suffix}]
        tokens = np.array(encode_prompt(tokenizer, messages, **options), np.int32)
        tokens.flags.writeable = False  # it is handed out again
        return tokens

    return encode


def encode_conversation(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    tools: Sequence[Any] | None = None,
    max_length: int | None = None,
    last_turn_only: bool = False,
    **options: Any,
) -> Conversation:
    """Tokens of a whole conversation and the mask of the assistant's.

    The mask covers each assistant turn's text and the token that ends it; it leaves out the header
    before and a line break after, and everything that system, user and tools say. A template that
    marks the assistant's text itself (`{% generation %}`) is taken at its word. Otherwise turn i is
    what rendering `messages[:i+1]` adds to rendering `messages[:i]` with the generation prompt, up
    to the last special token in it. Positions are found in the tokens of the whole text, which is
    never tokenised in pieces. A token that joins the end of the header with the start of the text
    (a turn that begins with a line break) is not the assistant's and stays out of the mask.

    Args:
      tokenizer: a `transformers` tokenizer with a chat template.
      messages: mappings with `role`, `content` and whatever else the template reads.
      tools: tool descriptions for the template.
      max_length: most tokens that are accepted; None: any number.
      last_turn_only: mask only the last assistant turn. It works for templates that render earlier
        turns differently once others follow.
      options: variables of the template, such as `enable_thinking=False`.

    Raises:
      ValueError: no chat template, no messages, no assistant turn; a template whose rendering of a
        turn changes with what follows, or that ends a turn by no special token; a conversation
        longer than `max_length`.
    """
    _check(tokenizer, messages)

    def render(part: Sequence[Message], *, prompt: bool) -> str:
        return _render(tokenizer, part, tools=tools, prompt=prompt, **options)

    assistant = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if not assistant:
        raise ValueError("messages: expected at least one assistant message, got none")
    text = render(messages, prompt=False)
    tokens, starts, ends = pieces.spans_of_tokens(tokenizer, text)
    if max_length is not None and len(tokens) > max_length:
        raise ValueError(
            f"max_length: the conversation takes {len(tokens)} tokens, got {max_length}"
        )
    if _marks_generation(tokenizer, tools):
        spans = _marked_spans(tokenizer, messages, tools, text, options)
        spans = spans[-1:] if last_turn_only else spans
        ended = spans
    else:
        chosen = assistant[-1:] if last_turn_only else assistant
        spans = [_rendered_span(render, messages, i, text) for i in chosen]
        special = pieces.special_ids(tokenizer)
        control = np.array([int(t) in special for t in tokens], bool)
        ended = [
            (span[0], _end_of_turn(span, starts, ends, control, i))
            for span, i in zip(spans, chosen, strict=True)
        ]
    turn_ids = np.full(len(tokens), -1, np.int32)
    for turn, (start, end) in enumerate(ended):
        turn_ids[(starts >= start) & (ends <= end)] = turn
    return Conversation(tokens, turn_ids >= 0, turn_ids)


def _marks_generation(tokenizer: Any, tools: Any) -> bool:
    template = tokenizer.get_chat_template(tools=tools)
    return bool(_GENERATION.search(template))


def _bytes(text: str, position: int) -> int:
    return len(text[:position].encode())


def _marked_spans(
    tokenizer: Any, messages: Sequence[Message], tools: Any, text: str, options: dict[str, Any]
) -> list[tuple[int, int]]:
    """Byte spans of the template's own generation blocks."""
    from transformers.utils.chat_template_utils import render_jinja_template

    found: Any = render_jinja_template(
        conversations=[[dict(m) for m in messages]],
        tools=tools,
        chat_template=tokenizer.get_chat_template(tools=tools),
        return_assistant_tokens_mask=True,
        **{**tokenizer.special_tokens_map, **options},
    )
    (rendered,), (spans,) = found  # one conversation in, one out
    if rendered != text:
        raise ValueError("tokenizer: its chat template renders differently when it is asked twice")
    return [(_bytes(text, start), _bytes(text, end)) for start, end in spans]


def _rendered_span(
    render: Callable[..., str], messages: Sequence[Message], index: int, text: str
) -> tuple[int, int]:
    """Byte span of what message `index` adds to the text, without the header."""
    if index == 0:
        raise ValueError(
            "messages: expected a message before the assistant's first turn; without "
            "{% generation %} blocks in the template its header cannot be told from its text"
        )
    before = render(messages[:index], prompt=True)
    after = render(messages[: index + 1], prompt=False)
    if not after.startswith(before):
        raise ValueError(
            f"tokenizer: its chat template is not prefix-stable: the prompt for message {index} "
            "is not how the rendered turn begins, so the assistant's tokens cannot be told from "
            "the header; put {% generation %} blocks into the template"
        )
    if not text.startswith(after):
        raise ValueError(
            f"tokenizer: its chat template is not prefix-stable: it renders message {index} "
            "differently once others follow, as templates do that strip earlier thinking. Pass "
            "last_turn_only=True with one conversation per assistant turn (messages[:i + 1]), "
            "which is what the model sees when it writes that turn"
        )
    return _bytes(text, len(before)), _bytes(text, len(after))


def _end_of_turn(
    span: tuple[int, int], starts: np.ndarray, ends: np.ndarray, control: np.ndarray, index: int
) -> int:
    """Where the last special token within the span ends."""
    inside = control & (starts >= span[0]) & (ends <= span[1]) & (ends > starts)
    if not inside.any():
        raise ValueError(
            f"tokenizer: its chat template ends the assistant's message {index} by no special "
            "token, so a model trained on it would not learn to stop"
        )
    return int(ends[np.flatnonzero(inside)[-1]])


def batch(
    conversations: Sequence[Conversation],
    *,
    pad_token: int,
    widths: Sequence[int] | None = None,
) -> dict[str, np.ndarray]:
    """Right-padded rows.

    Args:
      conversations: B of them, at least one.
      pad_token: fills the rest of a row; see `pad_token_id`.
      widths: allowed row lengths, so that few programs are compiled: the smallest that holds the
        longest conversation is taken. None: exactly that long.

    Returns:
      `tokens` int32 `[B, T]`, `mask` bool `[B, T]` and `turn_ids` int32 `[B, T]` (-1 on padding).

    Raises:
      ValueError: no conversations, or one that fits no width.
    """
    if not len(conversations):
        raise ValueError("conversations: expected at least one, got none")
    longest = max(len(c.tokens) for c in conversations)
    width = longest
    if widths is not None:
        for allowed in widths:
            _checks.in_range("widths", allowed, 1)
        fitting = [w for w in widths if w >= longest]
        if not fitting:
            raise ValueError(
                f"widths: a conversation takes {longest} tokens, got widths {tuple(widths)}"
            )
        width = min(fitting)
    shape = (len(conversations), width)
    tokens = np.full(shape, pad_token, np.int32)
    mask, turn_ids = np.zeros(shape, np.bool_), np.full(shape, -1, np.int32)
    for row, conversation in enumerate(conversations):
        length = len(conversation.tokens)
        tokens[row, :length], mask[row, :length], turn_ids[row, :length] = conversation
    return {"tokens": tokens, "mask": mask, "turn_ids": turn_ids}
