"""Experiments by two processes with one command each: the same run as by one."""

import json
import subprocess
import sys

import devices
import numpy as np
import pytest
import tiny_checkpoint
from test_processes import free_port

from pgjax.train.metrics import repeats

TINY = """
    --model.hidden-size 16 --model.num-layers 1 --model.num-heads 2 --model.num-kv-heads 2
    --model.mlp-size 32 --data-preset micro9 --warmup.steps 6 --warmup.levels 1 2
    --warmup.batch-size 16 --rl.steps 4 --rl.prompts 8 --rl.samples 4 --rl.levels 1 2
    --evaluation.levels 1 2 --evaluation.test-prompts 8 --evaluation.validation-prompts 8
    --evaluation.every 2 --checkpoint-every 2 --show-every 2
"""
COMMON = """
    --data.suffix= --data.prompt-lengths 32 64 --tuning.dtype float32 --tuning.microbatches 2
    --evaluation.test-prompts 4 --evaluation.validation-prompts 4 --evaluation.max-new-tokens 6
    --evaluation.samples 2 --evaluation.batch 4 --checkpoint-every 1 --show-every 1
"""
LLM = {
    "grpo_llm": """
        --tuning.train lora --rl.steps 2 --rl.prompts 4 --rl.samples 2 --rl.max-new-tokens 6
        --objective copo
    """,
    "sft": "--steps 2 --batch-size 8 --lengths 64 96",
}


def command(program, arguments, processes, changes=None):
    """Exit status, output and errors of each of the processes."""
    address = ["--processes.coordinator", f"127.0.0.1:{free_port()}"]
    running = [
        subprocess.Popen(
            [sys.executable, "-m", f"experiments.{program}", *arguments]
            + (
                [*address, "--processes.count", str(processes), "--processes.index", str(i)]
                if processes > 1
                else []
            )
            + (changes or {}).get(i, []),
            env=devices.environment(1),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]
    try:
        outputs = [process.communicate(timeout=400) for process in running]
    finally:
        for process in running:
            process.kill()
    return [(p.returncode, *o) for p, o in zip(running, outputs, strict=True)]


def records(directory):
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if repeats(k)} for line in lines]


def same_records(one, two):
    assert len(one) == len(two) > 0
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            if isinstance(value, str):
                assert value == b[name]
            else:
                np.testing.assert_allclose(b[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_the_main_job(tmp_path):
    """The same curve; half of it is then gone on with by another number of processes."""
    program = "grpo_random_calculation"
    options = [*TINY.split(), "--data-dir", str(tmp_path / "data")]
    for name, processes in (("one", 1), ("two", 2)):
        done = command(program, [*options, "--out", str(tmp_path / name)], processes)
        assert [code for code, _, _ in done] == [0] * processes, done[-1][2][-3000:]
        assert "avg@8 before" in done[0][1]
        if processes == 2:
            assert done[1][1].replace("[Gloo]", "").count("avg@") == 0
    same_records(records(tmp_path / "one"), records(tmp_path / "two"))
    # One command more finds the directory taken, in both processes; --resume goes on alone.
    done = command(program, [*options, "--out", str(tmp_path / "two")], 2)
    assert [code for code, _, _ in done] == [2, 2]
    assert all("already holds a run" in errors for _, _, errors in done)
    longer = ["--resume", "--out", str(tmp_path / "two"), "--rl.steps", "6"]
    ((code, _, errors),) = command(program, longer, 1)
    assert code == 0, errors[-3000:]
    assert [r["step"] for r in records(tmp_path / "two") if r["phase"] == "rl"] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]
    done = command(
        program,
        [*options, "--out", str(tmp_path / "three")],
        2,
        {1: ["--seed", "1", "--rl.learning-rate", "1e-3"]},
    )
    assert [code for code, _, _ in done] == [2, 2]
    for _, _, errors in done:
        assert "config.seed: 0 in 0, 1 in 1" in errors and "config.rl.learning_rate" in errors
    assert not (tmp_path / "three").exists()


@pytest.mark.parametrize("program", LLM)
def test_a_checkpoint(tmp_path, program):
    """Prompts of several widths, a verifier on the host, and an export."""
    pytest.importorskip("math_verify")
    model = tiny_checkpoint.make(tmp_path / "model")
    task = tmp_path / "task.jsonl"
    lines = [
        {"question": f"{a}{' + 0' * (a % 3 * 4)} + {b}?", "answer": f"It is {a + b}.\n#### {a + b}"}
        for a in range(8)
        for b in range(8)
    ]
    task.write_text("\n".join(map(json.dumps, lines)))
    options = ["--model", str(model), "--task", str(task), *COMMON.split(), *LLM[program].split()]
    for name, processes in (("one", 1), ("two", 2)):
        done = command(program, [*options, "--out", str(tmp_path / name)], processes)
        assert [code for code, _, _ in done] == [0] * processes, done[-1][2][-3000:]
    same_records(records(tmp_path / "one"), records(tmp_path / "two"))
    files = ["model/model.safetensors"]
    if program == "grpo_llm":
        files.append("adapter/adapter_model.safetensors")
    for file in files:
        one, two = (_tensors(tmp_path / name / file) for name in ("one", "two"))
        assert one.keys() == two.keys()
        for key, value in one.items():
            np.testing.assert_allclose(two[key], value, atol=1e-5)


def _tensors(path):
    from safetensors.numpy import load_file

    return load_file(path)
