"""Records that survive crashes and resumption, TensorBoard files, progress, tables, plots."""

import builtins
import json
import logging
import math
import os
import re
import signal
import struct
import subprocess
import sys
import textwrap
import time
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from pgjax.train import metrics


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # What an earlier test left to the garbage collector is no fault of these.
        warnings.simplefilter("ignore", pytest.PytestUnraisableExceptionWarning)
        yield


def lines_of(directory):
    return (directory / "metrics.jsonl").read_text().splitlines()


def without(monkeypatch, package):
    """Makes `import package` fail, as where it is not installed."""
    real = builtins.__import__

    def fake(name, *args, **kwargs):
        if name.split(".")[0] == package:
            raise ImportError(f"No module named {package!r}")
        return real(name, *args, **kwargs)

    for name in [n for n in sys.modules if n.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", fake)


def events_of(directory):
    """(step, tag, value) and ("start", step), from the files in order of name."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    found = []
    for path in sorted(directory.glob("events.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
            at += 12 + length + 4
            if event.HasField("session_log"):
                found.append(("start", event.step))
            for value in event.summary.value:
                found.append((event.step, value.tag, value.simple_value))
    return found


def test_records(tmp_path, caplog):
    with metrics.MetricsWriter(tmp_path / "a" / "b", tensorboard=False) as writer:
        writer.write(1, {"reward": jnp.float32(0.5), "tokens": np.int64(2**40), "ok": True})
        writer.write(2, {"reward": np.float64(1 / 3), "kl": jnp.inf}, phase="rl")
        with caplog.at_level(logging.WARNING):
            writer.write(3, {"reward": float("nan"), "kl": 0.5}, phase="rl")
            writer.write(4, {"reward": jnp.nan}, phase="rl")
    raw = [json.loads(line, parse_constant=pytest.fail) for line in lines_of(tmp_path / "a" / "b")]
    assert raw == [
        {"step": 1, "phase": "train", "reward": 0.5, "tokens": 2**40, "ok": 1},
        {"step": 2, "phase": "rl", "reward": 1 / 3, "kl": None},
        {"step": 3, "phase": "rl", "reward": None, "kl": 0.5},
        {"step": 4, "phase": "rl", "reward": None},
    ]
    assert [r.message[:27] for r in caplog.records] == [
        "kl is inf at step 2 of rl; ",
        "reward is nan at step 3 of ",
    ]
    rows = metrics.read_metrics(tmp_path / "a" / "b")
    assert math.isnan(rows[2]["reward"]) and rows[1]["reward"] == 1 / 3
    assert rows[0] == raw[0] and rows[0]["tokens"] == 2**40


def test_records_are_on_disk_at_once_and_go_on_after_reopening(tmp_path):
    first = metrics.MetricsWriter(tmp_path, tensorboard=False)
    first.write(1, {"x": 1})
    assert len(lines_of(tmp_path)) == 1
    first.close()
    first.close()
    with metrics.MetricsWriter(tmp_path, tensorboard=False) as second:
        second.write(2, {"x": 2})
    assert [row["step"] for row in metrics.read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_wrong_use(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(NotADirectoryError, match="is a file"):
            metrics.MetricsWriter(path)
    with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
        for value in ("high", None, np.zeros(2), [1.0], 1j):
            with pytest.raises(ValueError, match=r"values\['a'\]: expected a number"):
                writer.write(1, {"a": value})
        for name in ("step", "phase"):
            with pytest.raises(ValueError, match=f"{name}.* is a field of every record"):
                writer.write(1, {name: 1})
        assert lines_of(tmp_path) == []
    with pytest.raises(ValueError, match="closed"):
        writer.write(1, {})
    with pytest.raises(ValueError, match="closed"):
        writer.truncate_after(1)
    with pytest.raises(FileNotFoundError):
        metrics.read_metrics(tmp_path / "absent")


def test_any_torn_end_is_tolerated_and_repaired(tmp_path):
    with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"reward": step / 3, "name é": step})
    path = tmp_path / "metrics.jsonl"
    data = path.read_bytes()
    complete = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        # A line counts when it is whole; its newline may be missing.
        whole = sum(cut >= end - 1 for end in complete)
        assert [r["step"] for r in metrics.read_metrics(path)] == list(range(1, whole + 1))
        with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
            writer.write(9, {})
        assert [json.loads(x)["step"] for x in lines_of(tmp_path)] == [*range(1, whole + 1), 9]


def test_damage_elsewhere_is_an_error(tmp_path):
    for bad in ("{", "3", "[]", "nonsense"):
        (tmp_path / "m.jsonl").write_text(f'{{"step": 1}}\n{bad}\n{{"step": 2}}\n')
        with pytest.raises(ValueError, match=r"m.jsonl, line 2: not a JSON object"):
            metrics.read_metrics(tmp_path / "m.jsonl")


RUN = [
    *[("sft", s) for s in (1, 2)],
    ("sft_evaluation", 2),
    *[("sft", s) for s in (3, 4)],
    ("sft_evaluation", 4),
    *[("rl", s) for s in (1, 2)],
    ("rl_evaluation", 2),
    ("rl", 3),
]


@pytest.mark.parametrize(
    ("phase", "step", "kept"),
    [
        ("sft", 0, []),
        ("sft", 1, [("sft", 1)]),
        ("sft", 2, RUN[:3]),
        ("sft", 4, RUN[:6]),
        ("rl", 0, RUN[:6]),
        ("rl", 2, RUN[:9]),
        ("rl", 3, RUN),
        ("rl", 99, RUN),
        ("distil", 0, RUN),
    ],
)
@pytest.mark.parametrize("order", [None, ("sft", "rl", "distil")])
def test_truncate_after(tmp_path, phase, step, kept, order):
    with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
        for name, at in RUN:
            writer.write(at, {"x": at}, phase=name)
        assert writer.truncate_after(step, phase=phase, phases=order) == len(RUN) - len(kept)
        writer.write(step + 1, {}, phase=phase)
    rows = [(row["phase"], row["step"]) for row in metrics.read_metrics(tmp_path)]
    assert rows == [*kept, (phase, step + 1)]
    assert len(set(rows)) == len(rows)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_truncate_after_unknown_phases(tmp_path):
    with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {}, phase="sft")
        with pytest.raises(ValueError, match="'rl' is not one of sft"):
            writer.truncate_after(1, phase="rl", phases=("sft",))
        with pytest.raises(ValueError, match="the file has 'sft', not one of rl"):
            writer.truncate_after(1, phase="rl", phases=("rl",))
        assert len(lines_of(tmp_path)) == 1


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX")
    with metrics.MetricsWriter(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"reward": step / 2, "bad": math.nan}, phase="sft")
        writer.write(1, {"reward": 9.0}, phase="rl")
    assert events_of(tmp_path / "tensorboard" / "sft") == [
        (1, "reward", 0.5),
        (2, "reward", 1.0),
        (3, "reward", 1.5),
    ]
    with metrics.MetricsWriter(tmp_path) as writer:
        writer.truncate_after(2, phase="sft")
        writer.write(3, {"reward": 7.0}, phase="sft")
    assert events_of(tmp_path / "tensorboard" / "sft")[3:] == [("start", 3), (3, "reward", 7.0)]
    assert events_of(tmp_path / "tensorboard" / "rl") == [(1, "reward", 9.0), ("start", 0)]
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    seen = accumulator.EventAccumulator(str(tmp_path / "tensorboard" / "sft")).Reload()
    assert [(e.step, e.value) for e in seen.Scalars("reward")] == [(1, 0.5), (2, 1.0), (3, 7.0)]
    seen = accumulator.EventAccumulator(str(tmp_path / "tensorboard" / "rl")).Reload()
    assert seen.Scalars("reward") == []


def test_without_tensorboardx(tmp_path, monkeypatch, caplog):
    without(monkeypatch, "tensorboardX")
    with metrics.MetricsWriter(tmp_path) as writer:
        writer.write(1, {"x": 1})
        writer.write(2, {"x": 2}, phase="rl")
    assert [r.message for r in caplog.records if "tensorboardX is not installed" in r.message] == [
        caplog.records[0].message
    ]
    assert len(lines_of(tmp_path)) == 2 and not (tmp_path / "tensorboard").exists()


def test_heavy_packages_are_not_imported():
    # File by file: importing the package brings Flax, which imports rich.
    files = [m.__file__ for m in (metrics.records, metrics.terminal, metrics.plots)]
    code = f"import runpy, sys; [runpy.run_path(f) for f in {files}]; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"matplotlib", "rich", "tensorboardX"} & set(out.stdout.split())


# --- on the terminal -----------------------------------------------------------------------------


def run_progress(total, initial=0, **options):
    with metrics.progress(total, initial=initial, **options) as bar:
        for step in range(initial + 1, total + 1):
            bar.advance({"reward": step / 7, "other": 1.0})
        return bar


def test_plain_progress(capsys):
    bar = run_progress(1000, 200, fields=("reward", "kl"), description="rl")
    assert bar.completed == 1000
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == [f"{n}/1000" for n in range(300, 1001, 100)]
    assert lines[0].startswith("rl: 300/1000 (30%) ") and lines[0].endswith(" s  reward 42.86")
    assert "\x1b" not in "".join(lines)


def test_plain_progress_of_few_steps(capsys):
    run_progress(3)
    assert [x.split()[0] for x in capsys.readouterr().out.splitlines()] == ["1/3", "2/3", "3/3"]
    run_progress(0)
    run_progress(5, 5)
    assert capsys.readouterr().out == ""
    for total, initial in ((2, 3), (1, -1)):
        with pytest.raises(ValueError, match=f"initial={initial}"):
            run_progress(total, initial)


def test_progress_without_rich(capsys, monkeypatch):
    without(monkeypatch, "rich")
    with metrics.progress(1) as bar:
        bar.print("[red]text")
        bar.advance()
    assert capsys.readouterr().out.splitlines() == ["[red]text", "1/1 (100%) 0 s"]


TERMINAL = textwrap.dedent(
    """
    import time
    from pgjax.train import metrics
    with metrics.progress(4000, fields=("reward",), description="rl [x]") as bar:
        for step in range(4000):
            bar.advance({"reward": 0.25})
            if step == 5:
                bar.print("sample [bold]text")
            time.sleep(0.02)
    """
)


def test_terminal_progress_gives_the_cursor_back_on_interrupt():
    pty = pytest.importorskip("pty")
    pytest.importorskip("rich")
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", TERMINAL],
        stdout=slave,
        stderr=subprocess.PIPE,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "120"},
    )
    os.close(slave)
    output, deadline, interrupted = b"", time.monotonic() + 60, False
    try:
        while time.monotonic() < deadline:
            try:
                chunk = os.read(master, 65536)
            except OSError:  # the other end is closed
                break
            if not chunk:
                break
            output += chunk
            if not interrupted and b"sample" in output and output.count(b"reward") > 2:
                process.send_signal(signal.SIGINT)
                interrupted = True
        assert process.wait(timeout=30) != 0
        assert b"KeyboardInterrupt" in process.stderr.read()
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
        os.close(master)
    text = output.decode()
    assert "sample [bold]text" in text and "rl [x]" in text
    assert "reward 0.25" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    hide, show = "\x1b[?25l", "\x1b[?25h"
    assert text.rindex(show) > text.rindex(hide)


def test_summary_table():
    console = pytest.importorskip("rich.console")
    rows = [
        {"method": "GRPO [ours]", "accuracy": 0.81234567, "n": 1234567},
        {"method": "RLOO", "accuracy": math.nan, "seconds": 1.5e-5, "done": True},
    ]
    out = console.Console(width=90, file=None, record=True)
    with out.capture() as captured:
        out.print(metrics.summary_table(rows, title="Results"))
    text = captured.get()
    for part in ("Results", "GRPO [ours]", "0.8123", "1,234,567", "nan", "1.50e-05", "yes"):
        assert part in text
    head = next(line for line in text.splitlines() if "method" in line)
    assert head.split() == ["method", "accuracy", "n", "seconds", "done"]
    with out.capture() as captured:
        out.print(metrics.summary_table(rows, columns=["n", "method"]))
    assert "accuracy" not in captured.get()


# --- learning curves -----------------------------------------------------------------------------


def test_curves():
    rows = [
        {"step": 1, "phase": "sft", "loss": 2.0},
        {"step": 1, "phase": "rl", "reward": 0.5, "loss": 1.0},
        {"step": 2, "phase": "rl", "loss": math.nan},
    ]
    series = metrics.curves(rows, {"reward": "R", "loss": "loss [nats]"}, label="a", phase="rl")
    assert list(series) == ["R", "loss [nats]"]
    np.testing.assert_array_equal(series["R"]["a"], [[1.0], [0.5]])
    np.testing.assert_array_equal(series["loss [nats]"]["a"], [[1.0, 2.0], [1.0, math.nan]])
    assert [len(part) for part in metrics.curves(rows, {"no": "no"})["no"][""]] == [0, 0]


def test_smoothing_is_a_trailing_mean_without_nan():
    rng = np.random.default_rng(0)
    y = rng.normal(size=40)
    y[[3, 10, 11, 12]] = np.nan
    for window in (1, 2, 3, 7, 100):
        wanted = []
        for i in range(len(y)):
            part = [v for v in y[max(0, i - window + 1) : i + 1] if not math.isnan(v)]
            wanted.append(sum(part) / len(part) if part else math.nan)
        np.testing.assert_allclose(
            metrics.plots._smoothed(y, window), wanted, rtol=1e-12, atol=1e-12
        )


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    x = np.arange(50)
    series = {
        "reward": {"a": (x, x / 50), "b": (x, x / 25, x / 25 - 0.1, x / 25 + 0.1)},
        "KL [nats]": {"b": (x, np.where(x == 7, np.nan, x))},
        "one point": {"a": ([3], [1.0])},
        "nothing": {"a": ([], []), "b": (x, np.full(50, np.nan))},
    }
    metrics.plot_curves(series, tmp_path / "new" / "c.svg", smooth=3, x_label="update", title="T t")
    svg = (tmp_path / "new" / "c.svg").read_text()
    for text in ("reward", "KL [nats]", "one point", "no data", "update", "T t"):
        assert f"<!-- {text} -->" in svg
    metrics.plot_curves(series, tmp_path / "again.svg", smooth=3, x_label="update", title="T t")
    assert (tmp_path / "again.svg").read_text() == svg
    metrics.plot_curves(series, tmp_path / "c.png", columns=2)
    data = (tmp_path / "c.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width > 800 and height > 700


@pytest.mark.parametrize(
    ("series", "options", "message"),
    [
        ({}, {}, "at least one panel"),
        ({"p": {"a": ([1], [1, 2])}}, {}, r"series\['p'\]\['a'\]: .* one length"),
        ({"p": {"a": ([1], [1], [1])}}, {}, "low, high"),
        ({"p": {"a": ([[1]], [[1]])}}, {}, "rank 1"),
        ({"p": {"a": ([1], [1])}}, {"smooth": 0}, "at least 1"),
        ({"p": {"a": ([1], [1])}}, {"columns": 0}, "at least 1"),
    ],
)
def test_plot_errors(tmp_path, series, options, message):
    with pytest.raises(ValueError, match=message):
        metrics.plot_curves(series, tmp_path / "x.png", **options)
