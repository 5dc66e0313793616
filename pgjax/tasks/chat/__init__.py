"""Chat models' text: tokenizers from a directory, conversations as masked tokens, stop strings."""

from pgjax.tasks.chat.conversations import (
    Conversation,
    batch,
    encode_conversation,
    encode_prompt,
    prompt_encoder,
)
from pgjax.tasks.chat.pieces import decode, encode, token_bytes
from pgjax.tasks.chat.stopping import stop_string_positions, truncate_at_stop
from pgjax.tasks.chat.tokenizers import (
    CHATML,
    check_vocabulary,
    load_tokenizer,
    pad_token_id,
    stop_token_ids,
)

__all__ = [
    "CHATML",
    "Conversation",
    "batch",
    "check_vocabulary",
    "decode",
    "encode",
    "encode_conversation",
    "encode_prompt",
    "load_tokenizer",
    "pad_token_id",
    "prompt_encoder",
    "stop_string_positions",
    "stop_token_ids",
    "token_bytes",
    "truncate_at_stop",
]
