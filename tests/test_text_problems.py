"""Text problems: files of every kind, splits, prompt lengths, loaders, the generator."""

from __future__ import annotations

import ast
import itertools
import json
import logging
import operator
import re
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgjax import tasks
from pgjax.rewards import math_answers
from pgjax.tasks import text_problems as problems_of
from pgjax.tasks.text_problems import Problem, Problems

GSM8K = {
    "question": "Natalia sold 48 clips in April and half as many in May. How many in all?",
    "answer": "In May she sold 48/2 = <<48/2=24>>24.\nIn all 48+24 = <<48+24=72>>72.\n#### 72",
}
MATH = {
    "problem": r"Compute $\frac14+\frac14$.",
    "level": "Level 3",
    "type": "Prealgebra",
    "solution": r"It is \boxed{\frac{2}{4}}, that is $\boxed{\frac{1}{2}}$.",
}
MATH500 = {**MATH, "answer": r"\frac{1}{2}", "subject": "Algebra", "level": 5}
PLAIN = {"prompt": "What is 6*7?", "answer": "42"}


def write(path, *records):
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


# ------------------------------------------------------------------ files


def test_gsm8k(tmp_path):
    big = {"question": "How much?", "answer": "Much.\n#### 1,234,000"}
    read = problems_of.load_jsonl(write(tmp_path / "train.jsonl", GSM8K, "", big))
    first, second = read
    assert first == {
        "id": 0,
        "prompt": GSM8K["question"],
        "answer": "72",
        "level": 0,
        "solution": "In May she sold 48/2 = 24.\nIn all 48+24 = 72.\n#### 72",
        "kind": "",
    }
    assert second["answer"] == "1234000" and second["id"] == 1
    assert repr(read) == "Problems(train.jsonl, 2 items)"


def test_math(tmp_path):
    unknown = {**MATH, "level": "Level ?", "solution": r"\fbox{ x^{2} }"}
    read = problems_of.load_jsonl(write(tmp_path / "math.jsonl", MATH, unknown, MATH500))
    assert [p["answer"] for p in read] == [r"\frac{1}{2}", "x^{2}", r"\frac{1}{2}"]
    assert [p["kind"] for p in read] == ["Prealgebra"] * 3
    assert read[0]["solution"] == read[2]["solution"] == MATH["solution"]
    np.testing.assert_array_equal(read.levels, [3, 0, 5])
    assert read.levels.dtype == np.int32


def test_plain_records_and_numbers(tmp_path):
    records = [PLAIN, *({**PLAIN, "answer": a} for a in (7, -2.5, 3.0, "x = 3, y = 4"))]
    read = problems_of.load_jsonl(write(tmp_path / "p.jsonl", *records))
    assert [p["answer"] for p in read] == ["42", "7", "-2.5", "3", "x = 3, y = 4"]
    assert {p["solution"] for p in read} == {""}
    both = write(tmp_path / "q.jsonl", {"question": "q?", "answer": "5"})
    assert problems_of.load_jsonl(both)[0]["answer"] == "5"


def test_named_fields(tmp_path):
    record = {"text": "1+1?", "target": r"so \boxed{2}", "answer": "3", "prompt": "other"}
    read = problems_of.load_jsonl(
        write(tmp_path / "p.jsonl", record), question="text", answer="target"
    )
    assert (read[0]["prompt"], read[0]["answer"]) == ("1+1?", "2")


def test_byte_order_mark_and_unicode(tmp_path):
    path = tmp_path / "bom.jsonl"
    path.write_bytes("\ufeff".encode() + json.dumps({**PLAIN, "prompt": "猫?"}).encode())
    assert problems_of.load_jsonl(path)[0]["prompt"] == "猫?"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": ', "not valid JSON"),
        ("[1, 2]", r"expected a JSON object, got '\[1, 2\]'"),
        ({"answer": "1"}, r"expected a field 'question' or .* with the question, .*\['answer'\]"),
        ({"prompt": "a"}, r"with the answer, got the fields \['prompt'\]"),
        ({"prompt": " ", "answer": "1"}, "field 'prompt': expected a text that is not empty"),
        ({"prompt": ["a"], "answer": "1"}, "field 'prompt': expected a text"),
        ({"prompt": "a", "answer": None}, "field 'answer': expected a text"),
        ({"prompt": "a", "answer": True}, "field 'answer': expected a text"),
        ({"problem": "a", "solution": "It is 3."}, "no answer can be extracted.*'It is 3.'"),
        ({"problem": "a", "solution": r"\boxed{3"}, "no answer can be extracted"),
        ({"question": "a", "answer": "It is 3.\n#### "}, "no answer can be extracted"),
        ({"question": "a", "answer": "It is 3.\nReally."}, "no answer can be extracted"),
        ({"question": "a", "answer": "x" * 201}, "no answer can be extracted"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = write(tmp_path / "bad.jsonl", PLAIN, "", line)
    with pytest.raises(ValueError, match=rf"bad\.jsonl, line 3: .*{message}"):
        problems_of.load_jsonl(path)


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="path: no such file"):
        problems_of.load_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="holds no problems"):
        problems_of.load_jsonl(write(tmp_path / "empty.jsonl", "", "  "))
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9", "answer": 1}\n')
    with pytest.raises(ValueError, match=r"latin\.jsonl, line 1: not valid JSON"):
        problems_of.load_jsonl(tmp_path / "latin.jsonl")
    with pytest.raises(ValueError, match="line 1: expected a field 'text'"):
        problems_of.load_jsonl(write(tmp_path / "p.jsonl", PLAIN), question="text")


def test_problems_are_a_sequence():
    some = Problems([Problem("a", "1"), Problem("b", "2", level=3)])
    assert len(some) == 2 and some[-1]["prompt"] == "b" and next(iter(some))["answer"] == "1"
    for index in (2, -3):
        with pytest.raises(IndexError, match="index"):
            some[index]
    with pytest.raises(ValueError, match="expected at least one problem"):
        Problems([])


# ------------------------------------------------------------------ prepared data sets


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    tfds = pytest.importorskip("tensorflow_datasets")

    class WordProbe(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            text = tfds.features.Text()
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict({"question": text, "answer": text}),
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(5):
                yield i, {"question": f"Ü{i}+1?", "answer": f"It is.\n#### {i + 1}"}

    directory = tmp_path_factory.mktemp("tfds")
    builder = tfds.builder("word_probe", data_dir=str(directory))
    builder.download_and_prepare(file_format="array_record")
    return directory


@pytest.mark.parametrize("code", [True, False])
def test_prepared_data_are_read_with_and_without_their_code(prepared, code, monkeypatch):
    from tensorflow_datasets.core import registered

    if not code:
        monkeypatch.delitem(registered._DATASET_REGISTRY, "word_probe")
    read = problems_of.load_tfds("word_probe", "train", prepared)
    assert {(p["prompt"], p["answer"]) for p in read} == {
        (f"Ü{i}+1?", str(i + 1)) for i in range(5)
    }
    assert len(problems_of.load_tfds("word_probe", "train[:2]", prepared)) == 2
    with pytest.raises(ValueError, match=r"split: expected one of \['train'\], got 'test'"):
        problems_of.load_tfds("word_probe", "test", prepared)
    with pytest.raises(ValueError, match="word_probe, train, record 0: expected a field 'prompt'"):
        problems_of.load_tfds("word_probe", "train", prepared, question="prompt")


def test_data_without_random_access(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "data")
    info = tmp_path / "data" / "word_probe" / "1.0.0" / "dataset_info.json"
    content = json.loads(info.read_text())
    info.write_text(json.dumps({**content, "fileFormat": "tfrecord"}))
    with pytest.raises(ValueError, match="stored in a format without random access.*prepare it"):
        problems_of.load_tfds("word_probe", "train", tmp_path / "data")


def test_data_that_are_not_prepared(prepared, tmp_path):
    for name in ("word_probe", "gsm8k", "no_such_data"):
        with pytest.raises(FileNotFoundError, match=f"{name}.*prepare it once.*array_record"):
            problems_of.load_tfds(name, "train", tmp_path)


# ------------------------------------------------------------------ splits and lengths


def test_splits_are_disjoint_complete_and_stable():
    whole = problems_of.synthetic(3000, 0)
    train, test = problems_of.split(whole, held_out=0.2)
    asked = [{p["prompt"] for p in part} for part in (train, test)]
    assert not asked[0] & asked[1]
    assert asked[0] | asked[1] == {p["prompt"] for p in whole}
    assert abs(len(test) / 3000 - 0.2) < 4 * (0.16 / 3000) ** 0.5
    shuffled = Problems(reversed(problems_of.synthetic(1000, 0).problems))
    again = problems_of.split(shuffled, held_out=0.2)[1]
    assert {p["prompt"] for p in again} <= asked[1]
    smaller = problems_of.split(whole, held_out=0.1)[1]
    assert {p["prompt"] for p in smaller} <= asked[1]
    other = problems_of.split(whole, held_out=0.2, salt="1")[1]
    assert {p["prompt"] for p in other} != asked[1]


def test_the_split_is_fixed_forever():
    questions = [f"question {i}" for i in range(20)]
    test = problems_of.split(Problems(Problem(q, "1") for q in questions), held_out=0.3)[1]
    assert [p["prompt"].split()[1] for p in test] == ["8", "14", "15", "19"]


def test_copies_of_a_question_stay_together():
    copies = [
        Problem(text, "1")
        for i in range(40)
        for text in (f"How many are {i}?", f"how  many\nare {i}? ", f"HOW MANY ARE {i}?")
    ]
    for part in problems_of.split(Problems(copies), held_out=0.4):
        assert len(part) % 3 == 0


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_bad_shares(share):
    with pytest.raises(ValueError, match="held_out: expected a number in"):
        problems_of.split(problems_of.synthetic(4, 0), held_out=share)


def test_a_side_without_problems():
    with pytest.raises(ValueError, match=r"held out: expected at least one problem"):
        problems_of.split(Problems([Problem("a", "1")]), held_out=1e-9)


def test_long_prompts(caplog):
    some = Problems([Problem("a" * n, "1") for n in (3, 9, 4, 8)], name="some")
    with caplog.at_level(logging.WARNING, logger="pgjax.tasks"):
        kept = problems_of.within_length(some, list, max_length=4, long="drop")
        assert [len(p["prompt"]) for p in kept] == [3, 4] and [p["id"] for p in kept] == [0, 1]
        assert "some: left out 2 of 4 problems" in caplog.text
        caplog.clear()
        assert len(problems_of.within_length(some, list, max_length=9)) == 4
        assert not caplog.records
    with pytest.raises(ValueError, match="max_length: the prompt of problem 1 of some takes 9"):
        problems_of.within_length(some, list, max_length=8)
    with pytest.raises(ValueError, match="max_length: no prompt of some has at most 2 tokens"):
        problems_of.within_length(some, list, max_length=2, long="drop")
    with pytest.raises(ValueError, match="long: expected one of 'error', 'drop'"):
        problems_of.within_length(some, list, max_length=9, long="cut")


# ------------------------------------------------------------------ loaders


def _codes(text):
    return [ord(c) for c in text]


def _loader(source, **changes):
    options = {"prompt_length": (16, 200, 400), "num_prompts": 4, "seed": 0, "encode": _codes}
    return tasks.prompts_loader(source, **{**options, **changes})


def test_text_answers_are_looked_up_by_id():
    source = problems_of.synthetic(30, 0)
    batch = next(_loader(source))
    assert "answers" not in batch
    assert batch["prompts"].shape == (4, 200) and batch["prompts"].dtype == np.int32
    for row, index in enumerate(batch["ids"]):
        item = source[index]
        assert item["level"] == batch["levels"][row]
        length = batch["prompt_lengths"][row]
        assert batch["prompts"][row, :length].tolist() == _codes(item["prompt"])
        assert not batch["prompts"][row, length:].any()


def test_the_smallest_bucket_that_holds_a_batch():
    source = Problems([Problem("a" * n, "1") for n in (3, 3, 3, 7, 12)])
    widths = set()
    loader = _loader(source, prompt_length=(12, 4, 8), num_prompts=1)
    for _ in range(10):
        batch = next(loader)
        widths.add((int(batch["prompt_lengths"][0]), batch["prompts"].shape[1]))
    assert widths == {(3, 4), (7, 8), (12, 12)}
    with pytest.raises(ValueError, match="length: the prompt 'aaaaaaaaaaaa' takes 12 tokens"):
        list(itertools.islice(_loader(source, prompt_length=(4, 8), num_prompts=5), 1))
    for bad in ((), (4, 0)):
        with pytest.raises(ValueError, match="prompt_length: expected"):
            _loader(source, prompt_length=bad)
    rows = tasks.prompt_arrays(source, prompt_length=(4, 16), encode=_codes)
    assert rows["prompts"].shape == (5, 16) and "answers" not in rows


def test_a_restored_loader_continues_exactly():
    source = problems_of.synthetic(24, 0)
    loader = _loader(source)
    for _ in range(9):
        next(loader)
    state = json.loads(json.dumps(loader.get_state()))
    wanted = [next(loader) for _ in range(6)]
    fresh = _loader(source)
    fresh.set_state(state)
    for batch in wanted:
        got = next(fresh)
        for name in batch:
            np.testing.assert_array_equal(got[name], batch[name])


def test_demonstrations_of_any_shape():
    source = problems_of.synthetic(12, 0)

    def encode(item):
        tokens = np.array(_codes(item["prompt"] + item["solution"]), np.int32)
        return tokens, np.arange(len(tokens)) >= len(item["prompt"])

    options = {"encode": encode, "batch_size": 3, "seed": 0, "pad": -1}
    loader = tasks.loaders.examples_loader(source, length=(100, 500), **options)
    seen = []
    for _ in range(4):
        batch = next(loader)
        assert batch["tokens"].shape[1] in (100, 500)
        for tokens, mask, index in zip(*batch.values(), strict=True):
            item = source[index]
            text = "".join(map(chr, tokens[tokens >= 0]))
            assert text == item["prompt"] + item["solution"]
            assert "".join(map(chr, tokens[mask])) == item["solution"]
        seen += batch["ids"].tolist()
    assert sorted(seen) == list(range(12))
    with pytest.raises(ValueError, match="length: an example takes"):
        next(tasks.loaders.examples_loader(source, length=50, **options))


# ------------------------------------------------------------------ the generator

_OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


@given(st.integers(0, 10**6))
@settings(max_examples=10, deadline=None)
def test_worked_solutions_are_right(seed):
    for problem in problems_of.synthetic(12, seed):
        lines = problem["solution"].split("\n")
        assert lines[-1] == f"#### {problem['answer']}"
        assert problem["level"] == len(lines) - 1
        for line in lines[:-1]:
            left, right = re.search(r"(\d+ [-+*/] \d+) = (\d+)", line).groups()
            node = ast.parse(left, mode="eval").body
            value = _OPERATIONS[type(node.op)](node.left.value, node.right.value)
            assert value == int(right)
            for number in (node.left.value, node.right.value):  # nothing comes from nowhere
                known = problem["prompt"] + problem["solution"].split(line)[0]
                assert re.search(rf"(?<!\d){number}(?!\d)", known)
        assert right == problem["answer"] and int(right) >= 0
        assert math_answers.grade(problem["solution"], problem["answer"]) == 1.0


def test_generated_problems_are_distinct_reproducible_and_of_all_kinds():
    some = problems_of.synthetic(600, 3)
    assert len({p["prompt"] for p in some}) == 600
    assert problems_of.synthetic(600, 3).problems == some.problems
    assert problems_of.synthetic(100, 3).problems == some.problems[:100]
    assert problems_of.synthetic(100, 4).problems != some.problems[:100]
    kinds, counts = np.unique([p["kind"] for p in some], return_counts=True)
    assert len(kinds) == 6 and (counts == 100).all()
    assert set(some.levels.tolist()) == {1, 2, 3, 4}
    for bad in (0, -1):
        with pytest.raises(ValueError, match="count"):
            problems_of.synthetic(bad, 0)
