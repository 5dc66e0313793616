"""Reading of config.json in which no option goes unnoticed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

_MISSING: Any = object()

# Options that say nothing of the function from tokens to logits: of training, of generation, of
# files, of heads that are not loaded.
_HARMLESS = """
    architectures model_type transformers_version torch_dtype dtype auto_class _name_or_path
    _from_model_config _commit_hash _attn_implementation _attn_implementation_autoset
    attn_implementation cache_implementation use_cache output_attentions output_hidden_states
    return_dict return_dict_in_generate torchscript tokenizer_class prefix
    bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id
    initializer_range attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop
    router_aux_loss_coef output_router_logits router_jitter_noise pretraining_tp
    id2label label2id num_labels problem_type finetuning_task task_specific_params
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
    forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    is_llama_config transformers.js_config unsloth_fixed unsloth_version
"""
HARMLESS = frozenset(_HARMLESS.split())


class Options:
    """The options of one config.json, each of which is to be taken or known to be harmless.

    A missing option has the family's default, as in transformers.
    """

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.values = dict(values)
        self._defaults = defaults
        self._taken: set[str] = set()

    def take(self, *names: str, default: Any = _MISSING) -> Any:
        """The value under the first of `names` that is there; else the default under one."""
        self._taken.update(names)
        for name in names:
            if name in self.values:
                return self.values[name]
        for name in names:
            if name in self._defaults:
                return self._defaults[name]
        if default is _MISSING:
            raise ValueError(f"{names[0]} is missing")
        return default

    def integer(self, *names: str, minimum: int = 1) -> int:
        """An int of at least `minimum`."""
        value = self.take(*names)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ValueError(f"{names[0]}: expected an int of at least {minimum}, got {value!r}")
        return value

    def flag(self, name: str) -> bool:
        """A bool."""
        value = self.take(name)
        if not isinstance(value, bool):
            raise ValueError(f"{name}: expected true or false, got {value!r}")
        return value

    def optional(self, name: str) -> float | None:
        """A number or None."""
        value = self.take(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{name}: expected a number or null, got {value!r}")
        return value

    def only(self, name: str, *allowed: Any, why: str) -> None:
        """Raises ValueError unless the option, if it is there, has one of these values."""
        value = self.take(name, default=allowed[0])
        if value not in allowed:
            raise ValueError(f"{name} {value!r} is not supported: {why}")

    def finish(self, harmless: Collection[str] = ()) -> None:
        """Raises ValueError for options nobody asked for that might change the model.

        A value of null, false, or an empty list or object is that of an option not used.
        """
        unknown = {
            name: value
            for name, value in self.values.items()
            if name not in self._taken and name not in HARMLESS and name not in harmless
            and not (value is None or value is False or value == [] or value == {})
        }  # fmt: skip
        if unknown:
            listed = ", ".join(f"{name} {value!r}" for name, value in sorted(unknown.items()))
            raise ValueError(
                f"unknown options: {listed}; they may change the model. Where they do not, remove "
                "them from the file"
            )
