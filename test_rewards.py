"""
The rewards and the tasks' data: answers as models write them, hostile programs, references. No network.
"""
import os, shutil, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import rewards
import train_expert
import transformer2 as t2

pytestmark = pytest.mark.filterwarnings("ignore:invalid escape")  # in programs that are tried

@pytest.mark.parametrize("text, number", [
    ("so 3 + 4 = 7. The answer is 1,234.", 1234), ("#### -5", -5), (r"\boxed{18.00}", 18), ("it costs $7", 7),
    ("The answer is 5 + 3 = 8 eggs.", 8), ("Answer: 2.5 kg\nChecked 3 times.", 2.5), ("16-3", 3), ("2 or 3", 3),
    ("it is −4", -4), (r"\boxed{1{,}200}", 1200), ("The answer is: .5", 0.5), ("The answer is 3 of the 10", 3)])
def test_numeric_answers(text, number):
    assert rewards.numeric_answer(text) == number != rewards.numeric_answer("none")

@pytest.mark.parametrize("text, letter", [
    ("B", "B"), ("(B)", "B"), ("I think.\nThe answer is (B).", "B"), ("the answer is B because A is not", "B"),
    ("Answer: **B**", "B"), (r"\boxed{B}", "B"), ("(A) rusts, so the answer is (C)", "C"), ("The answer is iron ore.", "B"),
    ("The correct option is D.", "D"), ("The answer is iron.", "A"), ("Iron ore", "B"), ("(A) iron or (B)", ""),
    ("The answer is A heavy one", ""), ("Iron or tin?", ""), ("Iron or tin?\nA", "A"), ("the answer is the tin", "C")])
def test_letter_answers(text, letter):
    choices = {"text": ["iron", "iron ore", "tin", "None of these."], "label": list("ABCD")}
    assert rewards.letter_answer(text, {"question": "Iron or tin?", "choices": choices}) == letter

@pytest.mark.parametrize("right, said, same", [
    (r"\frac{1}{2}", r"so \boxed{\dfrac12}", True), ("0.5", r"\boxed{\frac{2}{4}}", True), ("5", "It is 5", False),
    (r"90^\circ", r"\boxed{90}", True), ("5", r"\boxed{5\text{ cm}^2}", True), ("5", "The answer is 5 cm.", True),
    ("1000", r"\boxed{\$1,\!000}", True), ("[0,1)", r"\boxed{\left[0, 1\right)}", True), ("x=4", r"\boxed{4}", True),
    ("[0,1)", r"\boxed{[0,1]}", False), (r"\frac{\sqrt{3}}{2}", r"\boxed{\frac{\sqrt3}2}", True), ("5", r"\boxed{5", True),
    (r"\text{east}", r"\boxed{east}", True), ("x+1", r"\boxed{1+x}", False), ("1", r"\boxed{1/0}", False)])
def test_math_answers(right, said, same):
    assert (rewards.math_answer(said) == rewards.math_form(right)) == same

linux = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox for code runs on Linux")
SQ = "def f(x):\n    return x * x\n"
HEADER = {"prompt": 'import math\n\ndef f(x):\n    """Squares."""\n', "entry_point": "f"}
BODY = "    y = math.fabs(x)\n    return y * y\n"

def score(completion, problem={}, timeout=10):
    code = rewards.extract_code(completion, problem)
    return rewards.run_tests(code, "assert remote('f')(-2) == 4", timeout)

@linux
def test_programs_are_found_as_models_write_them(monkeypatch):
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    for text in (SQ, f"Sure:\n```python\n{SQ}```\nDone, for all x.", f"\n{SQ}```\nExplanation.", f"Here:\n{SQ}\nIt is easy.",
                 f"```\ndef f(x):\n    return 0\n```\nBetter:\n```py\n{SQ}", f"TWO = 2\n{SQ}\ndef g(x:",
                 f"from collections import Counter\nCounter('aab').most_common(1)\n{SQ}"):
        assert score(text), text
    for text in (BODY, BODY.lstrip(), f"```python\n{BODY}```", HEADER["prompt"] + BODY, SQ, f"\n{SQ}```", f"{SQ}\nf(0)"):
        assert score(text, HEADER), text
    for text, problem in [("", {}), ("I cannot.", {}), ("", HEADER), ("```python\n```", HEADER), ("def f(x:", {})]:
        assert not score(text, problem), text

HOSTILE = """while 1: pass | y = bytearray(20 << 30) | import os; [os.fork() for _ in range(99)] | y = open("PLACE/victim")
 | y = open("PLACE/new", "w") | y = open("here", "w") | import os; os.remove("PLACE/victim") | import os; os.environ["HOME"]
 | import os; os.listdir(os.path.expanduser("~")) | import shutil | import socket | import _socket | import subprocess
 | import _posixsubprocess | import os; os.system("touch PLACE/new") | y = "y" * 9 ** 7\nwhile 1: print(y)
 | g = lambda: g(); g() | import sys; sys.setrecursionlimit(10 ** 9); g = lambda: g(); g() | import gc; gc.get_objects()
 | import os; os.kill(os.getppid(), 9) | import os; os.killpg(0, 9) | import ctypes | import _ctypes | import threading
 | import sys; sys.modules["posix"].mkfifo("PLACE/new") | import sys; sys.modules["_thread"].start_new_thread(print, ())
 | import sys; sys.modules["_frozen_importlib"]._builtin_from_name("posix") | import time; time.clock_settime(0, 0)
 | import resource; resource.setrlimit(0, (-1, -1)) | import sys; sys.exit(0) | import os; os._exit(0) | y = input()
 | y = (lambda: 0).__code__.replace(co_code=b"") | import time; time.sleep(99) | y = 1; raise SystemExit"""
FAKES = ["class Equal:\n    __eq__ = lambda a, b: True\ndef f(x):\n    return Equal()", "def f(x):\n    print('4\\nOK')",
         "import os\ndef f(x):\n    os._exit(0)", "import builtins\nbuiltins.ascii = lambda v: 'x'\ndef f(x):\n    return 0",
         "import sys\ndef f(x):\n    sys.modules['__main__'].writer.write('True')\n    return True", "def f(x):\n    exit()",
         "class Pass:\n    __repr__ = lambda self: 'posix._exit(0)'\ndef f(x):\n    return Pass()",
         "def f(x):\n    return " + "(" * 9999, f"y = '\0'\n{SQ}", f"y = {'-' * 19000}1\n{SQ}", "def remote(f):\n    return f"]

@linux
def test_hostile_and_broken_programs_score_nothing_and_leave_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "homes"))
    for name in ("homes", "place"):
        (tmp_path / name).mkdir()
    (tmp_path / "place/victim").write_text("whole")
    attacks = HOSTILE.replace("PLACE", str(tmp_path / "place")).split("|")
    programs = [*(f"```\nx = 0\n{attack.strip()}\n{SQ}```" for attack in attacks), *FAKES]  # a right f after each
    assert len(programs) > 40 and score("x = 0\n" + SQ)
    with ThreadPoolExecutor(16) as pool:
        passed = [p for p, ok in zip(programs, pool.map(lambda p: score(p, timeout=3), programs)) if ok]
    assert passed == [] and os.listdir(tmp_path / "homes") == [] and os.listdir(tmp_path / "place") == ["victim"]
    assert (tmp_path / "place/victim").read_text() == "whole"
    processes = [p for p in Path("/proc").glob("[0-9]*/cwd") if os.access(p, os.R_OK)]
    assert not any(str(tmp_path / "homes") in os.readlink(p) for p in processes)

def test_code_runs_only_with_leave(monkeypatch):
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    for name in ("mbpp", "humaneval"):  # at once, not after the first answers
        with pytest.raises(t2.Transformer2Error, match="HF_ALLOW_CODE_EVAL=1"):
            train_expert.get_task(name)

def test_datasets_are_split_and_their_faults_are_said(monkeypatch, capsys):
    import datasets
    def task(name, **splits):
        made = {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}
        monkeypatch.setattr("datasets.load_dataset", lambda *args: made)
        return train_expert.get_task(name)
    rows = [{"question": "?", "answer": f"#### {i}"} for i in range(40)]
    gsm8k = task("gsm8k", train=rows[:9] + [{"question": "?", "answer": "#### many"}], test=rows[9:])
    assert [[p["answer"] for p in gsm8k.problems(s)] for s in ("train", "validation")] == [list("02468"), list("1357")]
    assert "1 of 5 problems left out" in capsys.readouterr().err and len(gsm8k.problems("test")) == 31
    math500 = task("math", test=[{"problem": "?", "answer": str(i), "solution": ""} for i in range(40)])
    assert [len(math500.problems(s)) for s in ("train", "validation", "test")] == [3, 2, 35]
    with pytest.raises(t2.Transformer2Error, match="no split or column 'question'"):
        task("arc-easy", train=[{"choices": {"label": ["A"], "text": ["x"]}, "answerKey": "A"}]).problems("train")
    monkeypatch.setattr("datasets.load_dataset", lambda *args: open("/no/such/file"))
    with pytest.raises(t2.Transformer2Error, match="cannot be loaded .FileNotFoundError."):
        gsm8k.problems("test")

@linux
def test_references_of_the_real_datasets_are_right(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    if (shared := Path("../shared/data/datasets")).exists():
        shutil.copytree(shared, tmp_path / "datasets")
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    def scores(name, completion, splits=("test",)):
        task = train_expert.get_task(name)
        problems = [p for split in splits for p in task.problems(split)]
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(lambda p: task.reward(completion(p), p), problems))
    try:
        assert scores("gsm8k", lambda p: p["solution"]) == [1.0] * 1319
    except t2.Transformer2Error as error:
        pytest.skip(str(error))
    assert scores("gsm8k", lambda p: f"The answer is {rewards.numeric_answer(p['answer']) + 1}") == [-1.0] * 1319
    assert scores("arc-challenge", lambda p: p["solution"]) == [1.0] * 1172
    assert scores("arc-challenge", lambda p: p["question"]) == [-1.0] * 1172
    clock = time.time()
    assert scores("humaneval", lambda p: p["solution"], ("train", "validation", "test")) == [1.0] * 164
    assert scores("humaneval", lambda p: "", ("train", "validation", "test")) == [-1.0] * 164
    assert scores("mbpp", lambda p: p["solution"], ("train",)) == [1.0] * 185  # of 187, two are left out
    assert 513 / (time.time() - clock) > 20
