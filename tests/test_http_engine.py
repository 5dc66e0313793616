"""The rollout client against a server of its own: layout, log-probs, corrections, every failure."""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import socket
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pgjax as pg
from pgjax import models, objectives, sampling, train
from pgjax.sampling import engines

VOCAB, STOP, WIDTH = 7, 5, 8
CONFIG = models.DecoderConfig(
    vocab_size=VOCAB, hidden_size=16, num_layers=1, num_heads=4, mlp_size=24, max_length=40
)
DECODER = models.FunctionalDecoder(CONFIG)
PROMPTS = [[1, 2, 3], [4], [6, 6, 1, 2, 3], [2, 4]]


@functools.cache
def params(scale=1.0):
    rng = np.random.default_rng(11)
    return jax.tree.map(
        lambda x: jnp.asarray(scale * 0.4 * rng.normal(size=x.shape), x.dtype),
        models.abstract_params(CONFIG),
    )


class Server:
    """A rollout server that samples from a tiny decoder, with faults to order.

    `faults`: one a request, in order of arrival: a status to answer with, "drop" to close the
    connection, or "hang" to be silent for a second. `change(answer)` edits each answer.
    """

    def __init__(self, params, *, style="vllm", processed=False):
        self.params, self.style, self.processed = params, style, processed
        self.faults, self.requests = [], []
        self.change = lambda answer: answer
        self.retry_after = None
        self.active = self.most_active = 0
        self.lock = threading.Lock()

    def complete(self, prompt, n, budget, stops, seed, options):
        tokens, lengths = sampling.pad_prompts([prompt], bucket_sizes=[WIDTH])
        samples = sampling.generate(
            DECODER, self.params, tokens, lengths, jax.random.key(seed),
            num_samples=n, max_new_tokens=budget, stop_tokens=stops, **options,
        )  # fmt: skip
        logprobs = samples.behavior_logprobs if self.processed else samples.logprobs
        for row, kept, values, cut in zip(
            *map(np.asarray, (samples.tokens, samples.mask, logprobs, samples.truncated)),
            strict=True,
        ):
            yield row[kept].tolist(), values[kept].tolist(), "length" if cut else "stop"

    def answer(self, path, body):
        if path == "/update_weights_from_disk":
            self.params = params(float(body["model_path"]))
            return None
        settings = body if self.style != "sglang" else body["sampling_params"]
        options = {"temperature": settings["temperature"]}
        if settings["top_k"] != -1:
            options["top_k"] = settings["top_k"]
        if self.style == "sglang":
            assert path == "/generate" and body["return_logprob"]
            assert settings["ignore_eos"] == (not settings["stop_token_ids"])
            completions = self.complete(
                body["input_ids"], settings["n"], settings["max_new_tokens"],
                settings["stop_token_ids"], settings["sampling_seed"], options,
            )  # fmt: skip
            items = [
                {
                    "output_ids": ids,
                    "meta_info": {
                        "output_token_logprobs": [
                            [x, i, None] for x, i in zip(values, ids, strict=True)
                        ],
                        "finish_reason": {"type": reason},
                    },
                }
                for ids, values, reason in completions
            ]
            return items if len(items) > 1 else items[0]
        assert path == "/v1/completions" and body["logprobs"] == 1 and body["ignore_eos"]
        assert not (settings["temperature"] == 0 and body["n"] > 1)  # as vLLM does
        completions = self.complete(
            body["prompt"], body["n"], body["max_tokens"], body["stop_token_ids"], body["seed"],
            options,
        )  # fmt: skip
        choices = []
        for index, (ids, values, reason) in enumerate(completions):
            choice = {
                "index": index,
                "finish_reason": reason,
                "logprobs": {
                    "token_logprobs": values,
                    "tokens": [f"token_id:{i}" for i in ids],
                },
            }
            if self.style == "vllm":
                choice["token_ids"] = ids
            choices.append(choice)
        return {"choices": choices[::-1]}  # the order of the indices is what counts


@contextlib.contextmanager
def serve(server):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):  # the base class's name
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                server.requests.append((self.path, body, dict(self.headers)))
                fault = server.faults.pop(0) if server.faults else None
                server.active += 1
                server.most_active = max(server.most_active, server.active)
            try:
                status, content = self.reply(body, fault)
            finally:  # before it is sent: a client that has the answer may ask again at once
                with server.lock:
                    server.active -= 1
            if fault == "drop":
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            with contextlib.suppress(OSError):  # a client that has gone
                self.send_response(status)
                if server.retry_after is not None:
                    self.send_header("Retry-After", server.retry_after)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        def reply(self, body, fault):
            if fault == "hang":
                threading.Event().wait(1.0)
            if isinstance(fault, int):
                return fault, b"the cause is this"
            if fault in ("hang", "drop"):
                return 200, b""
            answer = server.change(server.answer(self.path, body))
            return 200, answer if isinstance(answer, bytes) else json.dumps(answer).encode()

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{httpd.server_address[1]}"
        finally:
            httpd.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


def run(url, weights=None, *, prompts=PROMPTS, key=0, engine=None, **options):
    tokens, lengths = sampling.pad_prompts(prompts, bucket_sizes=[WIDTH])
    defaults = {"num_samples": 3, "max_new_tokens": 6, "stop_tokens": (STOP,)}
    client = engines.HttpEngine(
        url=url, vocab_size=VOCAB, **{"backoff": 0.0, "timeout": 30.0, **(engine or {})}
    )
    return engines.generate(
        client, weights, tokens, lengths, jax.random.key(key), **{**defaults, **options}
    )


@jax.jit
def all_logits(params, tokens):
    return DECODER.logits(params, DECODER.apply(params, tokens))


@jax.jit
def learner_logprobs(params, tokens, mask):
    return jnp.where(mask, pg.logprobs.from_logits(all_logits(params, tokens), tokens), 0.0)


STYLES = {
    "vllm": {},
    "token_id strings": {},
    "sglang": {"protocol": engines.SGLANG},
}


@pytest.mark.parametrize("style", STYLES)
def test_samples_have_the_layout_of_generate_and_the_learners_logprobs(style):
    server = Server(params(), style=style)
    with serve(server) as url:
        samples = run(url, pad_token=4, engine=STYLES[style])
        again = run(url, pad_token=4, engine=STYLES[style])
        other = run(url, pad_token=4, engine=STYLES[style], key=1)
    local = jax.eval_shape(
        functools.partial(sampling.generate, DECODER, num_samples=3, max_new_tokens=6),
        params(), *sampling.pad_prompts(PROMPTS, bucket_sizes=[WIDTH]), jax.random.key(9),
    )  # fmt: skip
    assert jax.tree.structure(samples) == jax.tree.structure(local)
    for name in ("tokens", "mask", "behavior_logprobs", "lengths", "truncated", "prompt_ids"):
        found, wanted = getattr(samples, name), getattr(local, name)
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype), name
    early = 0
    for row in range(12):
        prompt = PROMPTS[row // 3]
        tokens, end = np.asarray(samples.tokens[row]), int(samples.lengths[row])
        completion = tokens[len(prompt) : end].tolist()
        assert tokens[: len(prompt)].tolist() == prompt
        assert (tokens[end:] == 4).all()
        assert STOP not in completion[:-1]
        assert bool(samples.truncated[row]) == (completion[-1] != STOP)
        assert len(completion) == 6 or completion[-1] == STOP
        early += len(completion) < 6
        wanted = (np.arange(14) >= len(prompt)) & (np.arange(14) < end)
        np.testing.assert_array_equal(samples.mask[row], wanted)
    assert early > 0
    np.testing.assert_array_equal(samples.prompt_ids, np.repeat(np.arange(4), 3))
    expected = learner_logprobs(params(), samples.tokens, samples.mask)
    np.testing.assert_allclose(samples.behavior_logprobs, expected, atol=1e-4)
    np.testing.assert_array_equal(samples.logprobs, samples.behavior_logprobs)
    assert int(samples.steps) == 6
    np.testing.assert_array_equal(samples.tokens, again.tokens)
    assert (np.asarray(samples.tokens) != np.asarray(other.tokens)).any()
    assert len({tuple(r) for r in np.asarray(samples.tokens[:3]).tolist()}) > 1


def test_to_rollout_and_mismatch_weights_one_where_the_server_is_the_learner():
    with serve(Server(params())) as url:
        samples = run(url)
    rollout = train.to_rollout(samples, jnp.ones(12))
    proximal = learner_logprobs(params(), rollout.tokens, rollout.mask)
    weights = pg.surrogates.truncated_weights(proximal, rollout.behavior_logprobs)
    np.testing.assert_allclose(weights, 1.0, atol=1e-4)
    with serve(Server(params(0.8))) as url:
        stale = train.to_rollout(run(url), jnp.ones(12))
    proximal = learner_logprobs(params(), stale.tokens, stale.mask)
    weights = pg.surrogates.truncated_weights(proximal, stale.behavior_logprobs, cap=1e6)
    assert np.abs(np.asarray(weights)[np.asarray(stale.mask)] - 1.0).max() > 0.05


def test_the_corrected_gradient_of_a_perturbed_server_is_the_true_one():
    """All answers to one prompt of one token, weighted by the server's own probabilities."""
    server = Server(params(0.8))
    prompt = PROMPTS[0]

    def next_logits(p):
        return all_logits(p, jnp.array([prompt]))[0, -1]

    def every_token(answer):
        choice = answer["choices"][0]
        logprobs = np.asarray(jax.nn.log_softmax(next_logits(server.params)))
        return {
            "choices": [
                {**choice, "index": v, "token_ids": [v], "finish_reason": "length",
                 "logprobs": {"token_logprobs": [float(logprobs[v])]}}
                for v in range(VOCAB)
            ]
        }  # fmt: skip

    server.change = every_token
    with serve(server) as url:
        samples = run(url, prompts=[prompt], num_samples=VOCAB, max_new_tokens=1, stop_tokens=())
    rewards = jnp.asarray(np.random.default_rng(3).normal(size=VOCAB), jnp.float32)
    rollout = train.to_rollout(samples, rewards)
    np.testing.assert_array_equal(rollout.tokens[:, 3], np.arange(VOCAB))
    behavior = np.exp(np.asarray(rollout.behavior_logprobs[:, 3], np.float64))
    assert behavior.sum() == pytest.approx(1.0, abs=1e-5)

    def flat(tree):
        return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])

    @jax.jit
    def of_each_answer(rollout, cap):
        def gradient(one):
            one = jax.tree.map(lambda x: x[None], one)

            def loss(p):
                now = learner_logprobs(p, one.tokens, one.mask)
                proximal = jax.lax.stop_gradient(now)
                ready = objective.prepare(one.replace(proximal_logprobs=proximal))
                return objective.value(pg.PolicyOutputs(logprobs=now), ready)

            return jax.grad(loss)(params())

        weights = functools.partial(pg.surrogates.truncated_weights, cap=cap)
        objective = objectives.with_mismatch_weights(objectives.reinforce(), weights=weights)
        return jax.lax.map(gradient, rollout)

    def expected(sampled, cap):
        each = of_each_answer(sampled, cap)
        return -sum(behavior[v] * flat(jax.tree.map(lambda g, v=v: g[v], each)) for v in range(7))

    truth = flat(jax.grad(lambda p: jax.nn.softmax(next_logits(p)) @ rewards)(params()))

    def distance(found):
        return np.abs(found - truth).max() / np.abs(truth).max()

    learner = np.asarray(jax.nn.softmax(next_logits(params())))
    assert (learner / behavior).max() < 100 and (learner / behavior > 1.05).any()
    assert distance(expected(rollout, 100.0)) < 1e-4
    # Log-probs taken for the learner's own leave the weights at 1, and the bias where it was.
    taken = learner_logprobs(params(), rollout.tokens, rollout.mask)
    uncorrected = distance(expected(rollout.replace(behavior_logprobs=taken), 100.0))
    assert uncorrected > 0.02
    # An active cap is a bias as well, and the smaller one.
    assert 1e-3 < distance(expected(rollout, 1.05)) < uncorrected


def test_what_is_sent():
    server = Server(params())
    with serve(server) as url:
        run(
            url + "/",
            temperature=1.0,
            stop_tokens=(STOP, 0),
            engine={"model": "tiny", "headers": {"Authorization": "Bearer x"}},
        )
    bodies = {tuple(body["prompt"]): body for _, body, _ in server.requests}
    assert set(bodies) == {tuple(p) for p in PROMPTS}  # no padding
    body = bodies[(1, 2, 3)]
    seeds = [b["seed"] for b in bodies.values()]
    assert len(set(seeds)) == 4 and all(0 <= s < 2**31 for s in seeds)
    expected = {
        "model": "tiny", "n": 3, "max_tokens": 6, "temperature": 1.0, "top_p": 1.0, "top_k": -1,
        "min_p": 0.0, "stop_token_ids": [STOP, 0], "return_token_ids": True,
        "return_tokens_as_token_ids": True, "repetition_penalty": 1.0,
    }  # fmt: skip
    assert {k: body[k] for k in expected} == expected
    assert all(h["Authorization"] == "Bearer x" for _, _, h in server.requests)


def test_concurrency_is_bounded_and_used():
    server = Server(params())
    barrier = threading.Barrier(2, timeout=20)

    def together(answer):
        barrier.wait()  # passes only with two requests under way
        return answer

    server.change = together
    with serve(server) as url:
        run(url, engine={"concurrency": 2})
    assert server.most_active == 2


# --- distributions ---------------------------------------------------------------------------


def test_greedy_asks_once_and_has_behaviour_logprob_zero():
    server = Server(params())
    with serve(server) as url:
        samples = run(url, temperature=0.0)
    assert [body["n"] for _, body, _ in server.requests] == [1] * 4
    for row in range(12):
        prompt, length = sampling.pad_prompts([PROMPTS[row // 3]], bucket_sizes=[WIDTH])
        local = sampling.generate(
            DECODER, params(), prompt, length, jax.random.key(0), num_samples=1,
            max_new_tokens=6, stop_tokens=(STOP,), temperature=0.0,
        )  # fmt: skip
        for name in ("tokens", "mask", "behavior_logprobs", "lengths", "truncated"):
            np.testing.assert_array_equal(getattr(samples, name)[row], getattr(local, name)[0])
        np.testing.assert_allclose(samples.logprobs[row], local.logprobs[0], atol=1e-4)


def test_a_server_of_processed_logprobs_may_temper_and_filter():
    options = {"temperature": 0.7, "top_k": 3}
    with serve(Server(params(), processed=True)) as url:
        samples = run(url, engine={"logprobs": "sampled"}, **options)
        raw = engines.HttpEngine(url=url, vocab_size=VOCAB)
        assert raw.logprobs is None
    mask = np.asarray(samples.mask)
    assert np.isnan(np.asarray(samples.logprobs)[mask]).all()  # not told by the server
    assert (np.asarray(samples.logprobs)[~mask] == 0).all()
    logits = all_logits(params(), samples.tokens) / 0.7
    filtered = sampling.filter_logits(logits, top_k=3)
    expected = np.where(mask, pg.logprobs.from_logits(filtered, samples.tokens), 0.0)
    np.testing.assert_allclose(samples.behavior_logprobs, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("engine", "options", "message"),
    [
        ({}, {"temperature": 0.7}, "temperature: expected to be off, since .* are 'model'"),
        ({}, {"top_p": 0.9}, "top_k, top_p, min_p: expected to be off"),
        ({"protocol": engines.SGLANG}, {"min_p": 0.1}, "are 'tempered' and would not be"),
        ({"logprobs": "model", "protocol": engines.SGLANG}, {"temperature": 2.0}, "'model'"),
    ],
)
def test_settings_whose_logprobs_would_be_another_distributions_are_refused(
    engine, options, message
):
    with pytest.raises(ValueError, match=message):
        run("http://127.0.0.1:1", engine=engine, **options)


def test_tempered_logprobs_serve_a_temperature():
    server = Server(params(), style="sglang", processed=True)
    with serve(server) as url:
        samples = run(url, engine={"protocol": engines.SGLANG}, temperature=0.7, stop_tokens=())
    logits = all_logits(params(), samples.tokens) / 0.7
    expected = np.where(samples.mask, pg.logprobs.from_logits(logits, samples.tokens), 0.0)
    np.testing.assert_allclose(samples.behavior_logprobs, expected, atol=1e-4)
    assert np.isnan(np.asarray(samples.logprobs)[np.asarray(samples.mask)]).all()


# --- weights ---------------------------------------------------------------------------------


def test_new_weights_reach_the_server_before_it_samples():
    server = Server(params(0.8))
    with serve(server) as url:
        pushed = []

        def push(weights):
            pushed.append(weights)
            client = engines.HttpEngine(url=url, vocab_size=VOCAB)
            assert client.post("/update_weights_from_disk", {"model_path": "1.0"}) is None

        samples = run(url, params(), engine={"on_new_weights": push})
        run(url, None, engine={"on_new_weights": push})
    assert len(pushed) == 1 and pushed[0] is params()
    assert server.requests[0][0] == "/update_weights_from_disk"
    expected = learner_logprobs(params(), samples.tokens, samples.mask)
    np.testing.assert_allclose(samples.behavior_logprobs, expected, atol=1e-4)


# --- failures --------------------------------------------------------------------------------


@pytest.mark.parametrize("faults", [[503], [429, 500], ["drop"], ["hang"], [408, "drop", 502, 504]])
def test_passing_failures_are_retried_and_change_nothing(faults):
    server = Server(params())
    with serve(server) as url:
        expected = run(url)
        before = len(server.requests)
        server.faults = list(faults)
        found = run(url, engine={"timeout": 0.5 if "hang" in faults else 30.0})
    assert len(server.requests) - before == 4 + len(faults)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.behavior_logprobs, expected.behavior_logprobs)


def test_waits_grow_and_heed_retry_after(monkeypatch):
    waits = []
    monkeypatch.setattr("pgjax.sampling.engines.client.time.sleep", waits.append)
    server = Server(params())
    with serve(server) as url:
        server.faults = [500] * 4
        run(url, prompts=[[1]], engine={"backoff": 0.5})
        assert waits == [0.5, 1.0, 2.0, 4.0]
        waits.clear()
        server.faults, server.retry_after = [429, 429], "3"
        run(url, prompts=[[1]], engine={"backoff": 2.0})
        assert waits == [3.0, 4.0]
        waits.clear()
        server.faults, server.retry_after = [429, 429], "Wed, 21 Oct 2015 07:28:00 GMT"
        run(url, prompts=[[1]], engine={"backoff": 40.0})
        assert waits == [40.0, 60.0]


def test_lasting_failures_say_what_was_answered():
    server = Server(params())
    with serve(server) as url:
        server.faults = [503] * 3
        with pytest.raises(
            engines.EngineError, match=r"/v1/completions, asked 3 times: status 503: the cause is"
        ):
            run(url, prompts=[[1]], engine={"retries": 2})
        before = len(server.requests)
        server.faults = [400]
        with pytest.raises(engines.EngineError, match="asked once: status 400: the cause is this"):
            run(url, prompts=[[1]])
        assert len(server.requests) == before + 1  # a refusal is not asked again
        server.faults = ["drop"] * 2
        with pytest.raises(engines.EngineError, match="asked 2 times: no answer"):
            run(url, prompts=[[1]], engine={"retries": 1})
        server.faults = ["hang"]
        with pytest.raises(engines.EngineError, match="no answer: timed out"):
            run(url, prompts=[[1]], engine={"retries": 0, "timeout": 0.1})
    with pytest.raises(engines.EngineError, match="asked 2 times: no answer: .*refused"):
        run(url, prompts=[[1]], engine={"retries": 1})


def edit(**changes):
    """A change of the answer's last choice; None removes a field."""

    def change(answer):
        choice = answer["choices"][0]
        for name, value in changes.items():
            if value is None:
                choice.pop(name, None)
            else:
                choice[name] = value
        return answer

    return change


def values(*logprobs, tokens=()):
    return {"token_logprobs": list(logprobs), "tokens": list(tokens)}


BAD = {
    "no ids": (edit(token_ids=None, logprobs=values(-1.0, tokens=["a"])), "expected token ids"),
    "no log-probs": (edit(logprobs=None), "expected log-probs, got none; vLLM needs"),
    "lengths": (
        edit(token_ids=[1, 2, 5], logprobs=values(-1.0, -1.0)),
        "expected a log-prob for each token, got 2 for 3 tokens",
    ),
    "vocabulary": (
        edit(token_ids=[1, 7, 5], logprobs=values(-1, -1, -1)),
        r"expected ids in \[0, 7\), got 7",
    ),
    "type": (edit(token_ids=["1"], logprobs=values(-1)), r"expected ids in \[0, 7\), got 1"),
    "positive": (edit(token_ids=[5], logprobs=values(0.5)), "expected log-probs, finite"),
    "null": (edit(token_ids=[5], logprobs=values(None)), "expected log-probs, finite"),
    "long": (
        edit(token_ids=[1] * 7, logprobs=values(*[-1] * 7), finish_reason="length"),
        "expected 1 to 6 tokens, got 7",
    ),
    "empty": (edit(token_ids=[], logprobs=values()), "expected 1 to 6 tokens, got 0"),
    "reason": (
        edit(token_ids=[1], logprobs=values(-1), finish_reason="abort"),
        "expected finish reason 'stop' or 'length', got 'abort'",
    ),
    "other stop": (
        edit(token_ids=[1, 2], logprobs=values(-1, -1), finish_reason="stop"),
        r"expected one of the stop tokens \[5\] at its end, got 2",
    ),
    "past its end": (
        edit(token_ids=[1, 5, 2], logprobs=values(-1, -1, -1), finish_reason="length"),
        "expected its end at the stop token 5, got more tokens",
    ),
    "few": (lambda a: {"choices": a["choices"][:2]}, "expected 3 completions, got 2"),
    "shape": (lambda a: {"error": "x"}, "expected an answer of the completions protocol, got"),
    "no JSON": (lambda a: b"<html>", "expected JSON, got b'<html>'"),
}


@pytest.mark.parametrize("case", BAD)
def test_unusable_answers_are_errors(case):
    change, message = BAD[case]
    server = Server(params())
    server.change = change
    with serve(server) as url, pytest.raises(engines.EngineError, match=message):
        run(url, prompts=[[1, 2, 3]])


def test_a_server_with_a_shorter_context_truncates():
    server = Server(params())
    server.change = edit(token_ids=[1, 2], logprobs=values(-1, -2), finish_reason="length")
    with serve(server) as url:
        samples = run(url, prompts=[[1, 2, 3]])
    assert bool(samples.truncated[2]) and int(samples.lengths[2]) == 5


def test_bad_arguments():
    for options, message in (
        ({"url": "localhost:8000"}, "url: expected http://"),
        ({"vocab_size": 0}, "vocab_size: expected a number in"),
        ({"logprobs": "raw"}, "logprobs: expected one of None, 'model', 'tempered', 'sampled'"),
        ({"concurrency": 0}, "concurrency: expected a number in"),
        ({"timeout": 0.0}, "timeout: expected a number in"),
        ({"retries": -1}, "retries: expected a number in"),
        ({"backoff": -0.1}, "backoff: expected a number in"),
    ):
        with pytest.raises(ValueError, match=message):
            engines.HttpEngine(**{"url": "http://x", "vocab_size": 7, **options})
    for options, message in (
        ({"stop_tokens": (9,)}, r"stop_tokens: expected ids in \[0, 7\)"),
        ({"temperature": -1.0}, "temperature: expected a number in"),
        ({"prompts": [[9]]}, r"prompts: expected ids in \[0, 7\)"),
        ({"num_samples": 0}, "num_samples: expected a number in"),
    ):
        with pytest.raises(ValueError, match=message):
            run("http://127.0.0.1:1", **options)
