"""
The tasks, their rewards and the command lines: answers as models write them, hostile programs, data, pictures, errors.
"""
import os, random, re, shutil, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (AutoModelForImageTextToText, CLIPImageProcessorPil, Idefics3Config, Idefics3ImageProcessorPil,
                          Idefics3Processor, LlavaConfig, LlavaProcessor)

import adapt
import rewards
import train_expert
import transformer2 as t2
from test_transformer2 import FAMILIES, TOKENIZER, WORDS, logits, make, random_expert, relative

pytestmark = pytest.mark.filterwarnings("ignore:invalid escape")  # in programs that are tried

@pytest.mark.parametrize("text, number", [
    ("so 3 + 4 = 7. The answer is 1,234.", 1234), ("#### -5", -5), (r"\boxed{18.00}", 18), ("it costs $7", 7),
    ("The answer is 5 + 3 = 8 eggs.", 8), ("Answer: 2.5 kg\nChecked 3 times.", 2.5), ("16-3", 3), ("2 or 3", 3),
    ("it is −4", -4), (r"\boxed{1{,}200}", 1200), ("The answer is: .5", 0.5), ("The answer is 3 of the 10", 3),
    ("#### Step 2: the total\n9 + 9 = 18.\n**Answer:** 18", 18), ("The answer is:\n$5", 5)])
def test_numeric_answers(text, number):
    assert rewards.numeric_answer(text) == number != rewards.numeric_answer("none")

@pytest.mark.parametrize("text, letter", [
    ("B", "B"), ("(B)", "B"), ("I think.\nThe answer is (B).", "B"), ("the answer is B because A is not", "B"),
    ("Answer: **B**", "B"), (r"\boxed{B}", "B"), ("(A) rusts, so the answer is (C)", "C"), ("The answer is tin", "C"),
    ("The answer is A because iron rusts.", "A"), ("The answer is (B). No other option is correct.", "B"),
    ("**Answer**: (B)", "B"), ("Answer: The tin", "C"), ("#### Reasons\nThe answer is (B).", "B"), ("Option: B", "B"),
    ("The answer is (B).\n#### Explanation", "B"),
    ("The answer is iron ore.", "B"),
    ("The correct option is D.", "D"), ("The answer is iron.", "A"), ("Iron ore", "B"), ("(A) iron or (B)", ""),
    ("The answer is A heavy one", ""), ("Iron or tin?", ""), ("Iron or tin?\nA", "A"), ("the answer is the tin", "C")])
def test_letter_answers(text, letter):
    choices = {"text": ["iron", "iron ore", "tin", "None of these."], "label": list("ABCD")}
    assert rewards.letter_answer(text, {"question": "Iron or tin?", "choices": choices}) == letter

@pytest.mark.parametrize("right, said, same", [
    (r"\frac{1}{2}", r"so \boxed{\dfrac12}", True), ("0.5", r"\boxed{\frac{2}{4}}", True), ("5", "It is 5", False),
    (r"90^\circ", r"\boxed{90}", True), ("5", r"\boxed{5\text{ cm}^2}", True), ("5", "The answer is 5 cm.", True),
    ("1000", r"\boxed{\$1,\!000}", True), ("[0,1)", r"\boxed{\left[0, 1\right)}", True), ("x=4", r"\boxed{4}", True),
    ("[0,1)", r"\boxed{[0,1]}", False), (r"\frac{\sqrt{3}}{2}", r"\boxed{\frac{\sqrt3}2}", True),
    ("5", r"\boxed{5", True), (r"2\frac{1}{2}", r"\boxed{10.5}", False),
    ("5", r"\boxed{5}. So this answer is right.", True), ("5", r"The answer is \(5\).", True),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", True),
    (r"\frac{\sqrt{x^{12}}}{2}", r"so \boxed{\frac{\sqrt{x^{12}}}{2}} is it", True), ("5", "The answer is:\n5", True),
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
    for text in (SQ, f"Sure:\n```python\n{SQ}```\nDone, for all x.", f"\n{SQ}```\nExplanation.",
                 f"Here:\n{SQ}\nIt is easy.", f"TWO = 2\n{SQ}\ndef g(x:",
                 f"```\ndef f(x):\n    return 0\n```\nBetter:\n```py\n{SQ}",
                 f"from collections import Counter\nCounter('aab').most_common(1)\n{SQ}"):
        assert score(text), text
    for text in (BODY, BODY.lstrip(), f"```python\n{BODY}```", HEADER["prompt"] + BODY, SQ, f"\n{SQ}```",
                 f"{SQ}\nf(0)", f"{BODY}```\nFor example:\n```python\nf(3)\n```\n"):
        assert score(text, HEADER), text
    for text, problem in [("", {}), ("I cannot.", {}), ("", HEADER), ("```python\n```", HEADER), ("def f(x:", {})]:
        assert not score(text, problem), text

HOSTILE = """while 1: pass | y = bytearray(20 << 30) | import os; [os.fork() for _ in range(99)]
 | y = open("PLACE/victim") | y = open("PLACE/new", "w") | y = open("here", "w") | import os; os.remove("PLACE/victim")
 | import os; os.environ["HOME"]
 | import os; os.listdir(os.path.expanduser("~")) | import shutil | import socket | import _socket | import subprocess
 | import _posixsubprocess | import os; os.system("touch PLACE/new") | y = "y" * 9 ** 7\nwhile 1: print(y)
 | g = lambda: g(); g() | import sys; sys.setrecursionlimit(10 ** 9); g = lambda: g(); g() | import gc; gc.get_objects()
 | import os; os.kill(os.getppid(), 9) | import os; os.killpg(0, 9) | import ctypes | import _ctypes | import threading
 | import sys; sys.modules["posix"].mkfifo("PLACE/new") | import sys; sys.modules["_thread"].start_new_thread(print, ())
 | import sys; sys.modules["_frozen_importlib"]._builtin_from_name("posix") | import time; time.clock_settime(0, 0)
 | import resource; resource.setrlimit(0, (-1, -1)) | import sys; sys.exit(0) | import os; os._exit(0) | y = input()
 | y = (lambda: 0).__code__.replace(co_code=b"") | import time; time.sleep(99) | y = 1; raise SystemExit"""
FAKES = [
    "class Equal:\n    __eq__ = lambda a, b: True\ndef f(x):\n    return Equal()", "def f(x):\n    print('4\\nOK')",
    "import os\ndef f(x):\n    os._exit(0)", "def f(x):\n    exit()", "def f(x):\n    return " + "(" * 9999,
    "import builtins\nbuiltins.ascii = lambda v: 'x'\ndef f(x):\n    return 0", f"y = '\0'\n{SQ}",
    "import sys\ndef f(x):\n    sys.modules['__main__'].writer.write('True')\n    return True",
    "class Pass:\n    __repr__ = lambda self: 'posix._exit(0)'\ndef f(x):\n    return Pass()",
    f"y = {'-' * 19000}1\n{SQ}", "def remote(f):\n    return f"]

@linux
def test_hostile_and_broken_programs_score_nothing_and_leave_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "homes"))
    for name in ("homes", "place"):
        (tmp_path / name).mkdir()
    (tmp_path / "place/victim").write_text("whole")
    attacks = HOSTILE.replace("PLACE", str(tmp_path / "place")).split("|")
    programs = [*(f"```\nx = 0\n{attack.strip()}\n{SQ}```" for attack in attacks), *FAKES]  # a right f after each
    assert len(programs) > 40
    programs += [f"x = 0\n{SQ}"] * 2  # in the same crowd, so that no attack fails for want of time alone
    with ThreadPoolExecutor(16) as pool:
        passed = [p for p, ok in zip(programs, pool.map(lambda p: score(p, timeout=3), programs)) if ok]
    assert passed == programs[-2:]
    assert os.listdir(tmp_path / "homes") == [] and os.listdir(tmp_path / "place") == ["victim"]
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

def test_vqa_reward_and_data(monkeypatch, capsys):
    import datasets
    people = {"answers": ["Two"] * 2 + ["2"] + ["the t-shirt."] * 3 + ["x"] * 4}
    assert [rewards.vqa_accuracy(text, people) for text in ("Two.", "a T-Shirt", "y")] == pytest.approx([0.9, 0.9, 0])
    rows = [{"image": Image.new("L", (4, i + 1)), "question": "?", "answers": ["x"] * 6 * (i < 40)} for i in range(41)]
    monkeypatch.setattr("datasets.load_dataset", lambda *args: {"val2014": datasets.Dataset.from_list(rows)})
    task = train_expert.get_task("okvqa")
    problems = task.problems("train")
    assert [p["image"]().size[1] for p in problems] == [1, 17, 33] and "row 16" in repr(problems[1]["image"])
    assert [task.reward(text, problems[0]) for text in ("X.", "no")] == [1.0, -0.1]
    assert len(task.problems("validation")) == 2 and "1 of 3 problems left out" in capsys.readouterr().err
    with pytest.raises(t2.Transformer2Error, match="no split or column '(train|validation)'"):
        train_expert.get_task("textvqa").problems("test")

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
    assert scores("humaneval", lambda p: p["solution"], ("train", "validation", "test")) == [1.0] * 164
    assert scores("humaneval", lambda p: "", ("train", "validation", "test")) == [-1.0] * 164
    assert scores("mbpp", lambda p: p["solution"], ("train", "validation")) == [1.0] * 372  # of 374, two are left out
    wrong = scores("mbpp", lambda p: re.sub(r"\breturn\b", "return 'x',", p["solution"]), ("train",))
    assert wrong.count(-1.0) > 180  # a few functions print or return nothing

# --- pictures

def seeing(family):
    """A random vision-language model and its processor."""
    torch.manual_seed(0)
    tokenizer = train_expert.tiny_tokenizer([WORDS, "What is 1 plus 2? Hello", "0123456789ABCDEFGH"])
    special = "<image> <fake_token_around_image> <global-img> <end_of_utterance>"
    tokenizer.add_tokens(special.split(), special_tokens=True)
    text, image = {**FAMILIES["llama"].to_dict(), "vocab_size": len(tokenizer)}, len(tokenizer) - 4
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16)
    if family == "llava":
        config = LlavaConfig(vision_config=dict(vision, model_type="clip_vision_model", patch_size=8), text_config=text,
                             image_token_index=image, vision_feature_layer=-1)
        images = CLIPImageProcessorPil(size={"height": 16, "width": 16}, do_center_crop=False)
        processor = LlavaProcessor(images, tokenizer, 8, "default", tokenizer.chat_template,
                                   num_additional_image_tokens=1)
    else:
        config = Idefics3Config(text_config=text, vision_config=dict(vision, patch_size=4, initializer_range=0.2),
                                image_token_id=image, pad_token_id=0, scale_factor=2)
        size = {"longest_edge": 16}
        images = Idefics3ImageProcessorPil(size=size, max_image_size=size, do_image_splitting=False)
        processor = Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=tokenizer.chat_template)
    return AutoModelForImageTextToText.from_config(config).float().eval(), processor

def show(seed, text):
    noise = np.random.default_rng(seed).integers(0, 256, (16, 16 + seed, 3), dtype=np.uint8)
    return train_expert.say({"image": lambda: Image.fromarray(noise), "question": text})

@pytest.mark.parametrize("family", ["llava", "idefics3"])
def test_pictures(family):
    try:
        model, processor = seeing(family)
    except ImportError as error:  # transformers 5.17's Idefics3 wants torchvision
        pytest.skip(f"this version of transformers needs a package for {family}: {str(error).strip()[:80]}")
    conversations = [show(1, "What is 1 plus 2?"), show(2, "Hello ABC"), show(3, "Hello")]
    inputs = t2.encode(model, processor, conversations)
    with torch.no_grad():
        before = model(**inputs).logits
        assert relative(t2.apply_svf(model, "all")(**inputs).logits, before) < 1e-4
    assert not any("vision" in n or "projector" in n or "connector" in n for n in t2.svf_layers(model))
    say = lambda shown, expert: t2.generate(model, processor, shown, expert=expert, max_new_tokens=8)
    a, b = random_expert(model, 1, size=2.0), random_expert(model, 2, size=2.0)
    mixed = say(conversations, [a, None, b])
    assert mixed == [say([c], e)[0] for c, e in zip(conversations, [a, None, b])] and len(set(mixed)) == 3
    others = [show(9, "What is 1 plus 2?"), show(8, "Hello ABC"), show(7, "Hello")]
    assert say(others, [a, None, b]) != mixed  # it does look
    answers = t2.two_pass(model, processor, conversations, {"red": a, "blue": b}, classifier=b, max_new_tokens=8)
    assert [text for _, text in answers] == say(conversations, [{"red": a, "blue": b}.get(c) for c, _ in answers])
    task = t2.Task("toy", lambda split: [{"c": c} for c in conversations * 8], lambda p: p["c"], lambda text, p: 1.0 if
                   text.strip()[:1].isdigit() else -0.1, max_new_tokens=1)
    expert = t2.reinforce(model, processor, task, steps=24, batch_size=24, lr=5e-2, validate_every=8)
    assert t2.evaluate(model, processor, task, task.problems("test"), expert=expert) > 0.9

@pytest.mark.parametrize("source", ["no.png", __file__, lambda: Image.open("no.png")])
def test_a_picture_that_does_not_load(source):
    with pytest.raises(t2.Transformer2Error, match="check its .* pictures: .*(no.png|test_tasks.py)"):
        t2.generate(*seeing("llava"), [train_expert.say({"image": source, "question": "Hello"})])

# --- the tiny world, command lines

def test_tiny_tasks_are_split_by_question():
    seen = {split: {p["question"] for p in train_expert.get_task("addition").problems(split)} for split in
            ("train", "validation", "test")}
    assert not (seen["train"] & seen["test"] or seen["train"] & seen["validation"] or seen["validation"] & seen["test"])
    corpus = {prompt for prompt, _ in train_expert.tiny_corpus(2000, random.Random(0))}
    assert not any(q in prompt for q in seen["test"] | seen["validation"] for prompt in corpus)
    for name in train_expert.TINY_CATEGORY:
        task = train_expert.get_task(name)
        for p in task.problems("test")[:50]:
            assert task.reward(p["answer"], p) == 1.0 and task.reward("nonsense", p) == -1.0

def test_command_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for part in (make(), TOKENIZER):
        part.save_pretrained(tmp_path / "MODEL")
    def run(program, *words):
        monkeypatch.setattr(sys, "argv", [program.__name__, "--model", "MODEL", *words])
        program.main()
        return capsys.readouterr().out
    few = "--batch-size 4 --validation-problems 4 --test-problems 4 --max-new-tokens 3".split()
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    said = run(train_expert, "--task", "addition", "reversal", "--steps", "1", "--layers", "0.5", *few)
    assert "of the model\n" in said
    monkeypatch.delitem(sys.modules, "resource")
    names = ["addition.safetensors", "reversal.safetensors"]
    assert sorted(os.listdir("experts/MODEL")) == names and all(f"experts/MODEL/{name}" in said for name in names)
    headers = adapt.read_experts(Path("experts/MODEL"), "MODEL")
    assert headers["addition"]["steps"] == "1" and headers["addition"]["category"] == "arithmetic"
    assert set(t2.load_expert("experts/MODEL/addition.safetensors")) == {f"model.layers.1.mlp.{p}_proj" for p in
                                                                         ("gate", "up", "down")}
    with mock.patch.object(train_expert, "save_expert", side_effect=[None, KeyboardInterrupt]):
        with pytest.raises(KeyboardInterrupt):
            run(train_expert, "--task", "addition", "reversal", "--steps", "1", *few)
    assert "step   1" in capsys.readouterr().out
    said = run(train_expert, "--task", "addition", "reversal", "--steps", "1", *few, "--resume")
    assert "step   1" not in said and all(f"experts/MODEL/{name}" in said for name in names)  # nothing trained again
    assert sorted(os.listdir("experts/MODEL")) == names
    search = "--shots 2 --population 4 --iterations 1 --test-problems 4 --max-new-tokens 3".split()
    said = run(adapt, "--task", "smallest", *search)
    for line in ("base model", "expert addition", "expert reversal", "prompt", "few-shot", "few-shot, one α each"):
        assert f"\n  {line} " in said
    said = run(adapt, "Hello ABC", "--max-new-tokens", "3")
    assert "prompt    Hello ABC" in said and "category  " in said and "base model" not in said

@pytest.mark.parametrize("command, says", [
    (["train_expert", "--model", "tiny", "--task", "nonsense"], "unknown task 'nonsense'"),
    (["train_expert", "--model", "no/such-model", "--task", "addition"], "neither 'tiny' nor a folder"),
    (["train_expert", "--model", "MODEL", "--task", "addition", "--targets", "nothing"], "match no linear layer"),
    (["train_expert", "--model", "MODEL", "--task", "addition", "--targets", "(["], "or a regular expression"),
    (["train_expert", "--model", "MODEL", "--task", "addition", "--layers", "50"], "above 0, up to 1"),
    (["train_expert", "--model", "MODEL", "--task", "addition", "--steps", "-1"], "may be negative"),
    (["adapt", "--model", "MODEL", "--experts", "EMPTY", "Hello"], "no experts in"),
    (["adapt", "--model", "MODEL", "--experts", "OTHERS", "Hello"], "for another model"),
    (["adapt", "--model", "MODEL", "--experts", "OWN", "A" * 80], "context ends at 64"),
])
def test_bad_input_is_one_sentence_and_exit_code_2(command, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = make()
    for part in (model, TOKENIZER):
        part.save_pretrained(tmp_path / "MODEL")
    (tmp_path / "EMPTY").mkdir()
    t2.save_expert({"model.layers.0.mlp.up_proj": torch.ones(7)}, tmp_path / "OTHERS/x.safetensors")
    t2.save_expert(random_expert(t2.apply_svf(model)), tmp_path / "OWN/x.safetensors")
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train_expert.guarded({"adapt": adapt, "train_expert": train_expert}[command[0]].main)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and says in error and "Traceback" not in error
    assert error.strip().count("\n") == 0 and not (tmp_path / "experts").exists()

def test_experts_of_half_the_layers():
    model = t2.apply_svf(make(), train_expert.last_blocks(make(), "mlp", 0.5))
    assert {name.split(".")[2] for name in t2.svf_layers(model)} == {"1"} and len(t2.svf_layers(model)) == 3
    whole = t2.apply_svf(make())
    with t2.use_expert(model, random_expert(model)), t2.use_expert(whole, random_expert(model)):
        assert relative(logits(whole), logits(model)) < 1e-4
