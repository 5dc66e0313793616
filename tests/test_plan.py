"""The planner, on a model small enough to count by hand."""

import json
import pathlib
import subprocess
import sys

import devices
import pytest

from experiments import plan
from experiments.planning import sizes

ROOT = pathlib.Path(__file__).parent.parent
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128,
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip

MIXTURE = {
    **LLAMA, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "head_dim": 8,
    "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip


def planned(directory, mesh, rows, model=LLAMA):
    (directory / "tiny").mkdir(exist_ok=True)
    (directory / "tiny" / "config.json").write_text(json.dumps(model))
    arguments = [
        "--model", str(directory / "tiny"), "--mesh", mesh, "--rows", str(rows), "--length", "16",
        "--prompt-length", "4", "--samples", "2", "--dtype", "float32", "--out", str(directory),
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "experiments.plan", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "training step: fits" in done.stdout and "decoding step: fits" in done.stdout
    where = directory / f"tiny_{mesh.replace(',', '_')}"
    assert (where / "plan.png").read_bytes()[:4] == b"\x89PNG"
    found = json.loads((where / "plan.json").read_text())
    assert ("no equal parts" in done.stdout) == (found["prompts"] % found["row_ways"] > 0)
    return found


def test_bytes_held_and_sent(tmp_path):
    four, sixteen = planned(tmp_path, "fsdp=4", 8), planned(tmp_path, "data=4,fsdp=4", 32)
    layer = 32 * (32 + 2 * 16) + 32 * 32 + 3 * 32 * 64 + 2 * 32
    tables = 2 * 128 * 32
    assert four["parameters"] == 3 * layer + tables + 32
    assert four["active"] == four["parameters"] - 128 * 32
    for found in (four, sixteen):
        assert found["update"]["exact"] and found["decode"]["exact"]
        memory = found["update"]["memory"]
        assert memory["parameters"] == 4 * found["parameters"] // 4  # four bytes, four parts
        assert 2 * memory["parameters"] <= memory["optimizer"] <= 2 * memory["parameters"] + 64
        # Two layers' keys and values: prompts once, completions of two samples.
        slots = 4 + 2 * 12
        rows = 4 if found is four else 16
        assert found["decode"]["memory"]["cache"] == pytest.approx(
            2 * 3 * rows * 2 * slots * 8 * 4 / found["devices"], abs=rows * 4
        )
        sent = found["update"]["sent"]["all-gather, each layer"]
        assert sent == 2 * 3 * layer * 4 * 3 / 4  # forward and backward
    # Four times the devices, as many rows on each: gathering costs a device no more.
    assert (
        sixteen["update"]["sent"]["all-gather, each layer"]
        == four["update"]["sent"]["all-gather, each layer"]
    )


def test_prompts_that_cannot_be_divided_are_on_every_device(tmp_path):
    found = planned(tmp_path, "fsdp=4", 4)
    assert (found["prompts"], found["row_ways"]) == (2, 4)
    whole = 2 * 3 * 2 * 2 * (4 + 2 * 12) * 8 * 4
    assert found["decode"]["memory"]["cache"] == pytest.approx(whole, abs=16)


def test_experts_stay_on_their_devices(tmp_path):
    found = planned(tmp_path, "fsdp=2,expert=4", 16, MIXTURE)
    expert = 3 * 32 * 16
    attention = 32 * (32 + 2 * 16) + 32 * 32 + 2 * 32 + 2 * 8  # and the layer's norms
    layer = 8 * expert + 32 * 8 + attention
    assert found["parameters"] == 3 * layer + 2 * 128 * 32 + 32
    assert found["update"]["exact"] and found["decode"]["exact"]
    assert not any("all-to-all" in kind for kind in found["update"]["sent"])
    # A device has two of the rows' 16; what experts add comes back, and three gradients go.
    sent, others = found["update"]["sent"]["reduce-scatter, each layer"], 3
    assert sent == 3 * others * 4 * 2 * 16 * (32 + 32 + 2)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_memory_is_within_a_tenth_of_what_a_step_takes():
    code = """
        import dataclasses, json
        from experiments.benchmarks import planner
        print(json.dumps(dataclasses.asdict(planner.compared("float32"))))
    """
    row = devices.run(code, devices=1)
    assert row["ratio"] < row["limit"] == 1.1, row


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "qwen9"], "model: expected a directory or one of qwen2.5-0.5b"),
        (["--mesh", "fsdp=-1"], "mesh: expected a size for every axis"),
        (["--mesh", ""], "mesh: expected a size for every axis"),
        (["--device", "abacus"], "device: expected one of a100-40"),
        (
            ["--rows", "100"],
            "rows: expected a multiple of data x fsdp x expert x microbatches = 64",
        ),
        (["--rows", "64", "--samples", "3"], "rows: expected a multiple of samples 3"),
        (["--length", "8", "--prompt-length", "8"], "prompt_length: expected less than length 8"),
        (["--microbatches", "0"], "microbatches: expected at least 1, got 0"),
    ],
)
def test_what_cannot_be_planned_is_said(arguments, message, capsys, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(plan, "plan", lambda config: sizes.decoder_config(config.model))
    assert plan.main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [("qwen2.5-0.5b", 0.494, 0.494), ("qwen3-8b", 8.19, 7.57), ("llama-3.1-8b", 8.03, 7.50),
     ("qwen3-30b-a3b", 30.5, 3.04)],
)  # fmt: skip
def test_known_models_have_their_published_sizes(name, total, active):
    found = sizes.count(sizes.decoder_config(name, max_length=16))
    assert found[0] == pytest.approx(total * 1e9, rel=0.003)
    assert found[1] == pytest.approx(active * 1e9, rel=0.003)
