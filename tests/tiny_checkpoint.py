"""A tiny checkpoint with a tokenizer trained on the spot, as a directory of the hub's format."""

from __future__ import annotations

import pathlib

import jax

from pgjax import models
from pgjax.tasks import chat, text_problems


def tokenizer(vocab_size: int = 300):
    """Byte-level BPE over the synthetic word problems, with a ChatML template."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers import models as bpe
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(bpe.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    problems = text_problems.synthetic(200, seed=0)
    backend.train_from_iterator((p.question + p.solution for p in problems.problems), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=chat.CHATML,
    )


def make(directory: pathlib.Path, *, seed: int = 0, **changes) -> pathlib.Path:
    """Writes a small Llama with random weights; `changes` are of its `DecoderConfig`."""
    words = tokenizer()
    options = {
        "vocab_size": len(words),
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "mlp_size": 64,
        "max_length": 512,
        "norm_epsilon": 1e-5,
    }
    decoder, params = models.init(
        models.DecoderConfig(**{**options, **changes}), jax.random.key(seed)
    )
    tokens = {"eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    models.save_pretrained(directory, decoder, params, extra_config=tokens)
    words.save_pretrained(directory)
    return directory
