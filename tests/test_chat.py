"""Chat: tokenizers trained on the spot, masks against the text they decode to, stop strings."""

from __future__ import annotations

import copy
import functools
import sys
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgjax.tasks import chat

pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}"
    "{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Drops what stands before </think> in all but the last message, as reasoning models' templates do.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] or '' }}"
    "{% for c in m['tool_calls'] or [] %}<tool_call>{{ c['function'] | tojson }}</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)
# How current byte-level tokenizers cut text: line breaks do not depend on what follows them.
PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CORPUS = [
    "the answer is forty two\n\n",
    "user assistant system tool <think> hmm </think> wait, the answer is 42.",
    "Ünïcödé ∑ 猫 naïve café  double  spaces\t\ttabs",
] * 20


@functools.cache
def trained(trim_offsets=False):
    """A byte-level BPE; some real tokenizers report offsets without leading spaces."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    pretokenizers = tokenizers.pre_tokenizers
    made.pre_tokenizer = pretokenizers.Sequence(
        [
            pretokenizers.Split(tokenizers.Regex(PATTERN), "isolated"),
            pretokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = tokenizers.decoders.ByteLevel()
    made.post_processor = tokenizers.processors.ByteLevel(trim_offsets=trim_offsets)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=list(SPECIAL),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


@functools.cache
def wrapped(template=chat.CHATML, end="<|im_end|>", trim_offsets=False, **options):
    import transformers

    options = {"pad_token": "<|endoftext|>", "bos_token": "<|begin_of_text|>", **options}
    backend = copy.deepcopy(trained(trim_offsets))
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, **options)
    made.chat_template = template
    return made


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def masked_texts(tokenizer, conversation):
    """What the mask of each turn decodes to."""
    count = conversation.turn_ids.max() + 1
    np.testing.assert_array_equal(conversation.mask, conversation.turn_ids >= 0)
    return [
        chat.decode(tokenizer, conversation.tokens[conversation.turn_ids == t], special=True)
        for t in range(count)
    ]


# ------------------------------------------------------------------ opening a tokenizer


@pytest.fixture
def saved(tmp_path):
    wrapped().save_pretrained(tmp_path)
    return tmp_path


def test_a_saved_tokenizer_is_opened_offline(saved, monkeypatch):
    def unreachable(*args, **kwargs):
        raise AssertionError("the network was used")

    monkeypatch.setattr("socket.socket.connect", unreachable)
    opened = chat.load_tokenizer(saved)
    text = "the answer is 42 猫"
    np.testing.assert_array_equal(chat.encode(opened, text), chat.encode(wrapped(), text))
    assert opened.chat_template == chat.CHATML


def test_unusable_directories(saved, tmp_path_factory):
    with pytest.raises(FileNotFoundError, match="directory: expected an existing directory"):
        chat.load_tokenizer(saved / "nowhere")
    empty = tmp_path_factory.mktemp("empty")
    (empty / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"expected one of tokenizer\.json.*config\.json"):
        chat.load_tokenizer(empty)
    (saved / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="does not hold a readable tokenizer"):
        chat.load_tokenizer(saved)


def test_a_tokenizer_without_an_end_needs_a_generation_config(tmp_path):
    wrapped(end=None, pad_token=None).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no end of sequence; set `tokenizer.eos_token`"):
        chat.load_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [6, 2]}')
    opened = chat.load_tokenizer(tmp_path)
    assert chat.stop_token_ids(opened, tmp_path) == (2, 6)


def test_transformers_missing(monkeypatch, saved):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'pgjax\[hf\]'"):
        chat.load_tokenizer(saved)


def test_vocabulary_must_fit_the_model():
    tokenizer = wrapped()
    highest = max(tokenizer.get_vocab().values())
    for size in (highest + 1, highest + 100):
        chat.check_vocabulary(tokenizer, types.SimpleNamespace(vocab_size=size))
    with pytest.raises(ValueError, match=f"ids up to {highest} .*vocab_size is {highest};"):
        chat.check_vocabulary(tokenizer, types.SimpleNamespace(vocab_size=highest))


def test_stop_tokens(tmp_path):
    tokenizer = wrapped()
    assert chat.stop_token_ids(tokenizer) == (2,)
    assert chat.stop_token_ids(tokenizer, tmp_path) == (2,)  # no such file in it
    path = tmp_path / "generation_config.json"
    for content, wanted in (('{"eos_token_id": 0}', (0, 2)), ('{"eos_token_id": [6, 2]}', (2, 6))):
        path.write_text(content)
        assert chat.stop_token_ids(tokenizer, path) == wanted
        assert chat.stop_token_ids(tokenizer, tmp_path) == wanted
    for content, message in (
        ("{", "not valid JSON"),
        ("[1]", "expected a JSON object"),
        ('{"eos_token_id": "2"}', "eos_token_id: expected integers"),
        ('{"eos_token_id": [true]}', "eos_token_id: expected integers"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=f"generation_config: .*{message}|{message}"):
            chat.stop_token_ids(tokenizer, path)
    with pytest.raises(FileNotFoundError, match="generation_config"):
        chat.stop_token_ids(tokenizer, tmp_path / "other.json")


def test_padding():
    assert chat.pad_token_id(wrapped()) == 0
    assert chat.pad_token_id(wrapped(pad_token=None)) == 2  # the end of sequence
    reserved = copy.deepcopy(wrapped(pad_token=None))
    reserved.add_tokens(["<|finetune_right_pad_id|>"], special_tokens=True)
    assert chat.pad_token_id(reserved) == len(reserved) - 1
    with pytest.raises(ValueError, match="no end of sequence"):
        chat.pad_token_id(wrapped(end=None, pad_token=None))


# ------------------------------------------------------------------ text and bytes

TEXT = st.text(max_size=40).filter(lambda t: not any(s in t for s in SPECIAL))


@given(TEXT)
@settings(max_examples=150, deadline=None)
def test_any_text_survives_tokens(text):
    tokenizer = wrapped()
    tokens = chat.encode(tokenizer, text)
    assert tokens.dtype == np.int32
    assert chat.decode(tokenizer, tokens) == text
    assert b"".join(chat.token_bytes(tokenizer, tokens)) == text.encode()


def test_special_tokens_in_text():
    tokenizer = wrapped()
    tokens = chat.encode(tokenizer, "42<|im_end|>")
    assert tokens[-1] == 2
    assert chat.decode(tokenizer, tokens) == "42"
    assert chat.decode(tokenizer, tokens, special=True) == "42<|im_end|>"
    assert chat.token_bytes(tokenizer, [2]) == [b"<|im_end|>"]
    with pytest.raises(ValueError, match="ids of at least 0, got -1"):
        chat.token_bytes(tokenizer, [-1])


def test_ids_of_a_padded_vocabulary_are_no_text():
    tokenizer = wrapped()
    tokens = [int(t) for t in chat.encode(tokenizer, "stop it")]
    beyond = len(tokenizer) + 5
    mixed = np.array([[beyond, *(i for t in tokens for i in (t, beyond))]], np.int32)
    assert chat.decode(tokenizer, mixed[0]) == "stop it"
    assert b"".join(chat.token_bytes(tokenizer, mixed[0])) == b"stop it"
    position = chat.stop_string_positions(mixed, np.ones_like(mixed, bool), tokenizer, ["it"])
    assert mixed[0, position[0]] == tokens[-1]


def test_a_cut_character_decodes_to_a_replacement():
    tokenizer = wrapped()
    tokens = chat.encode(tokenizer, "𝄞")
    assert len(tokens) > 1
    assert "\ufffd" in chat.decode(tokenizer, tokens[:-1])


def test_tokens_added_later_are_known():
    tokenizer = copy.deepcopy(wrapped())
    chat.token_bytes(tokenizer, [5])
    tokenizer.add_tokens(["<tool>"])
    assert chat.token_bytes(tokenizer, [len(tokenizer) - 1]) == [b"<tool>"]


# ------------------------------------------------------------------ conversations

# Of a turn that begins with white space the first token may reach back into the header; templates
# that strip turns strip both ends.
SAID = TEXT.filter(lambda t: t and t == t.strip() and not t[0].isspace())


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize(
    ("template", "end"),
    [(chat.CHATML, "<|im_end|>"), (LLAMA, "<|eot_id|>"), (MARKED, "<|im_end|>")],
)
@given(said=st.lists(SAID, min_size=1, max_size=3), asked=TEXT, system=st.none() | TEXT)
@settings(max_examples=25, deadline=None)
def test_the_mask_is_exactly_what_the_assistant_said(
    template, end, trim_offsets, said, asked, system
):
    tokenizer = wrapped(template, end, trim_offsets)
    messages = [] if system is None else [turn("system", system)]
    for answer in said:
        messages += [turn("user", asked), turn("assistant", answer)]
    found = chat.encode_conversation(tokenizer, messages)
    assert masked_texts(tokenizer, found) == [answer + end for answer in said]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    np.testing.assert_array_equal(found.tokens, chat.encode(tokenizer, whole))
    assert {a.dtype.name for a in found} == {"int32", "bool"}
    last = chat.encode_conversation(tokenizer, messages, last_turn_only=True)
    assert masked_texts(tokenizer, last) == [said[-1] + end]
    np.testing.assert_array_equal(last.mask, found.turn_ids == len(said) - 1)


@given(said=SAID, asked=TEXT)
@settings(max_examples=50, deadline=None)
def test_a_prompt_is_how_the_conversation_begins(said, asked):
    for template in (chat.CHATML, LLAMA):
        tokenizer = wrapped(template, "<|im_end|>" if template == chat.CHATML else "<|eot_id|>")
        messages = [turn("user", asked)]
        prompt = chat.encode_prompt(tokenizer, messages)
        assert all(type(token) is int for token in prompt)
        found = chat.encode_conversation(tokenizer, [*messages, turn("assistant", said)])
        assert found.tokens[: len(prompt)].tolist() == prompt
        assert found.mask.argmax() == len(prompt)


def test_a_token_across_the_header_is_not_the_assistants():
    tokenizer = wrapped()
    newlines = chat.encode(tokenizer, "\n\n")
    assert len(newlines) == 1  # otherwise this shows nothing
    found = chat.encode_conversation(tokenizer, [turn("user", "q"), turn("assistant", "\nx")])
    assert newlines[0] in found.tokens
    assert masked_texts(tokenizer, found) == ["x<|im_end|>"]


def test_leading_spaces_are_the_assistants():
    for trim_offsets in (False, True):
        tokenizer = wrapped(trim_offsets=trim_offsets)
        messages = [turn("user", "a  "), turn("assistant", "  two spaces  ")]
        found = chat.encode_conversation(tokenizer, messages)
        assert masked_texts(tokenizer, found) == ["  two spaces  <|im_end|>"]


def test_an_assistant_that_writes_control_tokens_keeps_them():
    tokenizer = wrapped()
    messages = [turn("user", "hi"), turn("assistant", "a<|im_end|>b")]
    found = chat.encode_conversation(tokenizer, messages)
    assert masked_texts(tokenizer, found) == ["a<|im_end|>b<|im_end|>"]


def test_tool_calls_are_the_assistants_and_tool_results_are_not():
    tokenizer = wrapped(TOOLS)
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    messages = [
        turn("user", "1+1?"),
        turn("assistant", None, tool_calls=[call]),
        turn("tool", "the answer is 2"),
        turn("assistant", "2"),
        turn("user", "thanks"),
    ]
    found = chat.encode_conversation(tokenizer, messages, tools=tools)
    first, second = masked_texts(tokenizer, found)
    assert first.startswith("<tool_call>") and first.endswith("</tool_call><|im_end|>")
    assert second == "2<|im_end|>"
    rest = chat.decode(tokenizer, found.tokens[~found.mask], special=True)
    assert "the answer is 2" in rest and '"parameters"' in rest and "thanks" in rest
    np.testing.assert_array_equal(np.unique(found.turn_ids), [-1, 0, 1])
    prompt = chat.encode_prompt(tokenizer, messages[:3], tools=tools)
    assert found.tokens[: len(prompt)].tolist() == prompt


def test_templates_that_forget_are_told_apart():
    tokenizer = wrapped(FORGETFUL)
    messages = [
        turn("user", "a"),
        turn("assistant", "<think>x</think>1"),
        turn("user", "b"),
        turn("assistant", "<think>y</think>2"),
    ]
    with pytest.raises(ValueError, match="not prefix-stable: it renders message 1 differently"):
        chat.encode_conversation(tokenizer, messages)
    last = chat.encode_conversation(tokenizer, messages, last_turn_only=True)
    assert masked_texts(tokenizer, last) == ["<think>y</think>2<|im_end|>"]
    first = chat.encode_conversation(tokenizer, messages[:2])
    assert masked_texts(tokenizer, first) == ["<think>x</think>1<|im_end|>"]


def test_templates_whose_prompt_is_no_beginning():
    other = chat.CHATML.replace("<|im_start|>assistant", "<|im_start|>model")
    messages = [turn("user", "a"), turn("assistant", "b")]
    with pytest.raises(ValueError, match="not prefix-stable: the prompt for message 1"):
        chat.encode_conversation(wrapped(other), messages)
    endless = chat.CHATML.replace("<|im_end|>", "")
    with pytest.raises(ValueError, match="ends the assistant's message 1 by no special token"):
        chat.encode_conversation(wrapped(endless), messages)
    with pytest.raises(ValueError, match="expected a message before the assistant's first turn"):
        chat.encode_conversation(wrapped(), messages[1:])
    marked = chat.encode_conversation(wrapped(MARKED), messages[1:])
    assert masked_texts(wrapped(MARKED), marked) == ["b<|im_end|>"]


def test_bad_conversations():
    tokenizer, messages = wrapped(), [turn("user", "a"), turn("assistant", "b")]
    length = len(chat.encode_conversation(tokenizer, messages).tokens)
    chat.encode_conversation(tokenizer, messages, max_length=length)
    with pytest.raises(ValueError, match=f"max_length: the conversation takes {length} tokens"):
        chat.encode_conversation(tokenizer, messages, max_length=length - 1)
    with pytest.raises(ValueError, match="at least one assistant message"):
        chat.encode_conversation(tokenizer, messages[:1])
    for function in (chat.encode_prompt, chat.encode_conversation):
        with pytest.raises(ValueError, match=r"no chat template; set .*chat_template\.jinja"):
            function(wrapped(None), messages)
        for bad in ([], "hello", {"role": "user"}):
            with pytest.raises(ValueError, match="messages: expected a non-empty list"):
                function(tokenizer, bad)
        with pytest.raises(ValueError, match="message 1 to have a role"):
            function(tokenizer, [messages[0], {"content": "b"}])


def test_prompt_encoder_remembers():
    tokenizer = wrapped()
    encode = chat.prompt_encoder(tokenizer, system="Be brief.", suffix=" Box it.")
    wanted = [turn("system", "Be brief."), turn("user", "1+1? Box it.")]
    np.testing.assert_array_equal(encode("1+1?"), chat.encode_prompt(tokenizer, wanted))
    assert encode("1+1?") is encode("1+1?")
    with pytest.raises(ValueError, match="read-only"):
        encode("1+1?")[0] = 7


def test_template_variables_reach_the_template():
    template = "{% if loud %}LOUD{% endif %}" + chat.CHATML
    tokenizer, messages = wrapped(template), [turn("user", "a"), turn("assistant", "b")]
    quiet = chat.encode_conversation(tokenizer, messages)
    loud = chat.encode_conversation(tokenizer, messages, loud=True)
    assert chat.decode(tokenizer, loud.tokens).startswith("LOUD")
    np.testing.assert_array_equal(loud.tokens[-len(quiet.tokens) :], quiet.tokens)
    assert masked_texts(tokenizer, loud) == ["b<|im_end|>"]
    prompt = chat.encode_prompt(tokenizer, messages[:1], loud=True)
    assert chat.decode(tokenizer, prompt).startswith("LOUD")


def test_batches():
    tokenizer = wrapped()
    found = [
        chat.encode_conversation(tokenizer, [turn("user", "q"), turn("assistant", "x" * n)])
        for n in (1, 30)
    ]
    longest = len(found[1].tokens)
    rows = chat.batch(found, pad_token=7)
    assert {k: (v.shape, v.dtype.name) for k, v in rows.items()} == {
        "tokens": ((2, longest), "int32"),
        "mask": ((2, longest), "bool"),
        "turn_ids": ((2, longest), "int32"),
    }
    for row, conversation in enumerate(found):
        n = len(conversation.tokens)
        for name, value in conversation._asdict().items():
            np.testing.assert_array_equal(rows[name][row, :n], value)
        assert (rows["tokens"][row, n:] == 7).all() and (rows["turn_ids"][row, n:] == -1).all()
        assert not rows["mask"][row, n:].any()
    wide = chat.batch(found, pad_token=7, widths=(4, longest + 3, longest + 9))
    assert wide["tokens"].shape == (2, longest + 3)
    with pytest.raises(ValueError, match=f"widths: a conversation takes {longest} tokens"):
        chat.batch(found, pad_token=7, widths=(4,))
    with pytest.raises(ValueError, match="conversations: expected at least one"):
        chat.batch([], pad_token=7)


# ------------------------------------------------------------------ other kinds of tokenizers


def _sentencepiece():
    """Metaspace with byte fallback, as SentencePiece models are converted."""
    import transformers

    names = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "<s>", "</s>", "▁", *"abcdehilotu:1\n"]
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={name: i for i, name in enumerate(names)},
            merges=[],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    made.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    made.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
        ]
    )
    made.add_special_tokens(["<s>", "</s>"])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="</s>", unk_token="<unk>"
    )


def _normalising():
    """Lower case and composed characters: its tokens are not the bytes of the text."""
    import transformers

    backend = copy.deepcopy(trained(True))
    backend.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.NFC(), tokenizers.normalizers.Lowercase()]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")


def test_sentencepiece_vocabularies():
    tokenizer = _sentencepiece()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}</s>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    said = "hi 猫 a"
    tokens = chat.encode(tokenizer, said)
    assert b"".join(chat.token_bytes(tokenizer, tokens)) == said.encode()
    messages = [turn("user", "hello"), turn("assistant", said), turn("user", "a 猫")]
    found = chat.encode_conversation(tokenizer, messages)
    assert masked_texts(tokenizer, found) == [said + "</s>"]


@pytest.mark.parametrize("said", ["The Answer 猫 IS", "cafe\u0301 x", "  Two  "])
def test_tokenizers_that_change_the_text(said):
    tokenizer = _normalising()
    tokenizer.chat_template = chat.CHATML
    messages = [turn("user", "Q\u0301  "), turn("assistant", said), turn("user", "É")]
    found = chat.encode_conversation(tokenizer, messages)
    changed = tokenizer.backend_tokenizer.normalizer.normalize_str(said)
    assert changed != said
    assert masked_texts(tokenizer, found) == [changed + "<|im_end|>"]


# ------------------------------------------------------------------ stop strings


def _rows(tokenizer, *texts, prompt="the question: STOP?"):
    """Rows of a prompt, a completion and padding, as sampling makes them."""
    prompt = chat.encode(tokenizer, prompt)
    said = [chat.encode(tokenizer, t) for t in texts]
    width = len(prompt) + max(len(s) for s in said) + 2
    tokens, mask = np.zeros((len(texts), width), np.int32), np.zeros((len(texts), width), bool)
    for row, ids in enumerate(said):
        end = len(prompt) + len(ids)
        tokens[row, : len(prompt)], tokens[row, len(prompt) : end] = prompt, ids
        mask[row, len(prompt) : end] = True
    return tokens, mask


@given(
    text=st.text(alphabet="abSTOP é猫\n", max_size=30),
    stops=st.lists(st.sampled_from(["STOP", "ab", "é", "猫a", "\n\n"]), min_size=1, max_size=3),
)
@settings(max_examples=150, deadline=None)
def test_stop_strings_against_decoding_prefix_by_prefix(text, stops):
    tokenizer = wrapped()
    tokens, mask = _rows(tokenizer, text, "plain")
    kept, cut = chat.truncate_at_stop(tokens, mask, tokenizer, stops)
    said = tokens[0][mask[0]]
    wanted = len(said)
    for n in range(1, len(said) + 1):
        prefix = b"".join(chat.token_bytes(tokenizer, said[:n]))
        if any(s.encode() in prefix for s in stops):
            wanted = n
            break
    assert kept.tolist() == [wanted, mask[1].sum()] and kept.dtype == np.int32
    start = mask[0].argmax()
    np.testing.assert_array_equal(np.flatnonzero(cut[0]), np.arange(start, start + wanted))
    np.testing.assert_array_equal(cut[1], mask[1])
    position = chat.stop_string_positions(tokens, mask, tokenizer, stops)
    stopped = wanted < len(said) or any(s in text for s in stops)
    assert position[0] == (start + wanted - 1 if stopped else -1) and position[1] == -1


def test_stop_strings_inside_and_across_tokens():
    tokenizer = wrapped()
    answer = chat.encode(tokenizer, " answer")
    assert len(answer) == 1
    tokens, mask = _rows(tokenizer, "the answer is", "猫猫", "no")
    positions = chat.stop_string_positions(tokens, mask, tokenizer, ["nsw", "猫"])
    start = int(mask[0].argmax())
    assert tokens[0, positions[0]] == answer[0]  # inside one token
    cat = len(chat.encode(tokenizer, "猫"))
    assert cat > 1 and positions[1] == start + cat - 1  # a character of several tokens
    assert positions[2] == -1


def test_stop_strings_do_not_join_turns():
    tokenizer = wrapped()
    tokens = np.concatenate([chat.encode(tokenizer, t) for t in ("ab", "xx", "cd", "bc")])[None]
    pieces = np.array([len(chat.encode(tokenizer, t)) for t in ("ab", "xx", "cd", "bc")])
    owner = np.repeat(np.arange(4), pieces)[None]
    mask = (owner == 0) | (owner >= 2)
    assert chat.stop_string_positions(tokens, mask, tokenizer, ["bc"])[0] == owner.size - 1
    assert chat.stop_string_positions(tokens, owner >= 0, tokenizer, ["bx"])[0] >= 0
    assert chat.stop_string_positions(tokens, mask, tokenizer, ["bx"])[0] == -1
    assert chat.stop_string_positions(tokens, mask & False, tokenizer, ["b"])[0] == -1


def test_bad_stop_strings():
    tokenizer = wrapped()
    tokens, mask = _rows(tokenizer, "a")
    for bad in ([], [""], "stop"):
        with pytest.raises(ValueError, match="stop_strings: expected"):
            chat.stop_string_positions(tokens, mask, tokenizer, bad)
    with pytest.raises(ValueError, match="mask: expected shape"):
        chat.truncate_at_stop(tokens, mask[:, 1:], tokenizer, ["a"])
    with pytest.raises(ValueError, match="tokens: expected rank 2"):
        chat.truncate_at_stop(tokens[0], mask[0], tokenizer, ["a"])


def test_the_template_that_is_offered_renders_chatml():
    rendered = wrapped().apply_chat_template(
        [turn("user", "a"), turn("assistant", "b")], tokenize=False, add_generation_prompt=True
    )
    wanted = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    assert rendered == wanted + "<|im_start|>assistant\n"
