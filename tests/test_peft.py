"""PEFT's adapter files: those it writes are read here, those written here are read by it."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgjax import models
from pgjax.models import lora

CONFIG = models.DecoderConfig(
    vocab_size=17,
    hidden_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_size=32,
    max_length=32,
    norm_epsilon=1e-5,
)
TOKENS = np.random.default_rng(1).integers(0, 17, (2, 9))
HALVES = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}


@functools.cache
def build():
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        offset = "norm" in jax.tree_util.keystr(path)
        return jnp.asarray(0.3 * rng.normal(size=leaf.shape) + offset, leaf.dtype)

    return models.FunctionalDecoder(CONFIG), jax.tree_util.tree_map_with_path(
        draw, models.abstract_params(CONFIG)
    )


@functools.partial(jax.jit, static_argnums=0)
def logits_of(decoder, params, tokens):
    return decoder.logits(params, decoder.apply(params, tokens))


def torch_model():
    """The same decoder as transformers' Llama, its weights set one by one."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    _, params = build()
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=17,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            intermediate_size=32,
            max_position_embeddings=32,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
        )
    ).eval()

    def put(name, values):
        parameter = model.get_parameter(f"{name}.weight")
        values = torch.tensor(np.array(values))
        assert parameter.shape == values.shape, name
        parameter.data.copy_(values)

    put("model.embed_tokens", params["embedding"])
    put("lm_head", params["unembedding"].T)
    put("model.norm", params["norm"])
    layers = params["layers"]
    for i in range(2):
        where = f"model.layers.{i}"
        put(f"{where}.input_layernorm", layers["attention_norm"][i])
        put(f"{where}.post_attention_layernorm", layers["mlp_norm"][i])
        for name, module in HALVES.items():
            weight = layers["attention"][name][i]
            matrix = weight.reshape(24, -1) if name != "output" else weight.reshape(-1, 24)
            put(f"{where}.self_attn.{module}", matrix.T)
        for name in ("gate", "up", "down"):
            put(f"{where}.mlp.{name}_proj", layers["mlp"][name][i].T)
    return model


def torch_logits(model):
    import torch

    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def test_the_base_models_agree():
    decoder, params = build()
    np.testing.assert_allclose(
        logits_of(decoder, params, TOKENS), torch_logits(torch_model()), rtol=1e-3, atol=1e-3
    )


def test_fresh_adapters_have_the_spread_of_pefts():
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(256, 64, bias=False)),
        peft.LoraConfig(r=512, target_modules=["0"]),
    )
    theirs = model.base_model.model[0].lora_A["default"].weight.detach().numpy()
    params = {"layers": {"mlp": {"down": jax.ShapeDtypeStruct((1, 256, 64), jnp.float32)}}}
    fresh = lora.init(params, jax.random.key(0), rank=512, alpha=1)
    ours = np.asarray(fresh["layers"]["mlp"]["down"].a)
    assert ours.std() == pytest.approx(theirs.std(), rel=0.01)
    assert np.abs(ours).max() == pytest.approx(np.abs(theirs).max(), rel=0.001)


PEFT_CONFIGS = {
    "attention": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "everything_rank_stabilised": {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": "all-linear",
        "use_rslora": True,
    },
    "patterns": {
        "r": 2,
        "lora_alpha": 5,
        "target_modules": ["q_proj", "o_proj", "up_proj", "down_proj"],
        "rank_pattern": {"q_proj": 6, "mlp.up_proj": 3},
        "alpha_pattern": {"self_attn.o_proj": 9, r"layers\.\d+\.mlp\.down_proj": 1},
    },
}


@pytest.mark.parametrize("name", PEFT_CONFIGS)
def test_an_adapter_made_by_peft_gives_its_logits(name, tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    decoder, params = build()
    model = peft.get_peft_model(
        torch_model(), peft.LoraConfig(task_type="CAUSAL_LM", **PEFT_CONFIGS[name])
    ).eval()
    torch.manual_seed(0)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data.normal_(0, 0.3)
    model.save_pretrained(tmp_path)
    adapters = lora.load_peft(tmp_path, params)
    expected = torch_logits(model)
    assert np.abs(expected - np.asarray(logits_of(decoder, params, TOKENS))).max() > 0.5
    found = logits_of(decoder, lora.attach(params, adapters), TOKENS)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-3)
    # And once more around, through our own writer.
    lora.save_peft(tmp_path / "again", adapters)
    again = lora.load_peft(tmp_path / "again", models.abstract_params(CONFIG))
    assert jax.tree.structure(again) == jax.tree.structure(adapters)
    jax.tree.map(np.testing.assert_array_equal, again, adapters)


@pytest.mark.parametrize("rule", lora.SCALINGS)
@pytest.mark.parametrize("kind", ["one_rank", "many"])
def test_peft_reads_what_is_saved_here(rule, kind, tmp_path):
    peft = pytest.importorskip("peft")
    decoder, params = build()
    many = {
        "rank": {"*/query": 5, "*/mlp/*": 2, "*": 3},
        "alpha": {"*/attention/*": 7.5, "*": 4.0},
        "targets": ("*/query", "*/output", "layers/mlp/*"),
    }
    options = {"rank": 4, "alpha": 8.0} if kind == "one_rank" else many
    adapters = lora.init(params, jax.random.key(0), scaling=rule, **options)
    adapters = jax.tree.map(
        lambda x: jnp.asarray(0.3 * np.random.default_rng(x.size).normal(size=x.shape), x.dtype),
        adapters,
    )
    lora.save_peft(tmp_path, adapters, base_model="tiny")
    model = peft.PeftModel.from_pretrained(torch_model(), str(tmp_path)).eval()
    assert model.peft_config["default"].base_model_name_or_path == "tiny"
    expected = logits_of(decoder, lora.attach(params, adapters), TOKENS)
    np.testing.assert_allclose(torch_logits(model), expected, rtol=1e-3, atol=2e-3)
    assert np.abs(np.asarray(expected - logits_of(decoder, params, TOKENS))).max() > 0.5


def test_a_checkpoint_and_an_adapter_of_the_hub_work_together(tmp_path):
    """Qwen2, with biases in its projections, from files as PEFT and transformers write them."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=17,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=32,
            max_position_embeddings=32,
            tie_word_embeddings=True,
        )
    ).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    model.save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    ).eval()
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data.normal_(0, 0.3)
    model.save_pretrained(tmp_path / "adapter")
    decoder, params = models.from_pretrained(tmp_path / "base")
    adapters = lora.load_peft(tmp_path / "adapter", params)
    found = logits_of(decoder, lora.attach(params, adapters), TOKENS)
    expected = torch_logits(model)
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())


def test_bfloat16_adapters_survive(tmp_path):
    _, params = build()
    adapters = lora.init(params, jax.random.key(0), rank=2, alpha=4, dtype=jnp.bfloat16)
    adapters = jax.tree.map(lambda x: x + jnp.asarray(0.1, x.dtype), adapters)
    lora.save_peft(tmp_path, adapters)
    again = lora.load_peft(tmp_path, params, dtype=jnp.bfloat16)
    jax.tree.map(np.testing.assert_array_equal, again, adapters)
    assert {x.dtype for x in jax.tree.leaves(lora.load_peft(tmp_path, params))} == {
        jnp.dtype(jnp.float32)
    }


@pytest.fixture
def saved(tmp_path):
    _, params = build()
    adapters = lora.init(params, jax.random.key(0), rank=2, alpha=4, targets=["*/query", "*/up"])
    lora.save_peft(tmp_path, adapters)
    return tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type: expected LORA, got 'IA3'"),
        ({"use_dora": True}, "use_dora: adapters with use_dora=True are not supported"),
        ({"bias": "all"}, "bias: adapters with bias='all'"),
        ({"lora_bias": True}, "lora_bias: "),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save: .*\['lm_head'\]"),
        ({"layers_to_transform": [0]}, "layers_to_transform: "),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication: "),
        ({"trainable_token_indices": [3]}, "trainable_token_indices: "),
        ({"target_parameters": ["mlp.experts"]}, "target_parameters: "),
        ({"fan_in_fan_out": True}, "fan_in_fan_out: "),
        ({"use_some_new_thing": {"a": 1}}, "use_some_new_thing: "),
        (
            {"rank_pattern": {r"layers\.0\.self_attn\.q_proj": 5}},
            "alpha of self_attn.q_proj differ",
        ),
        ({"r": 3}, r"lora_A of .* has shape \(2, 24\), expected \(3, 24\)"),
    ],
)
def test_what_is_not_supported_is_named(saved, change, message):
    _, params = build()
    path = saved / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        lora.load_peft(saved, params)


def change_tensors(directory, change):
    from safetensors.numpy import load_file, save_file

    path = directory / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def test_tensors_that_do_not_belong_are_named(saved):
    _, params = build()
    prefix = "base_model.model.model"
    query = f"{prefix}.layers.1.self_attn.q_proj.lora_A.weight"

    def refused(change, message):
        original = (saved / "adapter_model.safetensors").read_bytes()
        change_tensors(saved, change)
        with pytest.raises(ValueError, match=message):
            lora.load_peft(saved, params)
        (saved / "adapter_model.safetensors").write_bytes(original)

    extra = np.zeros((2, 17), np.float32)
    name = f"{prefix}.embed_tokens.lora_embedding_A"
    refused(lambda t: {**t, name: extra}, f"tensor {name} is not supported")
    fused = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"
    refused(lambda t: {fused: extra}, "c_attn.lora_A.weight is not supported; expected lora_A and")
    module = f"{prefix}.layers.0.self_attn.qkv_proj.lora_A.weight"
    refused(lambda t: {**t, module: extra}, r"layers.\*.self_attn.qkv_proj is none of the base's")
    refused(
        lambda t: {k: v for k, v in t.items() if k != query},
        r"expected lora_A of self_attn.q_proj for layers 0 to 1, got \[0\]",
    )
    refused(lambda t: {**t, query: extra}, "lora_A of self_attn.q_proj differs in shape")
    refused(
        lambda t: {k: v[:, :9] if "lora_A" in k else v for k, v in t.items()},
        r"lora_A of mlp.up_proj has shape \(2, 9\), expected \(2, 24\)",
    )
    refused(lambda t: {}, "no tensors")
    with pytest.raises(FileNotFoundError, match="adapter_config.json"):
        lora.load_peft(saved / "nowhere", params)
    (saved / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="adapter_model.safetensors"):
        lora.load_peft(saved, params)


def test_what_peft_has_no_name_for_is_not_saved(tmp_path):
    _, params = build()
    mixture = models.MoEConfig(
        num_experts=2, experts_per_token=1, expert_size=4, normalize_weights=True
    )
    config = models.DecoderConfig(
        vocab_size=7,
        hidden_size=8,
        num_layers=1,
        num_heads=2,
        mlp_size=8,
        max_length=8,
        moe=mixture,
    )
    experts = lora.init(models.abstract_params(config), jax.random.key(0), rank=1, alpha=1)
    with pytest.raises(ValueError, match="adapters: layers/moe/down has no PEFT module"):
        lora.save_peft(tmp_path, experts)
    with pytest.raises(ValueError, match="expected at least one, got none"):
        lora.save_peft(tmp_path, {})
    one, other = (
        lora.init(params, jax.random.key(0), rank=1, alpha=1, targets=[t], scaling=rule)
        for t, rule in (("*/query", "standard"), ("*/up", "rank_stabilized"))
    )
    both = {"layers": {**one["layers"], **other["layers"]}}
    with pytest.raises(ValueError, match="one scaling rule for all"):
        lora.save_peft(tmp_path, both)
    with pytest.raises(ValueError, match="decoder/layers/attention/query has no PEFT module"):
        lora.save_peft(tmp_path, {"decoder": one})
    fused = dataclasses.replace(CONFIG, norm="layer", learned_positions=True)
    with pytest.raises(ValueError, match=r"config: GPT-2 has .* in one module \(c_attn\)"):
        lora.save_peft(tmp_path, one, config=fused)
    assert not list(tmp_path.iterdir())
