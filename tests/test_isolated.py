"""Verifiers and programs that hang, crash, flood memory and leave processes behind."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import bad_verifiers
import numpy as np
import pytest

from pgjax import rewards
from pgjax.rewards.isolated import Limits, VerifierPool, run_program, sandbox

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits are Linux's")
EXAMPLE = {"answer": "7", "sleep": "987.25"}


def running(*words):
    """How many processes have these words as arguments."""
    count = 0
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            count += all(word.encode() in path.read_bytes().split(b"\0") for word in words)
        except OSError:
            continue
    return count


def gone(*words):
    deadline = time.monotonic() + 5
    while running(*words) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not running(*words)


@pytest.fixture(scope="module")
def pool():
    with VerifierPool(bad_verifiers.verdict, limits=Limits(seconds=1.5)) as made:
        yield made


def judged(pool, *completions, **example):
    return pool.judge(completions, [EXAMPLE | example] * len(completions))


def test_good_completions_are_judged_as_in_this_process(pool):
    completions = ["7", "8", "7", "", "77"] * 20
    found, failures = judged(pool, *completions)
    expected, _ = rewards.call_verifier(
        bad_verifiers.verdict, completions, [EXAMPLE] * len(completions)
    )
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.float32 and failures == []
    assert judged(pool)[0].shape == (0,)


@pytest.mark.parametrize(
    ("bad", "error", "text"),
    [
        ("hang", TimeoutError, "no verdict in 1.5 s"),
        ("print", TimeoutError, "no verdict in 1.5 s"),
        ("raise", RuntimeError, "KeyError: 'no such answer'"),
        ("leave", RuntimeError, "SystemExit: 3"),
        ("exit", RuntimeError, "ended its process"),
        ("crash", RuntimeError, "ended its process"),
        ("flood", MemoryError, f"more than {1 << 30} bytes"),
        ("nan", ValueError, "returned nan"),
    ],
)
def test_a_bad_completion_costs_its_own_reward_alone(pool, bad, error, text):
    started = time.monotonic()
    found, failures = judged(pool, "7", bad, "8", "7")
    np.testing.assert_array_equal(found, np.float32([1, np.nan, 0, 1]))
    assert [f.index for f in failures] == [1]
    assert isinstance(failures[0].error, error) and text in str(failures[0].error)
    assert time.monotonic() - started < 30
    assert judged(pool, "7")[0] == 1


def test_what_a_verifier_leaves_running_is_killed(pool):
    found, failures = judged(pool, "child", "7", sleep="987.5")
    np.testing.assert_array_equal(found, [1, 1])
    assert failures == [] and gone("sleep", "987.5")


def test_a_mistake_in_the_verifier_is_an_error_and_the_pool_goes_on(pool):
    with pytest.raises(ValueError, match=r"expected one number for completion 1, got str: 'yes'"):
        judged(pool, "7", "text", "7", "7")
    np.testing.assert_array_equal(judged(pool, "7", "8", "7")[0], [1, 0, 1])
    with pytest.raises(ValueError, match="expected one for each of 1 completions, got 2"):
        pool.judge(["7"], [EXAMPLE] * 2)


def test_workers_know_no_secrets_and_no_accelerator(pool, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "x")
    with VerifierPool(bad_verifiers.verdict, workers=1) as fresh:
        np.testing.assert_array_equal(judged(fresh, "secrets", "accelerator")[0], [0, 1])


@pytest.mark.skipif(not sandbox.isolates(), reason="no namespaces here")
def test_the_network_is_there_on_demand(pool):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert np.isnan(judged(pool, "network", port=port)[0])
        with VerifierPool(bad_verifiers.verdict, workers=1, limits=Limits(network=True)) as open_:
            assert judged(open_, "network", port=port)[0] == 1


def test_without_namespaces_nothing_is_left_either(monkeypatch):
    monkeypatch.setattr(sandbox, "isolates", lambda: False)
    with VerifierPool(bad_verifiers.verdict, workers=1, limits=Limits(seconds=1)) as pool:
        found, _ = judged(pool, "child", "7", "hang", "flood", "7", sleep="987.75")
    np.testing.assert_array_equal(found, np.float32([1, 1, np.nan, np.nan, 1]))
    assert gone("sleep", "987.75")
    result = run_program(
        "import subprocess; subprocess.Popen(['sleep', '986.5'], start_new_session=True)"
    )
    assert result.returncode == 0 and gone("sleep", "986.5")


def test_what_cannot_be_loaded_is_said_at_once(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="verifier: cannot be pickled"):
        VerifierPool(lambda completion, example: 0.0)
    (tmp_path / "broken_verifier.py").write_text("def judge(c, e):\n    return 0.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    import broken_verifier

    (tmp_path / "broken_verifier.py").write_text("raise ImportError('needs a compiler')\n")
    with pytest.raises(RuntimeError, match="does not start: ImportError: needs a compiler"):
        VerifierPool(broken_verifier.judge).judge(["7"], [EXAMPLE])
    with pytest.raises(ValueError, match="workers"):
        VerifierPool(bad_verifiers.verdict, workers=0)
    with pytest.raises(ValueError, match=r"completions\[0\], examples\[0\]: cannot be pickled"):
        VerifierPool(bad_verifiers.verdict).judge([lambda: 0], [EXAMPLE])
    for bad in ({"seconds": 0}, {"memory_bytes": 0}, {"output_bytes": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Limits(**bad)


def test_a_closed_pool_leaves_no_process_and_starts_again():
    pool = VerifierPool(bad_verifiers.verdict, workers=2)
    assert pool.pids == ()
    assert judged(pool, "7", "8")[0].tolist() == [1, 0]
    ours = [pid for first in pool.pids for pid in (first, *sandbox.descendants(first))]
    assert len(pool.pids) == 2 and len(ours) > 2
    pool.close()
    pool.close()
    assert pool.pids == () and not any(sandbox.alive(pid) for pid in ours)
    assert judged(pool, "7")[0] == 1
    pool.close()


def test_rewards_of_texts_from_a_pool(pool):
    from types import SimpleNamespace

    from pgjax.train.text import host_reward

    reward = host_reward(pool, lambda ids: {7: "7", 8: "hang"}[ids[0]], lambda batch: [EXAMPLE])
    samples = SimpleNamespace(
        tokens=np.array([[7, 0], [8, 0]]), mask=np.array([[1, 0], [1, 0]], bool), prompt_ids=[0, 0]
    )
    np.testing.assert_array_equal(reward(samples, {}, None), np.float32([1, np.nan]))


def test_workers_end_when_this_process_is_killed():
    code = (
        "import sys, time, bad_verifiers\n"
        "from pgjax.rewards.isolated import VerifierPool, sandbox\n"
        "pool = VerifierPool(bad_verifiers.verdict, workers=1)\n"
        "pool.judge(['7'], [{'answer': '7'}])\n"
        "print(*pool.pids, *sandbox.descendants(pool.pids[0]), flush=True)\n"
        "pool.judge(['hang'], [{'sleep': '1', 'answer': ''}])\n"
    )
    path = os.pathsep.join([str(pathlib.Path(__file__).parent), *sys.path])
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
    )
    assert process.stdout is not None
    family = [int(word) for word in process.stdout.readline().split()]
    assert len(family) > 1
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 10
    while any(sandbox.alive(pid) for pid in family) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(sandbox.alive(pid) for pid in family)


def test_a_program_and_what_it_reads_and_prints():
    result = run_program("import sys; print(sum(int(x) for x in sys.stdin))", "1\n2\n3\n")
    assert result.returncode == 0 and result.stdout == "6\n" and result.stderr == ""
    assert result.ended_by == "" and 0 < result.seconds < 10
    failed = run_program("raise SystemExit(4)")
    assert failed.returncode == 4
    assert "ZeroDivisionError" in run_program("1 / 0").stderr


@pytest.mark.parametrize(
    ("source", "ended_by"),
    [
        ("import time; time.sleep(100)", "time"),
        ("while True: pass", "time"),
        ("import os; os.close(1); os.close(2); os.read(0, 1); import time; time.sleep(99)", "time"),
        ("while True: print('x' * 1000)", "output"),
        ("import os; os.fork(); os.fork(); os.read(0, 1)\nwhile True: pass", "time"),
    ],
)  # fmt: skip
def test_programs_are_ended_by_their_limits(source, ended_by):
    result = run_program(source, limits=Limits(seconds=1.0, output_bytes=5000))
    assert result.returncode is None and result.ended_by == ended_by
    assert result.seconds < 10 and len(result.stdout) <= 5000


def test_a_program_has_little_to_take_hold_of(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "x")
    limits = Limits(memory_bytes=1 << 28, file_bytes=1000)
    flood = run_program("x = bytearray(1 << 30)", limits=limits)
    assert flood.returncode == 1 and "MemoryError" in flood.stderr
    big = run_program("open('f', 'wb').write(b'x' * 10_000)", limits=limits)
    assert big.returncode != 0
    assert run_program("import os; print('SECRET_TOKEN' in os.environ)").stdout == "False\n"
    inside = run_program("import os; print(os.getcwd(), os.listdir())")
    where, _, names = inside.stdout.strip().partition(" ")
    assert names == "['program.py']" and not pathlib.Path(where).exists()
    left = run_program(
        "import subprocess; subprocess.Popen(['sleep', '986.25'], start_new_session=True)"
    )
    assert left.returncode == 0 and gone("sleep", "986.25")
