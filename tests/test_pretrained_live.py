"""The checkpoints' families against transformers itself, where it is installed."""

from __future__ import annotations

import functools
import itertools
import json

import jax
import numpy as np
import pytest
from golden import cases, make

from pgjax import models, sampling
from pgjax.models import pretrained
from pgjax.models.heads import score_head_apply
from pgjax.models.pretrained.checkpoint import leaves
from pgjax.models.pretrained.families import identify
from pgjax.models.pretrained.family import axis_sizes

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5")


TOLERANCE = 1e-4
CASES = sorted(cases.CASES)
HUB = json.loads((cases.DIRECTORY / "hub.json").read_text())
LONG = 128  # room for prompts and completions, also where the trained length is shorter


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On models this small more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Each case as transformers makes it today: its directory, config.json, tensors' shapes."""

    @functools.cache
    def of(case):
        path = tmp_path_factory.mktemp(case)
        return path, *make.build(case, path)

    return of


@pytest.fixture(scope="module")
def torch_model(built):
    return functools.cache(lambda case: make.opened(built(case)[0]))


@pytest.fixture(scope="module")
def loaded(built):
    return functools.cache(lambda case: pretrained.load(built(case)[0], max_length=LONG))


def assert_close_on_real_tokens(actual, wanted):
    for row, length in enumerate(cases.LENGTHS):
        np.testing.assert_allclose(
            np.asarray(actual)[row, :length], wanted[row, :length], rtol=0, atol=TOLERANCE
        )


@pytest.mark.parametrize("case", CASES)
def test_golden_files_are_what_transformers_gives(case, built, torch_model):
    _, text, shapes = built(case)
    golden = cases.read(case)
    assert shapes == golden["shapes"]
    ours, theirs = json.loads(golden["config"]), json.loads(text)
    assert ours.pop("transformers_version") and theirs.pop("transformers_version")
    # Older and newer versions write more or fewer options; those in both have one meaning.
    assert {k: v for k, v in ours.items() if k in theirs} == {
        k: v for k, v in theirs.items() if k in ours
    }
    assert_close_on_real_tokens(make.logits(torch_model(case)), golden["logits"])


@pytest.mark.parametrize("case", CASES)
def test_transformers_loads_what_is_saved(case, loaded, torch_model, tmp_path):
    """Without a source, so that config.json is of our own making."""
    decoder, params = loaded(case)
    pretrained.save(tmp_path / "out", decoder, params, max_shard_bytes=40_000)
    model, info = type(torch_model(case)).from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_close_on_real_tokens(make.logits(model.eval()), cases.read(case)["logits"])


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("llama", "llama_linear")])
def test_greedy_generation_is_that_of_transformers(case, loaded, torch_model):
    """64 tokens after prompts of two lengths, one of them within and one beyond the windows."""
    lengths, steps = np.array([3, 20], np.int32), 64
    prompts = cases.tokens()[:, :20]
    samples = sampling.generate(
        *loaded(case),
        prompts,
        lengths,
        jax.random.key(0),
        num_samples=1,
        max_new_tokens=steps,
        temperature=0.0,
    )
    for row, length in enumerate(lengths):
        ours = np.asarray(samples.tokens)[row, length : length + steps]
        prompt = torch.from_numpy(prompts[row : row + 1, :length]).long()
        theirs = torch_model(case).generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=steps,
            pad_token_id=0,
        )
        np.testing.assert_array_equal(ours, theirs.numpy()[0, length:])


@pytest.mark.parametrize("name", sorted(HUB))
def test_tensors_of_the_models_on_the_hub(name):
    """The names and shapes that are expected are those transformers' model would save."""
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    values = HUB[name]["config"]
    config = transformers.AutoConfig.for_model(
        **{key: value for key, value in values.items() if key != "architectures"}
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config.get_text_config())
    state = revert_weight_conversion(model, model.state_dict())
    theirs = {key: tuple(value.shape) for key, value in state.items()}
    family, _, options = identify(values)
    decoder = family.config(options)
    if decoder.tied_embeddings:
        theirs.pop("lm_head.weight", None)
    sizes, ours = axis_sizes(decoder), {}
    for path in leaves(models.abstract_params(decoder)):
        key = next(key for key in family.keys if key.path == path)
        for at in itertools.product(*(range(sizes[axis]) for axis in key.leading)):
            ours[key.tensor(*at)] = key.parsed.shape(sizes)
    assert ours == theirs


@pytest.mark.parametrize("case", ["llama_linear", "qwen3_moe", "gemma3", "gpt2"])
def test_reward_models(case, tmp_path):
    """Scores of right-padded rows."""
    import transformers

    prefix, options = cases.CASES[case]
    config = getattr(transformers, f"{prefix}Config")(**options)
    config.num_labels, config.pad_token_id = 1, 0
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix}ForSequenceClassification")(config).eval()
    model.save_pretrained(tmp_path)
    decoder, params, head = pretrained.load_reward_model(tmp_path)
    tokens = cases.tokens()
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens).long()).logits.numpy()[:, 0]
    lengths = np.array(cases.LENGTHS, np.int32)
    ours = score_head_apply(head, decoder.apply(params, tokens), lengths)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


def test_language_model_of_a_gemma3_that_sees(tmp_path):
    import transformers

    _, options = cases.CASES["gemma3"]
    vision = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 8,
        "patch_size": 4,
        "vision_use_head": False,
    }
    config = transformers.Gemma3Config(
        text_config={**options, "final_logit_softcapping": None},
        vision_config=vision,
        mm_tokens_per_image=4,
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    decoder, params = pretrained.load(tmp_path)
    with torch.no_grad():
        theirs = model(torch.from_numpy(cases.tokens()).long()).logits.numpy()
    ours = decoder.logits(params, decoder.apply(params, cases.tokens()))
    assert_close_on_real_tokens(ours, theirs)


def test_bfloat16_checkpoints_of_transformers(built, tmp_path):
    """As transformers writes them; the same bits."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        built("qwen3")[0], dtype=torch.bfloat16
    )
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    decoder, params = pretrained.load(tmp_path)
    assert decoder.config.param_dtype == decoder.config.dtype == jax.numpy.bfloat16
    theirs = model.model.embed_tokens.weight.view(torch.uint16).numpy()
    np.testing.assert_array_equal(np.asarray(params["embedding"]).view(np.uint16), theirs)
    query = model.model.layers[1].self_attn.q_proj.weight.view(torch.uint16).numpy()
    ours = np.asarray(params["layers"]["attention"]["query"])[1].view(np.uint16)
    np.testing.assert_array_equal(ours.reshape(32, -1).T, query)
