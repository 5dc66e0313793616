"""`experiments.grpo_llm` and `experiments.sft`, end to end on a tiny checkpoint."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
import tiny_checkpoint

import pgjax as pg
from experiments import grpo_llm, sft
from experiments.llm import config, evaluate
from pgjax import models, sampling
from pgjax.tasks import chat

pytest.importorskip("transformers")
pytest.importorskip("math_verify")

OBJECTIVES = (
    *("grpo", "dr_grpo", "dapo", "gspo", "cispo", "lite_ppo", "ppo", "rloo", "reinforce"),
    "reinforce_pp",
)
PROMPTS = ("How many?", "Ann has 3 apples and buys 4 more.")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint.make(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A small file of problems, in GSM8K's form."""
    path = tmp_path_factory.mktemp("task") / "problems.jsonl"
    lines = [
        {"question": f"{a} + {b}?", "answer": f"It is {a + b}.\n#### {a + b}"}
        for a in range(8)
        for b in range(8)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def flags(checkpoint, problems, out, **changes):
    values = {
        "model": checkpoint,
        "out": out,
        "task": problems,
        "data.suffix": "",
        "data.prompt-lengths": 48,
        "tuning.dtype": "float32",
        "tuning.learning-rate": 1e-2,
        "tuning.warmup-steps": 1,
        "evaluation.test-prompts": 2,
        "evaluation.validation-prompts": 2,
        "evaluation.samples": 2,
        "evaluation.batch": 2,
        "evaluation.max-new-tokens": 6,
        "evaluation.every": 0,
        "checkpoint-every": 2,
        "show-every": 1,
        **changes,
    }
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


def grpo_flags(checkpoint, problems, out, **changes):
    rl = {"rl.steps": 1, "rl.prompts": 2, "rl.samples": 4, "rl.max-new-tokens": 6}
    return flags(checkpoint, problems, out, **(rl | changes))


def weights(directory):
    return models.from_pretrained(directory)[1]


def greedy_texts(directory):
    """What a checkpoint answers, by this library."""
    decoder, params = models.from_pretrained(directory)
    tokenizer = chat.load_tokenizer(directory)
    prompts, lengths = sampling.pad_prompts(
        [chat.encode_prompt(tokenizer, [{"role": "user", "content": p}]) for p in PROMPTS]
    )
    out = sampling.generate(
        decoder,
        params,
        prompts,
        lengths,
        jax.random.key(0),
        num_samples=1,
        max_new_tokens=12,
        temperature=0.0,
        stop_tokens=chat.stop_token_ids(tokenizer, directory),
    )
    rows = zip(np.asarray(out.tokens), np.asarray(out.mask), strict=True)
    return [chat.decode(tokenizer, row[kept].tolist()) for row, kept in rows]


def transformers_texts(directory):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    tokenizer = chat.load_tokenizer(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    texts = []
    for prompt in PROMPTS:
        ids = chat.encode_prompt(tokenizer, [{"role": "user", "content": prompt}])
        ids = torch.tensor(np.asarray(ids)[None].astype(np.int64))
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
        )
        texts.append(chat.decode(tokenizer, out[0, ids.shape[1] :].tolist()))
    return texts


@pytest.mark.parametrize("train", ["full", "lora"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_trains_and_exports(checkpoint, task, tmp_path, objective, train):
    out = tmp_path / "run"
    arguments = grpo_flags(
        checkpoint, task, out, objective=objective, **{"tuning.train": train, "tuning.rank": 2}
    )
    assert grpo_llm.main(arguments) == 0
    result = json.loads((out / "results.json").read_text())
    assert result["after"]["num_prompts"] == 2
    assert (out / "curves.png").stat().st_size > 10_000
    assert (out / "adapter" / "adapter_config.json").exists() == (train == "lora")
    assert (out / "model" / "value_head.safetensors").exists() == (objective == "ppo")
    exported, started = weights(out / "model"), weights(checkpoint)
    assert jax.tree.map(lambda x: x.shape, exported) == jax.tree.map(lambda x: x.shape, started)
    record = pg.train.metrics.read_metrics(out)[0]
    assert np.isfinite(record["loss"]) and record["tokens"] > 0


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    sizes = {"num_experts": 2, "experts_per_token": 1, "expert_size": 16}
    moe = models.MoEConfig(**sizes, normalize_weights=True)
    directory = tmp_path_factory.mktemp("mixture") / "model"
    return tiny_checkpoint.make(directory, moe=moe, qk_norm="head", num_layers=1, hidden_size=16)


@pytest.mark.parametrize(("replay", "slots"), [("learner", None), ("sampler", 3)])
def test_recorded_experts_are_replayed(mixture, task, tmp_path, monkeypatch, replay, slots):
    """Whoever recorded them, the update gets them, and gets the sampler's where it should."""
    seen = []
    update = pg.train.make_update

    def watched(*arguments, **options):
        step = update(*arguments, **options)

        def recording(state, rollout, *rest):
            seen.append(rollout.experts)
            return step(state, rollout, *rest)

        return recording

    monkeypatch.setattr(pg.train, "make_update", watched)
    changes = {"rl.routing-replay": replay, **({} if slots is None else {"rl.slots": slots})}
    arguments = grpo_flags(mixture, task, tmp_path / "run", **changes)
    assert grpo_llm.main(arguments) == 0
    assert seen and all(x.shape[2:] == (1, 1) for x in seen)
    padding = np.asarray(seen[0])[:, -1]
    assert (padding == 0).all() == (replay == "sampler")  # only a sampler leaves them out


def test_experts_adapters_are_merged_though_peft_has_no_form_for_them(
    mixture, task, tmp_path, capsys
):
    out = tmp_path / "run"
    changes = {"tuning.train": "lora", "tuning.rank": 2}
    assert grpo_llm.main(grpo_flags(mixture, task, out, **changes)) == 0
    assert "adapters not written in PEFT's format" in capsys.readouterr().out
    assert not (out / "adapter").exists() and (out / "model" / "config.json").is_file()


@pytest.mark.parametrize("train", ["full", "lora"])
def test_export_generates_the_same_text_under_transformers(checkpoint, task, tmp_path, train):
    """After supervised steps, which move the weights whatever the answers are worth."""
    out = tmp_path / "run"
    arguments = flags(
        checkpoint,
        task,
        out,
        **{"steps": 3, "batch-size": 4, "lengths": 64, "tuning.train": train, "tuning.rank": 4},
    )
    assert sft.main(arguments) == 0
    before, after = weights(checkpoint), weights(out / "model")
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before, after)
    assert moved["layers"]["attention"]["query"] > 1e-3
    assert (moved["embedding"] == 0.0) == (train == "lora")
    records = [r for r in pg.train.metrics.read_metrics(out) if r["phase"] == "sft"]
    assert records[-1]["loss"] < records[0]["loss"]
    texts = greedy_texts(out / "model")
    assert texts == transformers_texts(out / "model")
    assert texts != greedy_texts(checkpoint)


def test_resuming_goes_on_exactly(checkpoint, task, tmp_path):
    options = {"rl.slots": 4, "tuning.packed": 0.5, "objective": "rloo", "tuning.microbatches": 2}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    arguments = {"data.prompt-lengths": 48, **options}
    assert grpo_llm.main(grpo_flags(checkpoint, task, whole, **arguments, **{"rl.steps": 4})) == 0
    assert grpo_llm.main(grpo_flags(checkpoint, task, parts, **arguments, **{"rl.steps": 2})) == 0
    assert grpo_llm.main(["--resume", "--out", str(parts), "--rl.steps", "4"]) == 0
    jax.tree.map(np.testing.assert_array_equal, weights(whole / "model"), weights(parts / "model"))
    assert {p.name for p in parts.glob("test_*.json")} == {
        "test_before.json",
        "test_after_2.json",
        "test_after_4.json",
    }


def test_quantised_base_with_adapters(checkpoint, task, tmp_path):
    out = tmp_path / "run"
    changes = {"tuning.train": "lora", "tuning.rank": 2, "tuning.base": "int8"}
    assert grpo_llm.main(grpo_flags(checkpoint, task, out, **changes)) == 0
    assert (out / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"objective-options": "beta=1"}, "grpo has no option 'beta'"),
        ({"tuning.base": "int8"}, "tuning.base: int8 parameters cannot be trained"),
        ({"data.prompt-lengths": 4}, "no prompt of"),
        ({"mesh": "fsdp=3"}, "mesh"),
        ({"rl.routing-replay": "learner"}, "no mixture of experts"),
        ({"model": "nowhere"}, "nowhere"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(checkpoint, task, tmp_path, capsys, changes, message):
    out = tmp_path / "run"
    assert grpo_llm.main(grpo_flags(checkpoint, task, out, **changes)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert not out.exists()


def test_unusable_checkpoints_are_said_in_one_line(checkpoint, task, tmp_path, capsys):
    def said(damage):
        import shutil

        model = tmp_path / damage.__name__
        shutil.copytree(checkpoint, model)
        damage(model)
        assert grpo_llm.main(grpo_flags(model, task, tmp_path / "run")) == 2
        return capsys.readouterr().err

    def truncated(model):
        weights = model / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])

    def foreign(model):
        path = model / "config.json"
        path.write_text(path.read_text().replace("LlamaForCausalLM", "RwkvForCausalLM").replace(
            '"llama"', '"rwkv"'))  # fmt: skip

    def half_downloaded(model):
        (model / "model.safetensors").unlink()
        index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))

    def without_template(model):
        (model / "chat_template.jinja").unlink()

    def small_vocabulary(model):
        small = tiny_checkpoint.tokenizer(vocab_size=290)
        decoder, params = models.init(
            models.DecoderConfig(
                vocab_size=len(small) - 5,
                hidden_size=16,
                num_layers=1,
                num_heads=2,
                mlp_size=16,
                max_length=128,
            ),
            jax.random.key(0),
        )
        models.save_pretrained(model, decoder, params, overwrite=True)
        small.save_pretrained(model)

    for damage, words in (
        (truncated, "model.safetensors"),
        (foreign, "rwkv"),
        (half_downloaded, "model-00001-of-00002.safetensors"),
        (without_template, "chat template"),
        (small_vocabulary, "vocab_size"),
    ):
        error = said(damage)
        assert error.startswith("error: ") and words.lower() in error.lower(), (damage, error)
        assert error.count("\n") == 1, error


def test_answers_are_numbered_for_the_majority_vote():
    right = np.array([[True, False, True, False], [False, False, False, False]])
    stated = ["1/2", "3", "0.5", None, "7", "7", None, "8"]
    values, ok, reference = evaluate.numbered(stated, right)
    assert values[0].tolist()[:3] == [0, 1, 0] and reference.tolist() == [0, -1]
    assert ok.tolist() == [[True, True, True, False], [True, True, False, True]]
    assert values[1, 0] == values[1, 1] != values[1, 3]


@pytest.mark.parametrize("name", config.GRPO_PRESETS)
def test_presets_divide_evenly(name):
    preset = config.GRPO_PRESETS[name]
    rows = preset.rl.prompts * preset.rl.samples
    assert preset.preset == name
    assert rows % (preset.rl.minibatches * preset.tuning.microbatches) == 0


def test_help_explains_every_field(capsys):
    for module in (grpo_llm, sft):
        with pytest.raises(SystemExit) as stop:
            module.main(["--help"])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        for flag in ("--model", "--tuning.train", "--task", "--evaluation.samples", "--mesh"):
            assert flag in text
