"""How a rollout server is asked and how its answers are read, one `Protocol` a kind of server."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

# What a server's log-probs belong to: the model itself; the tempered logits before top-k, top-p
# and min-p; or the distribution that was sampled from.
LOGPROBS = ("model", "tempered", "sampled")


class EngineError(RuntimeError):
    """A rollout server could not be reached, refused, or answered something unusable."""


class Request(NamedTuple):
    """What is asked of the server for one prompt; filters that are off are None."""

    prompt: list[int]
    num_samples: int
    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    stop_tokens: tuple[int, ...]
    seed: int


class Choice(NamedTuple):
    """One completion as the server gave it; None where its answer lacks the field."""

    tokens: list[int] | None
    logprobs: list[float] | None
    finish_reason: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
    """One kind of server.

    Attributes:
      name: used in error messages.
      path: appended to the engine's URL.
      body: the request as a JSON object, given the request and the engine's `model`.
      choices: the completions in a decoded answer, in the order of the samples.
      logprobs: what its log-probs belong to where it is not configured otherwise; see `LOGPROBS`.
      help: what makes it answer with token ids and log-probs.
    """

    name: str
    path: str
    body: Callable[[Request, str | None], dict[str, Any]]
    choices: Callable[[Any], list[Choice]]
    logprobs: str
    help: str


def _completions_body(request: Request, model: str | None) -> dict[str, Any]:
    # Every setting is sent, also where it is off: a server would otherwise take the defaults of
    # the checkpoint's generation config.
    body: dict[str, Any] = {
        "prompt": request.prompt,
        "n": request.num_samples,
        "max_tokens": request.max_new_tokens,
        "temperature": request.temperature,
        "top_k": -1 if request.top_k is None else request.top_k,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "min_p": 0.0 if request.min_p is None else request.min_p,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": request.seed,
        "logprobs": 1,
        "stop_token_ids": list(request.stop_tokens),
        "ignore_eos": True,  # only `stop_tokens` end a completion
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }
    return body if model is None else {"model": model, **body}


def _completions_choices(answer: Any) -> list[Choice]:
    choices = sorted(answer["choices"], key=lambda choice: choice.get("index", 0))
    return [_completions_choice(choice) for choice in choices]


def _completions_choice(choice: Mapping[str, Any]) -> Choice:
    logprobs = choice.get("logprobs") or {}
    tokens = choice.get("token_ids")
    if tokens is None:
        names = logprobs.get("tokens") or []
        if names and all(str(name).startswith("token_id:") for name in names):
            tokens = [int(name.removeprefix("token_id:")) for name in names]
    return Choice(
        tokens=tokens,
        logprobs=logprobs.get("token_logprobs"),
        finish_reason=choice.get("finish_reason"),
    )


def _generate_body(request: Request, model: str | None) -> dict[str, Any]:
    del model  # the native route serves one model
    return {
        "input_ids": request.prompt,
        "sampling_params": {
            "n": request.num_samples,
            "max_new_tokens": request.max_new_tokens,
            "temperature": request.temperature,
            "top_k": -1 if request.top_k is None else request.top_k,
            "top_p": 1.0 if request.top_p is None else request.top_p,
            "min_p": 0.0 if request.min_p is None else request.min_p,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "sampling_seed": request.seed,
            "stop_token_ids": list(request.stop_tokens),
            # With `ignore_eos` SGLang looks at no stop token at all.
            "ignore_eos": not request.stop_tokens,
        },
        "return_logprob": True,
    }


def _generate_choices(answer: Any) -> list[Choice]:
    choices = []
    for item in answer if isinstance(answer, list) else [answer]:
        meta = item["meta_info"]
        pairs = meta.get("output_token_logprobs")  # (log-prob, token id, text or null)
        reason = meta.get("finish_reason")
        tokens = item.get("output_ids")
        if tokens is None and pairs is not None:
            tokens = [pair[1] for pair in pairs]
        choices.append(
            Choice(
                tokens=tokens,
                logprobs=None if pairs is None else [pair[0] for pair in pairs],
                finish_reason=reason.get("type") if isinstance(reason, Mapping) else reason,
            )
        )
    return choices


COMPLETIONS = Protocol(
    name="completions",
    path="/v1/completions",
    body=_completions_body,
    choices=_completions_choices,
    logprobs="model",
    help="vLLM needs a version with `return_token_ids` or `return_tokens_as_token_ids`",
)
"""OpenAI's `/v1/completions` with vLLM's extensions.

Token ids are read from `token_ids`, or from log-prob tokens written "token_id:123". vLLM's
log-probs are the model's own; with `--logprobs-mode processed_logprobs` they are those of the
sampling distribution (say so with `HttpEngine(logprobs="sampled")`).
"""

SGLANG = Protocol(
    name="sglang",
    path="/generate",
    body=_generate_body,
    choices=_generate_choices,
    logprobs="tempered",
    help="SGLang answers with both where `return_logprob` is set",
)
"""SGLang's native `/generate`.

Its log-probs are taken after the temperature and before the filters (the model's own where
`SGLANG_RETURN_ORIGINAL_LOGPROB` is set: say so with `HttpEngine(logprobs="model")`). The seed only
has an effect with `--enable-deterministic-inference`. The model's own end-of-sequence token also
ends a completion and has to be among `stop_tokens`.
"""
