"""Checkpoints in Hugging Face's format: options, layouts, errors, heads, writing."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from golden import cases, make
from safetensors.numpy import load_file, save_file

from pgjax import models
from pgjax.models import AttentionKind, DecoderConfig, Rotary, pretrained
from pgjax.models.heads import score_head_apply, score_head_init, score_head_logical_axes
from pgjax.models.pretrained import writing
from pgjax.models.pretrained.checkpoint import leaves
from pgjax.models.pretrained.families import FAMILIES, identify, infer, named
from pgjax.models.pretrained.layout import parse

HUB = json.loads((cases.DIRECTORY / "hub.json").read_text())
SMALL = {
    "vocab_size": 12,
    "hidden_size": 8,
    "num_layers": 2,
    "num_heads": 2,
    "mlp_size": 10,
    "max_length": 16,
}


def decoder_of(**changes):
    """A decoder with parameters that are nowhere trivial."""
    decoder = models.FunctionalDecoder(DecoderConfig(**{**SMALL, **changes}))
    rng = np.random.default_rng(0)

    def draw(leaf):
        return jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)

    return decoder, jax.tree.map(draw, models.abstract_params(decoder.config))


@pytest.fixture
def checkpoint(tmp_path):
    """A small Llama's directory, in one file."""
    pretrained.save(tmp_path / "model", *decoder_of())
    return tmp_path / "model"


def golden(case, path):
    data = cases.read(case)
    path.mkdir()
    make.write(path, data["config"], data["shapes"])
    return path


def edit_config(path, **changes):
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_tensors(path, change):
    """Rewrites the only file with what `change` makes of its tensors."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    save_file(change(tensors) or tensors, file)


def same_tree(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), a, b)


# The layouts.


def test_layout():
    sizes = {"heads": 2, "head_dim": 3, "hidden": 5, "inner": 4, "expert": 2}
    tensor = np.arange(30).reshape(6, 5)
    query = parse("(heads head_dim) hidden -> hidden heads head_dim")
    assert query.shape(sizes) == (6, 5)
    assert query.leaf_shape(sizes) == (5, 2, 3)
    view = query.view(tensor, sizes)
    assert all(view[h, n, d] == tensor[3 * n + d, h] for h, n, d in np.ndindex(5, 2, 3))
    view[...] = 7  # a view: what is written is in the tensor
    assert (tensor == 7).all()

    fused = np.arange(5 * 18).reshape(5, 18)
    for part in range(3):
        layout = parse(f"hidden ({part}:3 heads head_dim) -> hidden heads head_dim")
        wanted = fused[:, 6 * part : 6 * part + 6].reshape(5, 2, 3)
        np.testing.assert_array_equal(layout.view(fused, sizes), wanted)
    turns = np.arange(2 * 5 * 8).reshape(2, 5, 8)
    layout = parse("expert hidden (inner 1:2) -> expert hidden inner")
    np.testing.assert_array_equal(layout.view(turns, sizes), turns[..., 1::2])
    with pytest.raises(ValueError, match="the two sides name different axes"):
        parse("a b -> a c")


def test_every_slice_of_every_layout_is_read(tmp_path, monkeypatch):
    """Against the whole tensor's view, in pieces of any size."""
    from pgjax.models.pretrained import tensors as module

    sizes = {"heads": 3, "kv_heads": 3, "head_dim": 4, "hidden": 5, "inner": 6, "expert": 2}
    sizes |= {"vocab": 7, "position": 7, "shared": 6, "all_heads": 12, "all_kv_heads": 12}
    layouts = {key.layout for family in FAMILIES for key in family.keys}
    assert len(layouts) > 20
    rng = np.random.default_rng(0)
    for text in sorted(layouts):
        layout = parse(text)
        whole = rng.normal(size=layout.shape(sizes)).astype(np.float32)
        save_file({"pad": np.zeros(3, np.float32), "x": whole}, tmp_path / "f.safetensors")
        found = {t.name: t for t in module.read_header(tmp_path / "f.safetensors")}
        view = layout.view(whole, sizes)
        with module.Tensors([found["x"]]) as reader:
            for trial in range(6):
                monkeypatch.setattr(module, "_CHUNK", [1, 40, 100, 10**6][trial % 4])
                edges = [np.sort(rng.choice(n + 1, 2, replace=False)) for n in view.shape]
                index = tuple(slice(int(a), int(b)) for a, b in edges)
                if trial == 0:
                    index = (slice(None),) * view.ndim
                for dtype in (np.float32, ml_dtypes.bfloat16):
                    out = np.zeros(view[index].shape, dtype)
                    reader.read(out, found["x"], layout, sizes, index)
                    np.testing.assert_array_equal(out, view[index].astype(dtype))


# The options.


@pytest.mark.parametrize("name", sorted(HUB))
def test_models_of_the_hub(name):
    """Their config.json is understood; the parameters are as many as published."""
    family, role, options = identify(HUB[name]["config"])
    config = family.config(options)
    shapes = leaves(models.abstract_params(config))
    assert role == "causal"
    assert sum(math.prod(x.shape) for x in shapes.values()) == HUB[name]["parameters"]
    # What is written of it means the same, and says so in words that are all understood.
    again = family.config(family.options(config))
    assert dataclasses.replace(again, max_length=config.max_length) == config


def test_kinds_of_attention_of_the_hub():
    def layers(name):
        family, _, options = identify(HUB[name]["config"])
        config = family.config(options)
        return [config.kinds[i] for i in config.kind_indices]

    smollm3 = layers("SmolLM3-3B")
    assert [kind.rotary is None for kind in smollm3] == [i % 4 == 3 for i in range(36)]
    assert {kind.window for kind in smollm3} == {None}
    assert layers("Mistral-7B-v0.1") == [AttentionKind(window=4096)] * 32
    gemma2 = layers("gemma-2-2b")
    assert [kind.window for kind in gemma2] == [4096, None] * 13
    gemma3 = layers("gemma-3-4b-it")
    local = AttentionKind(window=1024, rotary=Rotary(theta=1e4))
    wide = AttentionKind(rotary=Rotary(theta=1e6, scaling="linear", factor=8.0))
    assert gemma3 == [wide if i % 6 == 5 else local for i in range(34)]
    assert {kind.window for kind in layers("Qwen2.5-0.5B")} == {None}
    assert [kind.window for kind in layers("gpt-oss-20b-bf16")] == [128, None] * 12


def test_older_and_newer_words_for_rotary_positions():
    base = HUB["Llama-3.2-1B"]["config"]
    older = named("llama").config(base)
    rest = {k: v for k, v in base.items() if k not in ("rope_theta", "rope_scaling")}
    parameters = {**base["rope_scaling"], "rope_theta": base["rope_theta"]}
    assert named("llama").config({**rest, "rope_parameters": parameters}) == older
    worded = {"type" if k == "rope_type" else k: v for k, v in base["rope_scaling"].items()}
    assert named("llama").config({**base, "rope_scaling": worded}) == older
    gemma = {k: v for k, v in HUB["gemma-3-1b-it"]["config"].items() if "rope" not in k}
    nested = {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    assert named("gemma3_text").config({**gemma, "rope_parameters": nested}) == named(
        "gemma3_text"
    ).config(HUB["gemma-3-1b-it"]["config"])
    # gpt-oss without a word on it is stretched by YaRN, as in transformers.
    silent = {k: v for k, v in HUB["gpt-oss-20b-bf16"]["config"].items() if "rope" not in k}
    wordy = named("gpt_oss").config(HUB["gpt-oss-20b-bf16"]["config"])
    assert named("gpt_oss").config(silent) == wordy


def test_yarn_without_factor_is_the_ratio_of_lengths():
    scaling = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 8192}
    config = named("llama").config({**HUB["SmolLM2-135M"]["config"], "rope_scaling": scaling,
                                    "max_position_embeddings": 32768})  # fmt: skip
    assert config.kinds[0].rotary.factor == 4.0


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("Llama-3.2-1B", {"use_rope": True}, "unknown options: use_rope True"),
        ("Llama-3.2-1B", {"hidden_act": "xielu"}, "hidden_act 'xielu' is not supported; silu"),
        ("Llama-3.2-1B", {"num_hidden_layers": "16"}, "num_hidden_layers: expected an int"),
        ("Llama-3.2-1B", {"tie_word_embeddings": 1}, "tie_word_embeddings: expected true or false"),
        ("Llama-3.2-1B", {"num_key_value_heads": 5}, "num_kv_heads: expected a divisor"),
        ("Llama-3.2-1B", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not"),
        ("Llama-3.2-1B", {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "'longrope'"),
        ("Llama-3.2-1B", {"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        (
            "Llama-3.2-1B",
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "short_factor": [1.0]}},
            r"rope_parameters: unknown options: short_factor \[1.0\]",
        ),
        ("Llama-3.2-1B", {"quantization_config": {"quant_method": "fp8"}}, "quantised weights"),
        ("SmolLM2-135M", {"rope_interleaved": True}, "rope_interleaved True"),
        ("SmolLM3-3B", {"no_rope_layers": [1, 0]}, "no_rope_layers: expected one for each of 36"),
        ("SmolLM3-3B", {"layer_types": ["chunked_attention"] * 36}, "'chunked_attention'"),
        ("Qwen3-0.6B", {"layer_types": ["sliding_attention"] * 28}, "use_sliding_window is false"),
        ("Qwen3-30B-A3B", {"mlp_only_layers": [0]}, r"mlp_only_layers \[0\] is not supported"),
        ("Qwen3-30B-A3B", {"decoder_sparse_step": 2}, "decoder_sparse_step 2 is not supported"),
        ("Qwen1.5-MoE-A2.7B", {"decoder_sparse_step": 2}, "decoder_sparse_step 2"),
        ("OLMoE-1B-7B-0924", {"clip_qkv": 8.0}, "clip_qkv 8.0 is not supported"),
        ("gpt-oss-20b-bf16", {"swiglu_limit": 10.0}, "swiglu_limit 10.0 is not supported"),
        (
            "gpt-oss-20b-bf16",
            {"quantization_config": {"quant_method": "mxfp4"}},
            "quantization_config .* quantised weights cannot be read",
        ),
        ("gemma-2-2b", {"use_bidirectional_attention": True}, "attention is causal"),
        ("gemma-2-2b", {"sliding_window": None}, "sliding_window: expected a positive int"),
        ("gemma-3-1b-it", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0"),
        ("gemma-3-4b-it", {"text_config": None}, "text_config: expected an object"),
        ("gemma-3-4b-it", {"text_config": {"final_logit_softcapping": 3.0}}, "does not apply it"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention True"),
    ],
)
def test_options_that_change_the_model_are_never_ignored(name, changes, message):
    with pytest.raises(ValueError, match=message):
        family, _, options = identify({**HUB[name]["config"], **changes})
        family.config(options)


def test_unknown_architectures():
    with pytest.raises(ValueError, match=r"'BertModel' of model_type 'bert' is not known; .*llama"):
        identify({"architectures": ["BertModel"], "model_type": "bert"})
    with pytest.raises(ValueError, match="'LlamaForTokenClassification'"):
        identify({"architectures": ["LlamaForTokenClassification"], "model_type": "llama"})
    assert identify({"architectures": ["Qwen2Model"]})[:2] == (named("qwen2"), "base")
    assert identify({"model_type": "gpt2"})[1] == "causal"


# Layouts of the same model.


def moved(path, out, change):
    """The same checkpoint with what `change` makes of its tensors."""
    shutil.copytree(path, out)
    edit_tensors(out, change)
    return pretrained.load(out)


def test_gpt2_with_and_without_prefix_masks_and_tied_head(tmp_path):
    path = golden("gpt2", tmp_path / "a")
    decoder, params = pretrained.load(path)

    def hub(tensors):
        bare = {name.removeprefix("transformer."): value for name, value in tensors.items()}
        for layer in range(4):
            bare[f"h.{layer}.attn.bias"] = np.tril(np.ones((1, 1, 128, 128), np.uint8))
            bare[f"h.{layer}.attn.masked_bias"] = np.array(-1e4, np.float32)
        return bare

    def tied(tensors):
        return {**tensors, "lm_head.weight": tensors["transformer.wte.weight"]}

    for name, change in (("b", hub), ("c", tied)):
        again, values = moved(path, tmp_path / name, change)
        assert again == decoder
        same_tree(values, params)
    with pytest.raises(ValueError, match=r"model.safetensors: lm_head.weight differs from the emb"):
        moved(
            path, tmp_path / "d", lambda t: {**t, "lm_head.weight": t["transformer.wte.weight"] + 1}
        )


@pytest.mark.parametrize("case", ["qwen2_moe", "olmoe"])
def test_fused_experts(case, tmp_path):
    """One tensor for all experts, gate above up, as transformers 5 holds them."""
    path = golden(case, tmp_path / "a")
    decoder, params = pretrained.load(path)

    def fuse(tensors):
        def stack(layer, name):
            of = f"model.layers.{layer}.mlp.experts."
            return np.stack([tensors.pop(f"{of}{e}.{name}_proj.weight") for e in range(4)])

        for layer in range(4):
            gate, up, down = (stack(layer, name) for name in ("gate", "up", "down"))
            of = f"model.layers.{layer}.mlp.experts."
            tensors[of + "gate_up_proj"] = np.concatenate([gate, up], axis=1)
            tensors[of + "down_proj"] = down

    again, values = moved(path, tmp_path / "b", fuse)
    assert again == decoder
    same_tree(values, params)


def test_names_and_buffers_of_older_llamas(tmp_path):
    path = golden("llama_linear", tmp_path / "a")
    decoder, params = pretrained.load(path)

    def older(tensors):
        for layer in range(4):
            tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    again, values = moved(path, tmp_path / "b", older)
    assert again == decoder
    same_tree(values, params)


def test_language_model_of_gemma3(tmp_path):
    """In the layouts of transformers 4 and 5; the vision tower is left where it is."""
    path = golden("gemma3", tmp_path / "a")
    edit_config(path, final_logit_softcapping=None)
    decoder, params = pretrained.load(path)
    text = json.loads((path / "config.json").read_text())
    tower = {"vision_tower.x": np.ones(2, np.float32), "multi_modal_projector.y": np.ones(1, "f4")}
    for name, prefix, other in (
        ("b", "language_model.model.", ""),
        ("c", "model.language_model.", "model."),
    ):
        shutil.copytree(path, tmp_path / name)
        edit_tensors(
            tmp_path / name,
            lambda tensors, prefix=prefix, other=other: {
                **{prefix + k.removeprefix("model."): v for k, v in tensors.items()},
                **{other + k: v for k, v in tower.items()},
            },
        )
        config = {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "model_type": "gemma3",
            "text_config": text,
            "vision_config": {"model_type": "siglip_vision_model"},
        }
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        again, values = pretrained.load(tmp_path / name)
        assert again == decoder
        same_tree(values, params)
        pretrained.save(tmp_path / "out", again, values, source=tmp_path / name, overwrite=True)
        assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "gemma3_text"
        same_tree(pretrained.load(tmp_path / "out")[1], params)


# Errors of files.


def test_missing_files(tmp_path, checkpoint):
    with pytest.raises(FileNotFoundError, match="nowhere: is not a directory"):
        pretrained.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty: has no config.json$"):
        pretrained.load(tmp_path / "empty")
    (tmp_path / "empty/adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="it is an adapter"):
        pretrained.load(tmp_path / "empty")
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has neither model.safetensors nor"):
        pretrained.load(checkpoint)
    (checkpoint / "pytorch_model.bin").write_bytes(b"not even read")
    with pytest.raises(ValueError, match=r"pytorch_model.bin alone, a pickle"):
        pretrained.load(checkpoint)


@pytest.mark.parametrize("text", ["{", '{"model_type": "llama"', "\xff"])
def test_config_that_is_not_json(text, checkpoint):
    (checkpoint / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config.json: is not valid JSON"):
        pretrained.load(checkpoint)


def test_config_that_is_no_object_or_unknown(checkpoint):
    (checkpoint / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="config.json: expected a JSON object, got list"):
        pretrained.load(checkpoint)
    (checkpoint / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="config.json: architecture None of model_type 'bert'"):
        pretrained.load(checkpoint)


def test_missing_surplus_and_misshapen_tensors(tmp_path, checkpoint):
    def fails(change, message):
        out = tmp_path / "changed"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(checkpoint, out)
        edit_tensors(out, change)
        with pytest.raises(ValueError, match=message):
            pretrained.load(out)

    name = "model.layers.1.mlp.up_proj.weight"
    fails(lambda t: t.pop(name) is None, f"changed: {name} is missing for config.json")
    fails(
        lambda t: {k: v for k, v in t.items() if "layers.1" not in k},
        "layers.1.input_layernorm.weight.* and 4 more are missing",
    )
    fails(
        lambda t: t.update({"model.layers.2.mlp.up_proj.weight": t[name], "extra": t[name]}),
        r"changed: (model.layers.2.mlp.up_proj.weight, extra|extra, model.layers.2\S+) are in the "
        "files, but not in the model",
    )
    fails(
        lambda t: t.update({name: np.ascontiguousarray(t[name].T)}),
        rf"model.safetensors: {name} has shape \(8, 10\), expected \(10, 8\)",
    )
    fails(
        lambda t: t.update({name: t[name].astype(np.int8)}),
        rf"model.safetensors: {name} has dtype I8, expected one of F64, F32, F16, BF16",
    )
    fails(lambda t: t.pop("lm_head.weight") is None, "lm_head.weight is missing")
    fails(lambda t: t.update({"score.weight": np.ones((1, 8), "f4")}), "score.weight is in the fil")
    edit_config(checkpoint, num_hidden_layers=1)
    fails(lambda t: None, r"model.layers.1.\S+, .*and 4 more are in the files")


def test_damaged_files(checkpoint):
    file = checkpoint / "model.safetensors"
    whole = file.read_bytes()
    for size in (0, 5, 100, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"model.safetensors: .*truncated\?"):
            pretrained.load(checkpoint)
    file.write_bytes(whole + b"0")
    with pytest.raises(ValueError, match="but its header describes"):
        pretrained.load(checkpoint)
    file.write_bytes(b"\xff" * 200)
    with pytest.raises(ValueError, match="does not begin like a safetensors file"):
        pretrained.load(checkpoint)
    file.write_bytes((20).to_bytes(8, "little") + b"no json at all......")
    with pytest.raises(ValueError, match="is not a valid safetensors file"):
        pretrained.load(checkpoint)
    header = b'{"x":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}'
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ValueError, match=r"x of shape \(3,\) has 8 bytes"):
        pretrained.load(checkpoint)
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"
    file.write_bytes(pointer)
    with pytest.raises(ValueError, match="model.safetensors: is a Git LFS pointer"):
        pretrained.load(checkpoint)


def test_file_that_shrinks_while_it_is_read(checkpoint, monkeypatch):
    from pgjax.models.pretrained import tensors

    file = checkpoint / "model.safetensors"
    size = file.stat().st_size
    headers = tensors.read_header(file)
    monkeypatch.setattr(tensors, "read_header", lambda _: headers)
    with file.open("r+b") as stream:
        stream.truncate(size - 4)
    with pytest.raises(ValueError, match=r"ends within \S+; is it truncated\?"):
        pretrained.load(checkpoint)


def test_damaged_indices(tmp_path):
    path = tmp_path / "model"
    pretrained.save(path, *decoder_of(), max_shard_bytes=1000)
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    pretrained.load(path)

    def fails(kind, message, **changes):
        index.write_text(json.dumps({**content, **changes}))
        with pytest.raises(kind, match=message):
            pretrained.load(path)

    fails(ValueError, "index.json: expected a weight_map", weight_map=3)
    first = sorted(set(content["weight_map"].values()))[0]
    names = [name for name, file in content["weight_map"].items() if file == first]
    wrong = {**content["weight_map"], "other": first}
    fails(ValueError, f"index.json: lists other in {first}, which does not", weight_map=wrong)
    shutil.copy(path / first, path / "copy.safetensors")
    twice = {**content["weight_map"], names[0]: "copy.safetensors"}
    fails(ValueError, r"is also in", weight_map=twice)
    index.write_text(json.dumps(content))
    (path / first).rename(path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=f"{first}: listed in model.safetensors.index.json"):
        pretrained.load(path)


# Types and lengths.


def test_dtypes(tmp_path):
    decoder, params = decoder_of()
    pretrained.save(tmp_path / "half", decoder, params, dtype=jnp.bfloat16)
    assert json.loads((tmp_path / "half/config.json").read_text())["torch_dtype"] == "bfloat16"
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)

    half, values = pretrained.load(tmp_path / "half")
    assert half.config.dtype == half.config.param_dtype == jnp.bfloat16
    same_tree(values, rounded)
    wide, values = pretrained.load(tmp_path / "half", param_dtype=jnp.float32, dtype="bfloat16")
    assert (wide.config.param_dtype, wide.config.dtype) == (jnp.float32, jnp.bfloat16)
    same_tree(values, jax.tree.map(lambda x: x.astype(jnp.float32), rounded))
    pretrained.save(tmp_path / "full", decoder, params)
    same_tree(pretrained.load(tmp_path / "full", param_dtype=jnp.bfloat16)[1], rounded)
    with pytest.raises(ValueError, match="param_dtype: expected a floating dtype, got .*int32"):
        pretrained.load(tmp_path / "full", param_dtype=jnp.int32)

    # Each parameter as it is stored, also where they differ.
    rounded["norm"] = params["norm"]
    pretrained.save(tmp_path / "mixed", decoder, rounded)
    mixed, values = pretrained.load(tmp_path / "mixed")
    assert mixed.config.param_dtype == jnp.bfloat16
    same_tree(values, rounded)

    def one_layer_wide(tensors):
        name = "model.layers.1.mlp.up_proj.weight"
        tensors[name] = tensors[name].astype(np.float32)

    edit_tensors(tmp_path / "half", one_layer_wide)
    up = pretrained.load(tmp_path / "half")[1]["layers"]["mlp"]["up"]
    np.testing.assert_array_equal(up, rounded["layers"]["mlp"]["up"].astype(np.float32))
    assert up.dtype == jnp.float32


def test_run_options(checkpoint, tmp_path):
    decoder, _ = pretrained.load(checkpoint, max_length=99, remat="full")
    assert (decoder.config.max_length, decoder.config.remat) == (99, "full")
    path = golden("gpt2", tmp_path / "gpt2")
    short, params = pretrained.load(path, max_length=24)
    whole = pretrained.load(path)[1]
    np.testing.assert_array_equal(params["position_embedding"], whole["position_embedding"][:24])
    with pytest.raises(ValueError, match="max_length: .*learned positions for 128 tokens, got 129"):
        pretrained.load(path, max_length=129)
    pretrained.save(tmp_path / "short", short, params, source=path)
    assert json.loads((tmp_path / "short/config.json").read_text())["n_positions"] == 24
    assert pretrained.load(tmp_path / "short")[0] == short


# Saving.


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"activation": "relu", "rope_theta": 50.0, "tied_embeddings": True}),
        ("llama", {"qkv_bias": True, "output_bias": True, "mlp_bias": True}),
        ("mistral", {"attention_kinds": (AttentionKind(window=3),)}),
        ("qwen2", {"qkv_bias": True}),
        ("qwen3", {"qk_norm": True, "num_kv_heads": 1, "head_dim": 6}),
        (
            "qwen3",
            {
                "qk_norm": "head",
                "attention_kinds": (AttentionKind(window=3), AttentionKind()),
                "layer_kinds": (1, 0),
            },
        ),
        (
            "smollm3",
            {
                "attention_kinds": (AttentionKind(rotary=None), AttentionKind()),
                "layer_kinds": (0, 1),
            },
        ),
    ],
)
def test_decoders_of_our_own(family, changes, tmp_path):
    decoder, params = decoder_of(**changes)
    pretrained.save(tmp_path / "out", decoder, params)
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["model_type"] == family
    assert [written[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [None] * 3
    again, values = pretrained.load(tmp_path / "out")
    same_tree(values, params)
    tokens = np.arange(12, dtype=np.int32)[None]
    np.testing.assert_array_equal(again.apply(values, tokens), decoder.apply(params, tokens))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gated": False}, "no family has this configuration; .*llama has no gated False"),
        ({"logit_soft_cap": 3.0}, "llama has no logit_soft_cap 3.0"),
        ({"query_scale": 3.0}, "llama has no query_scale 3.0"),
        ({"qkv_bias": True, "mlp_bias": True}, "qwen2 has no mlp_bias True"),
        (
            {
                "attention_kinds": (
                    AttentionKind(rotary=Rotary(theta=5.0)),
                    AttentionKind(rotary=Rotary(theta=7.0)),
                ),
                "layer_kinds": (0, 1),
            },
            r"llama has no attention_kinds \(AttentionKind\(rotary=Rotary\(theta=5.0\)\), Att",
        ),
    ],
)
def test_decoders_no_family_has(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        pretrained.save(tmp_path / "out", *decoder_of(**changes))
    assert not list(tmp_path.iterdir())


def test_family_by_name(tmp_path):
    decoder, params = decoder_of()
    pretrained.save(tmp_path / "out", decoder, params, family="mistral")
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "mistral"
    assert infer(decoder.config)[0].name == "llama"
    with pytest.raises(ValueError, match="decoder: gpt2 has no gated True, norm 'rms', learned"):
        pretrained.save(tmp_path / "b", decoder, params, family="gpt2")
    with pytest.raises(ValueError, match="family: expected one of llama, .*, got 'bert'"):
        pretrained.save(tmp_path / "b", decoder, params, family="bert")


def test_source_and_extra_config(tmp_path, checkpoint):
    decoder, params = pretrained.load(checkpoint)
    edit_config(checkpoint, eos_token_id=3, max_position_embeddings=77, initializer_range=0.5)
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        (checkpoint / name).write_text(f'{{"of": "{name}"}}')
    (checkpoint / "additional_chat_templates").mkdir()
    (checkpoint / "additional_chat_templates/tools.jinja").write_text("x")
    (checkpoint / "README.md").write_text("not part of the model")
    out = tmp_path / "out"
    pretrained.save(out, decoder, params, source=checkpoint, extra_config={"pad_token_id": 1})
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()) == [
        "additional_chat_templates/tools.jinja",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert (out / "generation_config.json").read_text() == '{"of": "generation_config.json"}'
    source = json.loads((checkpoint / "config.json").read_text())
    assert json.loads((out / "config.json").read_text()) == {**source, "pad_token_id": 1}

    # A decoder that the source does not describe keeps its family, where that has it, and tokens.
    other = decoder_of(num_layers=1)
    pretrained.save(tmp_path / "other", *other, source=checkpoint)
    written = json.loads((tmp_path / "other/config.json").read_text())
    assert (written["model_type"], written["eos_token_id"]) == ("llama", 3)
    assert "initializer_range" not in written
    normed = decoder_of(qk_norm=True)
    pretrained.save(tmp_path / "normed", *normed, source=checkpoint)
    assert json.loads((tmp_path / "normed/config.json").read_text())["model_type"] == "qwen3"

    generation = tmp_path / "plain"
    pretrained.save(generation, decoder, params, extra_config={"eos_token_id": [2, 5]})
    assert json.loads((generation / "generation_config.json").read_text()) == {
        "_from_model_config": True,
        "eos_token_id": [2, 5],
    }
    for extra, message in (
        ({"rms_norm_eps": 0.5}, "extra_config: would change the model from norm_epsilon 1e-06"),
        ({"mystery": 4}, "extra_config: unknown options: mystery 4"),
    ):
        with pytest.raises(ValueError, match=message):
            pretrained.save(tmp_path / "no", decoder, params, extra_config=extra)


def test_params_that_do_not_fit(tmp_path):
    decoder, params = decoder_of()

    def fails(message, **options):
        with pytest.raises(ValueError, match=message):
            pretrained.save(tmp_path / "out", decoder, **options)
        assert not list(tmp_path.iterdir())

    without = {k: v for k, v in params.items() if k != "norm"}
    fails("params: norm is missing", params=without)
    fails("params: bias is not a parameter", params={**params, "bias": params["norm"]})
    fails(r"norm has shape \(3,\), expected \(8,\)", params={**params, "norm": jnp.ones(3)})
    fails("norm is a float, expected an array", params={**params, "norm": 1.0})
    fails("dtype: expected one of float64, .*, got int32", params=params, dtype=jnp.int32)
    fails("max_shard_bytes: expected at least 1, got 0", params=params, max_shard_bytes=0)


def test_files_and_index(tmp_path):
    decoder, params = decoder_of()
    pretrained.save(tmp_path / "a", decoder, params, max_shard_bytes=1000)
    index = json.loads((tmp_path / "a/model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "a").glob("*.safetensors"))
    assert [file.name for file in files] == writing.file_names(len(files))
    sizes = {}
    for file in files:
        tensors = load_file(file)  # also what safetensors itself finds valid
        assert {index["weight_map"][name] for name in tensors} == {file.name}
        sizes[file.name] = sum(value.nbytes for value in tensors.values())
        assert sizes[file.name] <= 1000 or len(tensors) == 1
    assert index["metadata"]["total_size"] == sum(sizes.values())
    same_tree(pretrained.load(tmp_path / "a")[1], params)


def test_nothing_half_written_is_left(tmp_path, monkeypatch):
    decoder, params = decoder_of()
    path = tmp_path / "model"
    path.mkdir()  # an empty directory may be taken
    pretrained.save(path, decoder, params)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(FileExistsError, match="model: is not empty; see overwrite"):
        pretrained.save(path, decoder, params)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    with pytest.raises(FileExistsError, match="mine: is neither empty nor a checkpoint"):
        pretrained.save(tmp_path / "mine", decoder, params, overwrite=True)
    with pytest.raises(FileExistsError, match=r"thesis.txt: is a file"):
        pretrained.save(tmp_path / "mine/thesis.txt", decoder, params)

    changed = jax.tree.map(lambda x: x + 1, params)
    write_json = writing.write_json

    def fails(file, data):
        write_json(file, data)
        raise OSError("disk full")

    monkeypatch.setattr("pgjax.models.pretrained.saving.write_json", fails)
    for target in (path, tmp_path / "new"):
        with pytest.raises(OSError, match="disk full"):
            pretrained.save(target, decoder, changed, overwrite=True)
    monkeypatch.undo()
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "model"]

    pretrained.save(path, decoder, changed, overwrite=True)
    same_tree(pretrained.load(path)[1], changed)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "model"]


# Heads.


def test_heads(tmp_path):
    head = {"kernel": jnp.arange(8.0), "bias": jnp.array(0.5)}
    for kind in ("value", "score"):
        pretrained.save_head(tmp_path / "model", head, kind=kind)
        assert (tmp_path / f"model/{kind}_head.safetensors").is_file()
        same_tree(pretrained.load_head(tmp_path / "model", kind=kind), head)
    assert sorted(load_file(tmp_path / "model/value_head.safetensors")) == ["bias", "kernel"]
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), head)
    pretrained.save_head(tmp_path / "model", half, kind="value")
    same_tree(pretrained.load_head(tmp_path / "model", kind="value"), half)
    assert len(list((tmp_path / "model").iterdir())) == 2

    with pytest.raises(ValueError, match="kind: expected one of value, score, got 'reward'"):
        pretrained.save_head(tmp_path, head, kind="reward")
    with pytest.raises(ValueError, match="params: expected kernel and bias, got kernel"):
        pretrained.save_head(tmp_path, {"kernel": head["kernel"]}, kind="value")
    with pytest.raises(ValueError, match=r"expected kernel \[H\] and bias \[\]"):
        pretrained.save_head(
            tmp_path, {"kernel": head["kernel"], "bias": jnp.ones(1)}, kind="value"
        )
    with pytest.raises(FileNotFoundError, match="value_head.safetensors: is missing"):
        pretrained.load_head(tmp_path, kind="value")
    file = tmp_path / "model/value_head.safetensors"
    shutil.copy(tmp_path / "model/score_head.safetensors", file)
    with pytest.raises(ValueError, match=r"is not a value head \(is a score head\)"):
        pretrained.load_head(tmp_path / "model", kind="value")
    save_file({"kernel": np.ones(8, np.float32)}, file)
    with pytest.raises(ValueError, match="is not a value head"):
        pretrained.load_head(tmp_path / "model", kind="value")


def test_score_head():
    config = DecoderConfig(**SMALL)
    head = score_head_init(config, jax.random.key(0))
    assert {k: v.shape for k, v in head.items()} == {"kernel": (8,), "bias": ()}
    assert jax.tree.structure(head) == jax.tree.structure(
        score_head_logical_axes(), is_leaf=lambda x: isinstance(x, tuple)
    )
    hidden = np.random.default_rng(0).normal(size=(3, 5, 8)).astype(np.float32)
    head = {"kernel": jnp.arange(8.0), "bias": jnp.array(0.5)}
    lengths = np.array([5, 1, 3], np.int32)
    wanted = [hidden[b, n - 1] @ np.arange(8.0) + 0.5 for b, n in enumerate(lengths)]
    np.testing.assert_allclose(score_head_apply(head, hidden, lengths), wanted, rtol=1e-5)
    padded = np.pad(hidden, ((0, 0), (0, 4), (0, 0)), constant_values=np.nan)
    np.testing.assert_allclose(jax.jit(score_head_apply)(head, padded, lengths), wanted, rtol=1e-5)
    scores = score_head_apply(head, hidden.astype(jnp.bfloat16), lengths)
    assert scores.dtype == jnp.float32
    for wrong, message in (
        ((hidden[0], lengths), "hidden: expected rank 3"),
        ((hidden, lengths[:2]), r"lengths: expected shape \(3,\), got \(2,\)"),
        ((hidden, lengths.astype(np.float32)), "lengths: expected an integer dtype"),
        ((hidden, np.array([6, 1, 3])), r"lengths: expected values in \[1, 5\]"),
        ((hidden, np.array([0, 1, 3])), r"lengths: expected values in \[1, 5\]"),
        ((hidden[..., :4], lengths), "hidden: expected last axis 8"),
    ):
        with pytest.raises(ValueError, match=message):
            score_head_apply(head, *wrong)


def test_reward_models(checkpoint, tmp_path):
    decoder, params = pretrained.load(checkpoint)
    with pytest.raises(ValueError, match=r"config.json: is not of a model that scores sequences"):
        pretrained.load_reward_model(checkpoint)
    score = np.random.default_rng(1).normal(size=(1, 8)).astype(np.float32)
    edit_config(checkpoint, architectures=["LlamaForSequenceClassification"], id2label={"0": "x"})

    def scored(tensors):
        del tensors["lm_head.weight"]
        tensors["score.weight"] = score

    edit_tensors(checkpoint, scored)
    with pytest.raises(ValueError, match="use load_reward_model"):
        pretrained.load(checkpoint)
    model, values, head = pretrained.load_reward_model(checkpoint)
    same_tree(values, {k: v for k, v in params.items() if k != "unembedding"})
    same_tree(head, {"kernel": jnp.asarray(score[0]), "bias": jnp.zeros(())})
    tokens, lengths = np.arange(12, dtype=np.int32).reshape(2, 6), np.array([6, 4], np.int32)
    hidden = np.asarray(decoder.apply(params, tokens))
    wanted = [hidden[0, 5] @ score[0], hidden[1, 3] @ score[0]]
    scores = score_head_apply(head, model.apply(values, tokens), lengths)
    np.testing.assert_allclose(scores, wanted, rtol=1e-5)
    edit_tensors(checkpoint, lambda t: t.update({"score.weight": np.ones((2, 8), np.float32)}))
    with pytest.raises(ValueError, match=r"score.weight has shape \(2, 8\), expected \(1, 8\)"):
        pretrained.load_reward_model(checkpoint)
    edit_tensors(checkpoint, lambda t: t.pop("score.weight") is None)
    with pytest.raises(ValueError, match=r"score.weight is missing"):
        pretrained.load_reward_model(checkpoint)
