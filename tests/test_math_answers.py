r"""Answers: a table of right and wrong ones, honest and not, and workers that cannot hang a run."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgjax import rewards
from pgjax.rewards import math_answers
from pgjax.rewards.math_answers import comparison, pool, rationals

needs_math_verify = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed"
)

# ------------------------------------------------------------------ finding the answer


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1}, no, \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\text{a {nested} one}}", r"\text{a {nested} one}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\{1, 2)}", r"\{1, 2)"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\fbox{9}", "9"),
        (r"$\boxed 5$", "5"),
        (r"\boxed{3} and cut off \boxed{4", "3"),
        (r"\boxed{42} (written as \boxed{})", "42"),
        (r"\boxedx{42}", None),
        (r"\boxed{}", None),
        ("She has 5.\n#### 1,234\n", "1,234"),
        ("#### 3\n#### 4", "4"),
        (r"#### 3, that is \boxed{5}", "5"),
        ("The answer is 42.", "42"),
        ("The answer is 3.5. Done.", "3.5"),
        ("The final answer is: $\\frac{1}{2}$.", r"\frac{1}{2}"),
        (r"the answer is \(x^2\)", "x^2"),
        ("**Answer:** 42", "42"),
        ("Answer:\n\n3.5 dollars", "3.5 dollars"),
        ("The answer to this question is 7, because 3+4=7", "7"),
        ("The answer is 1. Wait. The answer is 2!", "2"),
        ("The answer is $40 and $5 more", "$40 and $5 more"),
        ("The answer is not 42", "not 42"),
        ("The correct answer is (B).", "(B)"),
        ("The answer is x = 3, y = 4.", "x = 3, y = 4"),
        ("I think 7 and 8", None),
        ("", None),
        ("#### ", None),
    ],
)
def test_final_answers(text, wanted):
    assert math_answers.extract_final(text) == wanted


def test_the_last_number_only_on_request():
    for text, wanted in (
        ("I think 7 and 8.", "8"),
        ("It costs $1,234.50!", "1,234.50"),
        ("from 3 to -4", "-4"),
        ("half is 1/2", "1/2"),
        ("so .5", ".5"),
        ("about 50%", "50%"),
        ("in room A7", None),
        ("nothing", None),
    ):
        assert math_answers.extract_final(text) is None
        assert math_answers.extract_final(text, last_number=True) == wanted
    both = r"\boxed{1} of 2"
    assert math_answers.extract_final(both, last_number=True) == "1"


@given(st.text(alphabet=r"\{}boxed 12$", max_size=60))
@settings(max_examples=300, deadline=None)
def test_boxes_are_balanced_and_in_the_text(text):
    for inside in math_answers.boxed(text):
        assert inside in text
        bare = re.sub(r"\\.", "", inside)
        depth = 0
        for c in bare:
            depth += (c == "{") - (c == "}")
            assert depth >= 0
        assert depth == 0


LONG = {
    "boxes": r"\boxed{" * 20_000,
    "closed boxes": r"\boxed{" * 14_000 + "}" * 14_000,
    "braces": "{" * 100_000,
    "digits": "1" * 100_000,
    "answers": "answer is " * 10_000,
    "hashes": "#" * 100_000,
    "backslashes": "\\" * 100_001,
    "line breaks": "answer:" + "\n" * 100_000,
    "commas": "1," * 50_000,
    "minus": "-" * 100_000,
    "dots": "answer is " + "1." * 50_000,
    "fractions": r"\boxed{" + r"\frac" * 20_000 + "}",
    "parentheses": r"\boxed{" + "(" * 100_000 + "}",
    "texts": r"\boxed{" + r"\text{" * 15_000 + "}" * 15_001,
}


@pytest.mark.parametrize("name", LONG)
def test_long_completions_are_decided_without_a_process(name, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", _no_process)
    with math_answers.MathVerifier(last_number=True) as verifier:
        assert verifier(LONG[name], "42") == 0.0
        assert not verifier.pids
    assert comparison.decide(LONG[name], LONG[name][:1000] + "x")[0] is not True


def _no_process(*args, **kwargs):
    raise AssertionError("a process was started")


# ------------------------------------------------------------------ exact numbers


@given(
    st.fractions(max_denominator=10**6),
    st.sampled_from(["{n}/{d}", r"\frac{{{n}}}{{{d}}}", r"\dfrac{{{n}}}{{{d}}}", "{n} / {d}"]),
    st.integers(1, 50),
)
@settings(max_examples=150, deadline=None)
def test_fractions_are_compared_exactly(value, form, factor):
    n, d = value.numerator * factor, value.denominator * factor
    text = form.format(n=n, d=d)
    assert comparison.decide(text, f"{value.numerator}/{value.denominator}")[0] is True
    assert comparison.decide(text, str(value))[0] is True
    other = value + Fraction(1, 10**7)
    assert comparison.decide(text, f"{other.numerator}/{other.denominator}")[0] is False


@given(st.decimals(-(10**8), 10**8, places=3), st.integers(0, 4))
@settings(max_examples=150, deadline=None)
def test_decimals_thousands_and_zeros(value, zeros):
    right = str(Fraction(value))
    plain = f"{value:f}" + "0" * zeros
    for text in (plain, f"{value:,f}", f"${plain}$", f"{plain} dollars", plain.replace("-", "−")):
        assert comparison.decide(text, right)[0] is True
    assert comparison.decide(f"{value + 1:f}", right)[0] is False


@pytest.mark.parametrize(
    "text",
    [
        *("", "1/0", r"\frac{1}{0}", "5^2", "5x", "5m", "1.2.3", "1,23", "--5", "-$-5", "5!", "5/"),
        *("42 or 43", "42 is wrong", "5 squared", "5 pi", "2 x 3", "5 to 6", "5e9999", "1" * 401),
    ],
)
def test_what_is_no_number(text):
    assert rationals.parse_number(text) is None


# ------------------------------------------------------------------ the table

# Decided by text and exact numbers.
EXACT = [
    ("42", "42", 1),
    ("42.0", "42", 1),
    ("042", "42", 1),
    ("1,234", "1234", 1),
    ("1{,}234", "1234", 1),
    (r"12\,345", "12345", 1),
    (r"1,\!000", "1000", 1),
    ("+7", "7", 1),
    (r"\$42", "42", 1),
    ("$42$", "42", 1),
    ("42.", "42", 1),
    (r"\text{42}", "42", 1),
    ("{42}", "42", 1),
    ("**42**", "42", 1),
    ("42 dollars", "42", 1),
    ("42 apples", "42", 1),
    (r"42\text{ apples left}", "42", 1),
    ("42 hours of work", "42", 1),
    ("1/2", "0.5", 1),
    ("0.5", r"\frac12", 1),
    (r"\frac12", "1/2", 1),
    (r"\dfrac{2}{4}", r"\tfrac{1}{2}", 1),
    (r"-\frac{1}{2}", r"\frac{-1}{2}", 1),
    ("½", "0.5", 1),
    (r"1\frac12", "3/2", 1),
    ("1 1/2", "1.5", 1),
    ("0.333333", r"\frac13", 1),
    ("0.666667", "2/3", 1),
    ("0.666666", "2/3", 1),
    ("0.33", r"\frac13", 0),
    ("0.333334", r"\frac13", 1),
    ("0.333339", r"\frac13", 0),
    ("0.500001", "1/2", 0),
    ("0.000000", "1/30000000", 0),
    ("−3", "-3", 1),
    ("3", "-3", 0),
    (r"50\%", "0.5", 1),
    ("50%", "50", 1),
    ("50", r"50\%", 1),
    ("50 percent", "50%", 1),
    ("0.5", r"50\%", 1),
    (r"5\%", "0.5", 0),
    (r"5\%", r"50\%", 0),
    (r"1.5\times10^3", "1500", 1),
    (r"1.5 \cdot 10^{-3}", "0.0015", 1),
    ("1.5 × 10³", "1500", 1),
    ("1.5e3", "1500", 1),
    ("42 million", "42000000", 1),
    ("42 million", "42", 0),
    ("2 dozen", "24", 1),
    ("$3 million", "3000000", 1),
    # units
    ("5 cm", "5 m", 0),
    ("5 centimeters", r"5\text{ cm}", 1),
    (r"5\text{ cm}^2", "5", 1),
    ("5 square meters", r"5\text{ m}^2", 1),
    (r"5\text{ m}^2", r"5\text{ m}^3", 0),
    ("12 square units", r"12\text{ cm}^2", 1),
    (r"90^\circ", "90", 1),
    ("90°", r"90^{\circ}", 1),
    ("90 degrees", r"90^\circ", 1),
    ("42 cents", "42 dollars", 0),
    ("$42", "42 cents", 0),
    ("60 miles per hour", "60 miles", 0),
    ("60 mph", "60 miles per hour", 1),
    ("42 apples", "42 oranges", 0),
    # names and equations
    ("x=5", "5", 1),
    ("5", "x = 5", 1),
    ("f(3) = 5", "5", 1),
    ("x=6/2=3", "3", 1),
    ("6*7=42", "42", 1),
    ("x^2=5", "5", 0),
    ("41=42", "42", 0),
    ("x=41=42", "42", 0),
    ("x=", "5", 0),
    (r"4210_{7}", "4210_5", 0),
    (r"4210_{5}", "4210_5", 1),
    ("4210", "4210_{5}", 1),
    ("4211", "4210_{5}", 0),
    (r"x=2\text{ or }x=3", "2,3", 1),
    ("1,2", "x=1 or x=2", 1),
    (r"0.\overline{3}", "1/3", 1),
    (r"0.1\overline{36}", r"\frac{3}{22}", 1),
    (r"0.\overline{3}", "0.3", 0),
    # words and choices
    (r"\text{even}", "even", 1),
    ("Even.", r"\text{even}", 1),
    ("odd", r"\text{even}", 0),
    ("dod", r"\text{odd}", 0),
    ("the Monday", r"\text{Monday}", 1),
    ("(A)", "A", 1),
    ("A.", r"\text{(A)}", 1),
    (r"\textbf{(B)}", "A", 0),
    ("forty-two", "42", 0),
    ("all of them", "42", 0),
    # the same text needs no algebra
    (r"x^2 + 1", "x^2+1", 1),
    (r"\left[ 1, 2 \right)", "[1,2)", 1),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", 1),
    # brackets say what a list is
    ("(1,2)", "[1,2]", 0),
    ("(1,2)", "(1,2]", 0),
    (r"\{1,2\}", "[1,2]", 0),
    # hedging, and the question put as a formula
    ("41 or 42", "42", 0),
    ("not 42", "42", 0),
    ("42 or something else", "42", 0),
    (r"6\times 7", "42", 0),
    ("6*7", "42", 0),
    ("40 + 2", "42", 0),
    (r"\sum_{i=1}^{2} i", "3", 0),
    (r"\binom{4}{2}", "6", 0),
    (r"\pm 42", "42", 0),
    ("x", "42", 0),
    ("", "42", 0),
    (" ", "42", 0),
    (".", "42", 0),
    ("1" * 5000, "42", 0),
    ("[1,2)", "[1, 2]", 0),
    ("maybe 42", "42", 0),
    (r"\text{the number } 42", "42", 0),
]
# Left to math-verify.
SYMBOLIC = [
    (r"\frac{0}{0}", "0", 0),
    ("42?? 43", "42", 0),
    ("e^{0}", "1", 1),
    ("41, 42, 43", "42", 0),
    ("1/0", "0", 0),
    ("5^2", "5", 0),
    ("5x", "5", 0),
    ("2^{10}", "1024", 1),
    ("1024", "2^{10}", 1),
    (r"\sqrt{16}", "4", 1),
    (r"\sqrt{8}", r"2\sqrt{2}", 1),
    (r"\sqrt8", r"2\sqrt2", 1),
    ("2√2", r"\sqrt{8}", 1),
    ("2*sqrt(3)", r"2\sqrt{3}", 1),
    (r"\frac{1}{\sqrt2}", r"\frac{\sqrt{2}}{2}", 1),
    ("1.41421356", r"\sqrt{2}", 1),
    ("1.41", r"\sqrt2", 0),
    ("3.14", r"\pi", 0),
    (r"\frac{\pi}{2}", r"\pi/2", 1),
    (r"[\frac{2}{2},2)", "[1,2)", 1),
    (r"(-\infty,2)\cup(3,\infty)", r"(3,\infty)\cup(-\infty,2)", 1),
    (r"(-\infty,2)\cup(3,\infty)", r"(-\infty,\infty)", 0),
    (r"\{1,2,3\}", r"\{3,2,1\}", 1),
    ("1,2,3", "3, 2, 1", 1),
    ("1,2,3,4", "3,2,1", 0),
    ("(1,2,3)", "(3,2,1)", 0),
    ("(2,1)", "(1,2)", 0),
    (r"\pm 2", "2,-2", 1),
    ("2", r"\pm 2", 0),
    ("x=5", "y=5", 0),
    (r"x=3, x=2", "2,3", 1),
    (r"x=2, y=3", "3,2", 0),
    (r"\frac{3}{4}\pi", r"\frac{3\pi}{4}", 1),
    (r"y = 2x+3", "3+2x", 1),
    ("x^2+2x+1", "(x+1)^2", 1),
    ("(x+1)(x-1)", "x^2-1", 1),
    ("x+1", "x-1", 0),
    ("3+4i", "4i+3", 1),
    (r"3 \le x", r"x\geq 3", 1),
    ("x>3", r"x\ge3", 0),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}", 0),
    (r"\log_2 8", "3", 1),
    (r"\frac{\frac{\frac{1}{2}}{3}}{4}", r"\frac{1}{24}", 1),
    ("((((((1/2))))))", "x", 0),
    (r"\text{nan}", "x+1", 0),
    ("__import__('os').system('true')", "x+1", 0),
    ("exec(1)", "x+1", 0),
    (r"\unknown{5}", "x+1", 0),
]


@pytest.mark.parametrize(("answer", "reference", "wanted"), EXACT)
def test_exact_decisions_start_no_process(answer, reference, wanted, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", _no_process)
    completion = rf"Therefore \boxed{{{answer}}}."
    assert math_answers.grade(completion, reference) == wanted


@pytest.fixture(scope="module")
def verifier():
    with math_answers.MathVerifier(workers=1, timeout=20) as made:
        yield made


@needs_math_verify
@pytest.mark.parametrize(("answer", "reference", "wanted"), SYMBOLIC)
def test_symbolic_decisions(answer, reference, wanted, verifier):
    asked = verifier.counts["symbolic"]
    graded, failures = verifier.grade_batch([rf"So \boxed{{{answer}}}."], [reference])
    assert graded.tolist() == [wanted] and not failures
    assert verifier.counts["symbolic"] == asked + 1


def test_the_table_is_large():
    assert len(EXACT) + len(SYMBOLIC) >= 130


COMPLETIONS = [
    (r"First \boxed{41}. No, \boxed{42}.", "42", 1),
    (r"First \boxed{42}. No, \boxed{41}.", "42", 0),
    (r"\boxed{40}\boxed{41}\boxed{42}\boxed{43}", "42", 0),
    ("The question is: what is 6 times 7, and is it 42?", "42", 0),
    (r"Put the answer in \boxed{}. It is 42.", "42", 0),
    ("<think>it is 42</think>", "42", 0),
    (r"<think>\boxed{42}</think> \boxed{43}", "42", 0),
    ("6 * 7 = 42\n#### 42", "42", 1),
    ("The answer is 42", "#### 42", 1),
    ("The answer is $42 in total.", "42", 1),
    ("The answer is $42 or $43.", "42", 0),
    (r"\boxed{\frac{}", "0", 0),
    (r"\boxed{72}", "48/2 = 24\n48+24 = 72\n#### 72", 1),
    (r"\boxed{1/2}", r"We find $\boxed{\frac{1}{2}}$.", 1),
    (r"\boxed{42", "42", 0),
    ("", "42", 0),
    (r"\boxed{18}", 18, 1),
    (r"\boxed{18}", 18.0, 1),
    (r"\boxed{0.5}", Fraction(1, 2), 1),
    (r"\boxed{-2.5}", np.float32(-2.5), 1),
]


@pytest.mark.parametrize(("completion", "reference", "wanted"), COMPLETIONS)
def test_whole_completions(completion, reference, wanted):
    assert math_answers.grade(completion, reference) == wanted


def test_last_number_is_an_option():
    assert math_answers.grade("it is 42", "42") == 0.0
    assert math_answers.grade("it is 42", "42", last_number=True) == 1.0
    with math_answers.MathVerifier(last_number=True) as verifier:
        assert verifier("it is 42", {"answer": "42"}) == 1.0


# ------------------------------------------------------------------ limits

FACTORIAL = r"\boxed{(30000000!)!}"
TOWERS = [
    r"\boxed{10^{10^{10}}}",
    r"\boxed{9^{9^{9^{9^{9}}}}}",
    r"\boxed{2^{99999999999}}",
    FACTORIAL,
]


@needs_math_verify
def test_endless_computations_are_given_up_in_time():
    with math_answers.MathVerifier(workers=2, timeout=1.0) as verifier:
        verifier.grade_batch([r"\boxed{\sqrt{4}}", r"\boxed{\sqrt{9}}"], ["2", "3"])  # starts
        started = time.monotonic()
        honest = r"\boxed{\sqrt{25}}"
        graded, failures = verifier.grade_batch([*TOWERS, honest], ["42"] * len(TOWERS) + ["5"])
        took = time.monotonic() - started
        assert graded.tolist() == [0.0] * len(TOWERS) + [1.0]
        assert len(failures) + verifier.counts["symbolic"] == len(TOWERS) + 3
        assert len(failures) >= 2 and verifier.counts["timeout"] >= 1
        assert all(isinstance(f.error, TimeoutError | MemoryError) for f in failures)
        assert [f.index for f in failures] == sorted(f.index for f in failures)
        # Each is over after 1 s on two workers; the rest is for starting replacements.
        assert took < 60


@needs_math_verify
@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="processes cannot be stopped here")
def test_a_worker_that_does_not_answer_is_killed_and_replaced():
    with math_answers.MathVerifier(workers=1, timeout=1.0) as verifier:
        assert verifier(r"\boxed{\sqrt{4}}", "2") == 1.0
        (stuck,) = verifier.pids
        os.kill(stuck, signal.SIGSTOP)  # it cannot even interrupt itself
        started = time.monotonic()
        graded, failures = verifier.grade_batch([r"\boxed{\sqrt{9}}"], ["3"])
        assert time.monotonic() - started < 10
        assert graded.tolist() == [0.0]
        (failure,) = failures
        assert failure.index == 0 and isinstance(failure.error, TimeoutError)
        assert "more than 1.0 s" in str(failure.error)
        assert verifier.counts["timeout"] == 1
        assert not verifier.pids and not _alive(stuck)
        # Nothing is remembered of it, and a new worker does the same work.
        assert verifier(r"\boxed{\sqrt{9}}", "3") == 1.0
        (fresh,) = verifier.pids
        assert fresh != stuck


@needs_math_verify
def test_a_worker_that_dies_is_replaced():
    with math_answers.MathVerifier(workers=1, timeout=20) as verifier:
        assert verifier(r"\boxed{\sqrt{4}}", "2") == 1.0
        (first,) = verifier.pids
        os.kill(first, signal.SIGKILL)
        while verifier._pool._workers[0].process.poll() is None:
            time.sleep(0.01)
        assert verifier(r"\boxed{\sqrt{9}}", "3") == 1.0  # found dead before it was asked
        (second,) = verifier.pids
        assert second != first and not verifier.counts["crash"]
        os.kill(second, signal.SIGSTOP)

        def kill():
            time.sleep(0.5)
            os.kill(second, signal.SIGKILL)

        threading.Thread(target=kill).start()
        graded, failures = verifier.grade_batch([r"\boxed{\sqrt{16}}"], ["4"])
        assert graded.tolist() == [0.0] and verifier.counts["crash"] == 1
        assert "failed: crash" in str(failures[0].error)
        assert verifier(r"\boxed{\sqrt{16}}", "4") == 1.0


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@needs_math_verify
@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not show a process's limits")
def test_memory_is_limited():
    import resource

    with math_answers.MathVerifier(workers=1, timeout=20, memory_limit=1 << 29) as verifier:
        assert verifier(r"\boxed{\sqrt{4}}", "2") == 1.0
        (pid,) = verifier.pids
        assert resource.prlimit(pid, resource.RLIMIT_AS)[0] == 1 << 29


FAKE = """
import json, sys
print(json.dumps({"ready": 1}), flush=True)
for line in sys.stdin:
    print("{answer}", flush=True)
"""


@pytest.mark.parametrize(
    ("error", "kind", "type_"),
    [
        ("memory", "memory", MemoryError),
        ("timeout", "timeout", TimeoutError),
        ("recursion", "recursion", RuntimeError),
        ("KeyError: 3", "error", RuntimeError),
    ],
)
def test_what_workers_report(error, kind, type_, monkeypatch, tmp_path):
    monkeypatch.setattr(pool.importlib.util, "find_spec", lambda name: object())
    program = tmp_path / "worker.py"
    program.write_text(FAKE.replace("{answer}", f'{{\\"error\\": \\"{error}\\"}}'))
    monkeypatch.setattr(pool, "_PROGRAM", program)
    with math_answers.MathVerifier(workers=1) as verifier:
        completions = [r"\boxed{\sqrt{4}}", r"\boxed{2}", r"\boxed{\sqrt{4}}"]
        graded, failures = verifier.grade_batch(completions, ["2"] * 3)
        assert graded.tolist() == [0, 1, 0]
        assert [f.index for f in failures] == [0, 2]
        assert all(type(f.error) is type_ for f in failures)
        assert verifier.counts == {kind: 2, "exact": 1}
        # After running out of memory a process is not used again.
        assert len(verifier.pids) == (0 if error == "memory" else 1)


@needs_math_verify
def test_it_works_in_any_thread_and_many_at_once():
    found = {}
    with math_answers.MathVerifier(workers=2, timeout=20) as verifier:

        def work(n):
            found[n] = verifier(rf"\boxed{{\sqrt{{{n * n}}}}}", f"{n}.")

        threads = [threading.Thread(target=work, args=(n,)) for n in range(3, 9)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == dict.fromkeys(range(3, 9), 1.0)
        assert len(verifier.pids) <= 2
        pids = verifier.pids
    assert not any(map(_alive, pids))


@needs_math_verify
def test_equal_pairs_are_compared_once():
    with math_answers.MathVerifier(workers=1, timeout=20) as verifier:
        asked = []
        run = verifier._pool.run

        def counted(pairs, **options):
            asked.extend(pairs)
            return run(pairs, **options)

        verifier._pool.run = counted
        answers = [r"\boxed{\sqrt{4}}", r"\boxed{2}", r"\boxed{\sqrt{4}}", r"\boxed{\sqrt{5}}"]
        for _ in range(2):
            graded, _ = verifier.grade_batch(answers, ["2"] * 4)
            assert graded.tolist() == [1, 1, 1, 0]
        assert len(asked) == 2
        # What is remembered counts as decided without a process.
        assert verifier.counts == {"exact": 2 + 3, "symbolic": 3}


@needs_math_verify
def test_workers_end_with_their_parent_and_are_not_shared_by_forks():
    program = (
        "import os, signal\n"
        "from pgjax.rewards import math_answers\n"
        "verifier = math_answers.MathVerifier(workers=1)\n"
        "verifier(r'\\boxed{\\sqrt{4}}', '2')\n"
        "before = verifier.pids\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    right = verifier(r'\\boxed{\\sqrt{9}}', '3') == 1 and verifier.pids != before\n"
        "    verifier.close()\n"
        "    os._exit(0 if right else 1)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "assert verifier(r'\\boxed{\\sqrt{16}}', '4') == 1 and verifier.pids == before\n"
        "print(verifier.pids[0], flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = pathlib.Path(rewards.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=root, timeout=120
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    pid = int(done.stdout)
    deadline = time.monotonic() + 20
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(pid)


def test_a_worker_that_cannot_start_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(pool.importlib.util, "find_spec", lambda name: object())
    program = tmp_path / "worker.py"
    program.write_text("raise SystemExit(3)")
    monkeypatch.setattr(pool, "_PROGRAM", program)
    verifier = math_answers.MathVerifier(workers=1)
    with pytest.raises(RuntimeError, match="worker does not start: crash, exit code 3"):
        verifier(r"\boxed{\sqrt{4}}", "2")
    assert not verifier.pids
    program.write_text('print(\'{"failed": "ImportError: no antlr"}\')')
    with pytest.raises(RuntimeError, match="worker does not start: ImportError: no antlr"):
        verifier(r"\boxed{\sqrt{4}}", "2")


def test_math_verify_missing(monkeypatch):
    monkeypatch.setattr(pool.importlib.util, "find_spec", lambda name: None)
    with math_answers.MathVerifier() as verifier:
        assert verifier(r"\boxed{1/2}", "0.5") == 1.0
        with pytest.raises(ImportError, match=r"pip install 'pgjax\[hf\]'"):
            verifier(r"\boxed{\sqrt{4}}", "2")


# ------------------------------------------------------------------ the rest of the interface


def test_batches():
    with math_answers.MathVerifier() as verifier:
        graded, failures = verifier.grade_batch([r"\boxed{1}", "2", "#### 3"], ["1", "2", "4"])
        assert graded.dtype == np.float32 and graded.tolist() == [1, 0, 0] and failures == []
        assert verifier.counts == {"exact": 2, "none": 1}
        empty, none = verifier.grade_batch([], [])
        assert empty.shape == (0,) and none == []
        with pytest.raises(ValueError, match="references: expected one for each of 2 completions"):
            verifier.grade_batch(["a", "b"], ["1"])
        with pytest.raises(TypeError, match="completions: expected a str at 1"):
            verifier.grade_batch(["a", [1]], ["1", "1"])
        for bad in ("", "  ", None, True, [1], "#### "):
            with pytest.raises(ValueError, match=r"references: expected .* for completion 1"):
                verifier.grade_batch(["a", "b"], ["1", bad])


@pytest.mark.parametrize(
    "options", [{"workers": 0}, {"timeout": 0}, {"timeout": float("nan")}, {"memory_limit": 1}]
)
def test_bad_options(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}: expected"):
        math_answers.MathVerifier(**options)


def test_bad_timeout_of_grade():
    with pytest.raises(ValueError, match="timeout: expected"):
        math_answers.grade("1", "1", timeout=-1)


def test_as_a_verifier_of_the_library():
    with math_answers.MathVerifier() as verifier:
        graded, failures = rewards.call_verifier(
            verifier, [r"\boxed{3}", "no"], [{"answer": "3"}, {"answer": 3}]
        )
    np.testing.assert_array_equal(graded, [1, 0])
    assert failures == []


def test_as_a_reward_of_sampled_tokens(caplog):
    from pgjax import sampling
    from pgjax.train import text

    said = ["#### 5", "#### 6", "#### 7", "#### 6"]
    width = 8
    tokens = np.zeros((4, width), np.int32)
    for row, completion in enumerate(said):
        tokens[row, 2:] = [ord(c) for c in completion]
    zeros = jnp.zeros((4, width), jnp.float32)
    samples = sampling.Samples(
        tokens=jnp.asarray(tokens),
        mask=jnp.broadcast_to(jnp.arange(width) >= 2, (4, width)),
        behavior_logprobs=zeros,
        logprobs=zeros,
        lengths=jnp.full(4, width),
        truncated=jnp.zeros(4, bool),
        prompt_ids=jnp.array([0, 0, 1, 1]),
        steps=jnp.array(6),
    )
    source, batch, key = [{"answer": "5"}, {"answer": "6"}], {"ids": [0, 1]}, jax.random.key(0)

    def decode(ids):
        return "".join(map(chr, ids))

    def examples(batch):
        return [source[i] for i in batch["ids"]]

    with math_answers.MathVerifier() as verifier:
        one_by_one = text.host_reward(verifier, decode, examples)
        np.testing.assert_array_equal(one_by_one(samples, batch, key), [1, 0, 0, 1])
        at_once = math_answers.batch_reward(
            verifier, decode, lambda batch: [e["answer"] for e in examples(batch)]
        )
        scores = at_once(samples, batch, key)
        np.testing.assert_array_equal(scores, [1, 0, 0, 1])
        assert scores.dtype == jnp.float32
        assert not [r for r in caplog.records if r.name.startswith("pgjax")]
        verifier._pool.run = lambda pairs, timeout: [pool.Outcome(False, "timeout")] * len(pairs)
        source[1]["answer"] = "2^x"
        np.testing.assert_array_equal(at_once(samples, batch, key), [1, 0, 0, 0])
        assert "answer not compared" in caplog.text and "TimeoutError" in caplog.text


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("<think>a\nb</think> 42", 1),
        (" <think></think>\n\n4\n2\n", 1),
        ("<think>a</think>", 0),
        ("<think>a</think>  \n", 0),
        ("<think>a 42", 0),
        ("a <think>b</think> 42", 0),
        ("<think><think>a</think> 42", 0),
        ("<think>a</think> 42 </think>", 0),
        ("", 0),
    ],
)
def test_format(text, wanted):
    assert math_answers.format_reward(text, pattern=math_answers.THINK_THEN_ANSWER) == wanted


def test_format_takes_patterns():
    assert math_answers.format_reward("a\nb", pattern="a.b") == 1.0
    assert math_answers.format_reward("a\nb", pattern=re.compile("a.b")) == 0.0
    assert math_answers.format_reward("xa\nb", pattern="a.b") == 0.0
    started = time.monotonic()
    long = "<think>" + "a" * 100_000
    assert math_answers.format_reward(long, pattern=math_answers.THINK_THEN_ANSWER) == 0.0
    assert time.monotonic() - started < 10


def test_model_output_is_never_evaluated():
    folder = pathlib.Path(math_answers.__file__).parent
    for path in folder.glob("*.py"):
        for line in path.read_text().splitlines():
            code = line.split("#")[0]
            assert not re.search(r"\b(eval|exec|sympify|parse_expr)\s*\(", code), (path, line)


def test_answers_written_alike_share_an_id():
    texts = [r"so \boxed{12}", "#### 12", "the answer is 13", "no idea", r"\boxed{ 12. }", "none"]
    ids = math_answers.answer_ids(texts)
    assert ids[0] == ids[1] == ids[4] != ids[2]
    assert len({ids[0], ids[2], ids[3], ids[5]}) == 4
    assert math_answers.answer_ids(["6 and 7", "7"], last_number=True).tolist() == [0, 0]
    assert math_answers.answer_ids([]).shape == (0,)
