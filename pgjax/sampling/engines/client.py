"""Where a rollout server is, and requests to it with timeouts and retries."""

from __future__ import annotations

import dataclasses
import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

from pgjax import _checks
from pgjax.sampling.engines.protocols import COMPLETIONS, LOGPROBS, EngineError, Protocol

_RETRIED_STATUS = (408, 429)  # and all from 500 on
_LONGEST_WAIT = 60.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class HttpEngine:
    """Where a rollout server is and how it is talked to.

    Attributes:
      url: scheme, host and port, such as "http://localhost:8000".
      vocab_size: of the learner's model; ids outside it are an error.
      protocol: `COMPLETIONS` (vLLM), `SGLANG`, or one's own.
      model: the name under which the server knows the model; None: not sent.
      logprobs: what the server's log-probs belong to, "model", "tempered" or "sampled"; None: the
        protocol's default.
      concurrency: requests under way at the same time; one request is one prompt.
      timeout: seconds without an answer after which a request has failed.
      retries: how often a request that failed is sent again: no connection, no answer in time,
        status 408, 429 or from 500 on.
      backoff: seconds before the first retry, doubled before each further one; where the server
        says `Retry-After`, at least that. Never more than a minute.
      headers: sent with every request, such as an authorization.
      on_new_weights: called by `generate` with the learner's parameters before it samples; it has
        to bring them to the server and return when they are in use there.
    """

    url: str
    vocab_size: int
    protocol: Protocol = COMPLETIONS
    model: str | None = None
    logprobs: str | None = None
    concurrency: int = 64
    timeout: float = 600.0
    retries: int = 4
    backoff: float = 0.5
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    on_new_weights: Callable[[Any], None] | None = None

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url: expected http://… or https://…, got {self.url!r}")
        _checks.in_range("vocab_size", self.vocab_size, 1)
        _checks.one_of("logprobs", self.logprobs, (None, *LOGPROBS))
        _checks.in_range("concurrency", self.concurrency, 1)
        _checks.in_range("timeout", self.timeout, 0.0, low_open=True)
        _checks.in_range("retries", self.retries, 0)
        _checks.in_range("backoff", self.backoff, 0.0)

    def post(self, path: str, body: Any) -> Any:
        """The decoded answer to a JSON object posted to `path`, with the engine's retries.

        Raises:
          EngineError: the server could not be reached, refused, or answered no JSON.
        """
        url = self.url.rstrip("/") + path
        wait = self.backoff
        for attempt in range(self.retries + 1):
            request = urllib.request.Request(
                url,
                data=json.dumps(body).encode(),
                headers={"Content-Type": "application/json", **self.headers},
            )
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    content = response.read()
                break
            except urllib.error.HTTPError as error:
                text = error.read().decode(errors="replace")[:2000]
                cause = f"status {error.code}: {text}"
                retried = error.code in _RETRIED_STATUS or error.code >= 500
                asked = _seconds(error.headers.get("Retry-After"))
            except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
                cause = f"no answer: {getattr(error, 'reason', error) or type(error).__name__}"
                retried, asked = True, 0.0
            if not retried or attempt == self.retries:
                times = "once" if attempt == 0 else f"{attempt + 1} times"
                raise EngineError(f"{url}, asked {times}: {cause}")
            time.sleep(min(max(wait, asked), _LONGEST_WAIT))
            wait *= 2
        try:
            return json.loads(content) if content.strip() else None
        except ValueError as error:
            raise EngineError(f"{url}: expected JSON, got {content[:200]!r}") from error


def _seconds(header: str | None) -> float:
    try:
        return max(float(header), 0.0) if header is not None else 0.0
    except ValueError:  # a date
        return 0.0
