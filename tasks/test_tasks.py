"""What the tasks promise: answers are read as models write them, programs do no harm, splits do
not overlap, pictures are looked at."""

import itertools
import os
import random
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import tasks
from conftest import SMALL, WORDS, random_expert, relative
from tasks.code import extract_code
from tasks.pictures import vqa_accuracy
from tasks.questions import letter_answer, math_answer, math_form, numeric_answer, other_prompts
from tasks.sandbox import run_tests
from tasks.tiny import TINY_CATEGORY, pretrain_tiny, tiny_corpus, tiny_tokenizer
from transformer2 import (
    Task,
    Transformer2Error,
    apply_svf,
    encode,
    evaluate,
    generate,
    reinforce,
    svf_layers,
    two_pass,
)

# Some of the programs below have "\d" in an ordinary string, which Python warns of.
pytestmark = pytest.mark.filterwarnings("ignore:invalid escape")

SPLITS = ("train", "validation", "test")

# ---- Names --------------------------------------------------------------------------------------


def test_an_unknown_task_is_named_in_one_sentence():
    with pytest.raises(Transformer2Error, match="unknown task 'nonsense': take one of addition, "):
        tasks.get_task("nonsense")


def test_default_tasks_are_tasks_of_built_in_models():
    assert set(tasks.DEFAULT_TASKS) == set(tasks.BUILT_IN_MODELS)
    for names in tasks.DEFAULT_TASKS.values():
        assert set(names) <= set(tasks.TASKS)
        assert not set(names) & set(tasks.TINY_UNSEEN)


def test_built_in_models_differ_in_their_source():
    assert tasks.built_in_source("tiny") != tasks.built_in_source("tiny-vlm")


# ---- Answers as models write them ---------------------------------------------------------------


@pytest.mark.parametrize(
    "text, number",
    [
        ("so 3 + 4 = 7. The answer is 1,234.", 1234),
        ("#### -5", -5),
        (r"\boxed{18.00}", 18),
        ("it costs $7", 7),
        ("The answer is 5 + 3 = 8 eggs.", 8),
        ("Answer: 2.5 kg\nChecked 3 times.", 2.5),
        ("16-3", 3),
        ("2 or 3", 3),
        ("it is −4", -4),
        (r"\boxed{1{,}200}", 1200),
        ("The answer is: .5", 0.5),
        ("The answer is 3 of the 10", 3),
        ("#### Step 2: the total\n9 + 9 = 18.\n**Answer:** 18", 18),
        ("The answer is:\n$5", 5),
    ],
)
def test_a_number_is_read_from_a_text(text: str, number: float):
    assert numeric_answer(text) == number


def test_a_text_without_a_number_equals_nothing():
    assert numeric_answer("none") != numeric_answer("none")


@pytest.mark.parametrize(
    "text, letter",
    [
        ("B", "B"),
        ("(B)", "B"),
        ("I think.\nThe answer is (B).", "B"),
        ("the answer is B because A is not", "B"),
        ("Answer: **B**", "B"),
        (r"\boxed{B}", "B"),
        ("(A) rusts, so the answer is (C)", "C"),
        ("The answer is tin", "C"),
        ("The answer is A because iron rusts.", "A"),
        ("The answer is (B). No other option is correct.", "B"),
        ("**Answer**: (B)", "B"),
        ("Answer: The tin", "C"),
        ("#### Reasons\nThe answer is (B).", "B"),
        ("Option: B", "B"),
        ("The answer is (B).\n#### Explanation", "B"),
        ("The answer is iron ore.", "B"),
        ("The correct option is D.", "D"),
        ("The answer is iron.", "A"),
        ("Iron ore", "B"),
        ("Iron or tin?\nA", "A"),
        ("the answer is the tin", "C"),
        # These state no option.
        ("(A) iron or (B)", ""),
        ("The answer is A heavy one", ""),
        ("Iron or tin?", ""),
    ],
)
def test_an_option_is_read_from_a_text(text: str, letter: str):
    choices = {"text": ["iron", "iron ore", "tin", "None of these."]}
    assert letter_answer(text, {"question": "Iron or tin?", "choices": choices}) == letter


@pytest.mark.parametrize(
    "reference, text",
    [
        (r"\frac{1}{2}", r"so \boxed{\dfrac12}"),
        ("0.5", r"\boxed{\frac{2}{4}}"),
        (r"90^\circ", r"\boxed{90}"),
        ("5", r"\boxed{5\text{ cm}^2}"),
        ("5", "The answer is 5 cm."),
        ("1000", r"\boxed{\$1,\!000}"),
        ("[0,1)", r"\boxed{\left[0, 1\right)}"),
        ("x=4", r"\boxed{4}"),
        (r"\frac{\sqrt{3}}{2}", r"\boxed{\frac{\sqrt3}2}"),
        ("5", r"\boxed{5"),
        ("5", r"\boxed{5}. So this answer is right."),
        ("5", r"The answer is \(5\)."),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}"),
        (r"\frac{\sqrt{x^{12}}}{2}", r"so \boxed{\frac{\sqrt{x^{12}}}{2}} is it"),
        ("5", "The answer is:\n5"),
        (r"\text{east}", r"\boxed{east}"),
    ],
)
def test_equal_formulas_are_equal_however_they_are_written(reference: str, text: str):
    assert math_answer(text) == math_form(reference)


@pytest.mark.parametrize(
    "reference, text",
    [
        ("5", "It is 5"),  # states nothing
        ("[0,1)", r"\boxed{[0,1]}"),
        (r"2\frac{1}{2}", r"\boxed{10.5}"),
        ("x+1", r"\boxed{1+x}"),
        ("1", r"\boxed{1/0}"),
    ],
)
def test_other_formulas_stay_different(reference: str, text: str):
    assert math_answer(text) != math_form(reference)


@pytest.mark.parametrize(
    "text, accuracy",
    [("Two.", 0.9), ("a T-Shirt", 0.9), ("y", 0.0)],
)
def test_a_vqa_answer_of_three_people_counts_nine_tenths(text: str, accuracy: float):
    people = ["Two", "Two", "2"] + 3 * ["the t-shirt."] + 4 * ["x"]
    assert vqa_accuracy(text, {"answers": people}) == pytest.approx(accuracy)


# ---- Programs -----------------------------------------------------------------------------------

linux = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox for code runs on Linux")

SQUARE = "def f(x):\n    return x * x\n"
HEADER = {"prompt": 'import math\n\ndef f(x):\n    """Squares."""\n', "entry_point": "f"}
BODY = "    y = math.fabs(x)\n    return y * y\n"


@pytest.fixture
def code_is_allowed(monkeypatch):
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")


def squares(completion: str, problem: dict, timeout: float = 10) -> bool:
    """Whether the program in the completion has a function f that squares."""
    return run_tests(extract_code(completion, problem), "assert remote('f')(-2) == 4", timeout)


@linux
@pytest.mark.parametrize(
    "completion",
    [
        SQUARE,
        f"Sure:\n```python\n{SQUARE}```\nDone, for all x.",
        f"\n{SQUARE}```\nExplanation.",
        f"Here:\n{SQUARE}\nIt is easy.",
        f"TWO = 2\n{SQUARE}\ndef g(x:",
        f"```\ndef f(x):\n    return 0\n```\nBetter:\n```py\n{SQUARE}",
        f"from collections import Counter\nCounter('aab').most_common(1)\n{SQUARE}",
    ],
)
def test_a_program_is_found_in_a_completion(completion: str, code_is_allowed):
    assert squares(completion, {})


@linux
@pytest.mark.parametrize(
    "completion",
    [
        BODY,
        BODY.lstrip(),
        f"```python\n{BODY}```",
        HEADER["prompt"] + BODY,
        SQUARE,
        f"\n{SQUARE}```",
        f"{SQUARE}\nf(0)",
        f"{BODY}```\nFor example:\n```python\nf(3)\n```\n",
    ],
)
def test_a_function_that_the_prompt_began_is_completed(completion: str, code_is_allowed):
    assert squares(completion, HEADER)


@linux
@pytest.mark.parametrize(
    "completion, problem",
    [("", {}), ("I cannot.", {}), ("", HEADER), ("```python\n```", HEADER), ("def f(x:", {})],
)
def test_a_completion_without_a_program_fails(completion: str, problem: dict, code_is_allowed):
    assert not squares(completion, problem)


# Programs that attack the machine. A right f follows each, but none may get as far.
ATTACKS = [
    # time and memory
    "while 1: pass",
    "import time; time.sleep(99)",
    "y = input()",
    "y = bytearray(20 << 30)",
    'y = "y" * 9 ** 7\nwhile 1: print(y)',
    "g = lambda: g(); g()",
    "import sys; sys.setrecursionlimit(10 ** 9); g = lambda: g(); g()",
    'y = (lambda: 0).__code__.replace(co_code=b"")',
    # files
    'y = open("PLACE/victim")',
    'y = open("PLACE/new", "w")',
    'y = open("here", "w")',
    'import os; os.remove("PLACE/victim")',
    'import os; os.listdir(os.path.expanduser("~"))',
    "import shutil",
    'import sys; sys.modules["posix"].mkfifo("PLACE/new")',
    # the environment, the network, other processes and threads
    'import os; os.environ["HOME"]',
    "import socket",
    "import _socket",
    "import os; [os.fork() for _ in range(99)]",
    "import subprocess",
    "import _posixsubprocess",
    'import os; os.system("touch PLACE/new")',
    "import os; os.kill(os.getppid(), 9)",
    "import os; os.killpg(0, 9)",
    "import threading",
    'import sys; sys.modules["_thread"].start_new_thread(print, ())',
    # the sandbox itself
    "import gc; gc.get_objects()",
    "import ctypes",
    "import _ctypes",
    'import sys; sys.modules["_frozen_importlib"]._builtin_from_name("posix")',
    'import sys; sys.modules["__main__"].audit',
    "import time; time.clock_settime(0, 0)",
    "import resource; resource.setrlimit(0, (-1, -1))",
    # an early end
    "import sys; sys.exit(0)",
    "import os; os._exit(0)",
    "y = 1; raise SystemExit",
]

# Programs that pretend to be right, and broken ones.
FAKES = [
    "class Equal:\n    __eq__ = lambda a, b: True\ndef f(x):\n    return Equal()",
    "class Pass:\n    __repr__ = lambda self: 'posix._exit(0)'\ndef f(x):\n    return Pass()",
    "import builtins\nbuiltins.ascii = lambda v: 'x'\ndef f(x):\n    return 0",
    "import sys\ndef f(x):\n    sys.modules['__main__'].writer.write('True')\n    return True",
    "def f(x):\n    print('4\\nOK')",
    "import os\ndef f(x):\n    os._exit(0)",
    "def f(x):\n    exit()",
    "def f(x):\n    return " + "(" * 9999,
    "def remote(f):\n    return f",
    f"y = '\0'\n{SQUARE}",
    f"y = {'-' * 19000}1\n{SQUARE}",
]


@linux
def test_hostile_and_broken_programs_fail_and_leave_nothing(tmp_path, monkeypatch, code_is_allowed):
    homes = tmp_path / "homes"  # where the sandbox makes its folders
    place = tmp_path / "place"  # what the attacks are after
    homes.mkdir()
    place.mkdir()
    (place / "victim").write_text("whole")
    monkeypatch.setattr("tempfile.tempdir", str(homes))

    programs = FAKES.copy()
    for attack in ATTACKS:
        attack = attack.replace("PLACE", str(place))
        programs.append(f"```\nx = 0\n{attack}\n{SQUARE}```")
    # Two harmless programs in the same crowd, so that none fails for want of time alone.
    harmless = [f"x = 0\n{SQUARE}", f"x = 1\n{SQUARE}"]
    programs += harmless
    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(lambda program: squares(program, {}, timeout=3), programs))

    assert [program for program, passed in zip(programs, results) if passed] == harmless
    assert os.listdir(homes) == []
    assert os.listdir(place) == ["victim"]
    assert (place / "victim").read_text() == "whole"
    for folder in Path("/proc").glob("[0-9]*/cwd"):
        if os.access(folder, os.R_OK):
            assert str(homes) not in os.readlink(folder), "a process of the sandbox is still there"


@pytest.mark.parametrize("name", ["mbpp", "humaneval"])
def test_code_runs_only_if_the_user_allows_it(name: str, monkeypatch):
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    with pytest.raises(Transformer2Error, match="HF_ALLOW_CODE_EVAL=1"):
        tasks.get_task(name)  # at once, not after the first answers


# ---- Datasets and their splits ------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """hub(train=rows, test=rows) makes load_dataset give these splits."""
    import datasets

    def offer(**splits: list[dict]) -> None:
        made = {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
        monkeypatch.setattr("datasets.load_dataset", lambda *_: made)

    return offer


def gsm8k_rows(numbers: range) -> list[dict]:
    return [{"question": "?", "answer": f"#### {number}"} for number in numbers]


def answers(task: Task, split: str) -> list[str]:
    return [problem["answer"] for problem in task.problems(split)]


def test_even_training_rows_train_and_odd_ones_validate(hub):
    hub(train=gsm8k_rows(range(9)), test=gsm8k_rows(range(9, 40)))
    task = tasks.get_task("gsm8k")
    assert answers(task, "train") == ["0", "2", "4", "6", "8"]
    assert answers(task, "validation") == ["1", "3", "5", "7"]
    assert answers(task, "test") == [str(number) for number in range(9, 40)]


def test_a_dataset_with_a_test_split_only_is_split_in_three(hub):
    hub(test=[{"problem": "?", "answer": str(i), "solution": ""} for i in range(40)])
    task = tasks.get_task("math")
    assert answers(task, "train") == ["0", "16", "32"]
    assert answers(task, "validation") == ["8", "24"]
    assert len(answers(task, "test")) == 35


def test_problems_without_a_usable_answer_are_left_out_and_counted(hub, capsys):
    hub(train=[*gsm8k_rows(range(8)), {"question": "?", "answer": "#### many"}])
    assert len(tasks.get_task("gsm8k").problems("train")) == 4
    assert "1 of 5 problems left out" in capsys.readouterr().err


def test_a_missing_column_is_named(hub):
    hub(train=[{"choices": {"label": ["A"], "text": ["x"]}, "answerKey": "A"}])
    with pytest.raises(Transformer2Error, match="no split or column 'question'"):
        tasks.get_task("arc-easy").problems("train")


def test_a_missing_split_is_named(hub):
    hub(val2014=[{"question": "?"}])
    with pytest.raises(Transformer2Error, match="no split or column '(train|validation)'"):
        tasks.get_task("textvqa").problems("test")


def test_a_dataset_that_cannot_be_loaded_is_named(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *_: open("/no/such/file"))
    with pytest.raises(Transformer2Error, match="gsm8k cannot be loaded .FileNotFoundError."):
        tasks.get_task("gsm8k").problems("test")


def vqa_rows() -> list[dict]:
    """41 rows, each with an image as high as its number (from 1); the last has no answers."""
    rows = []
    for i in range(41):
        picture = Image.new("L", (4, i + 1))
        people = 6 * ["x"]
        if i == 40:
            people = []
        rows.append({"image": picture, "question": "?", "answers": people})
    return rows


def test_pictures_of_a_dataset_are_loaded_when_they_are_called(hub):
    hub(val2014=vqa_rows())
    problems = tasks.get_task("okvqa").problems("train")
    assert [problem["image"]().height for problem in problems] == [1, 17, 33]
    assert "row 16" in repr(problems[1]["image"])


def test_vqa_problems_reward_what_people_say(hub, capsys):
    hub(val2014=vqa_rows())
    task = tasks.get_task("okvqa")
    [problem, *_] = task.problems("train")
    assert task.reward("X.", problem) == 1.0
    assert task.reward("no", problem) == -0.1
    assert len(task.problems("validation")) == 2
    assert "1 of 3 problems left out" in capsys.readouterr().err


# ---- Options that are scored by their likelihood ------------------------------------------------


def test_scored_questions_are_plain_text_and_options_begin_with_a_blank(hub):
    options = {"label": ["1", "2"], "text": ["iron", "oak"]}
    hub(test=[{"question": "Which is a metal?", "choices": options, "answerKey": "1"}])
    task = tasks.get_task("arc-easy-scored")
    [problem] = task.problems("train")
    assert task.conversation(problem) == "Question: Which is a metal?\nAnswer:"
    assert task.choices(problem) == [" iron", " oak"]
    assert [task.reward(option, problem) for option in task.choices(problem)] == [1.0, -1.0]


@pytest.mark.parametrize(
    ("texts", "fault"), [(["oak"], "only one option"), (["oak", " "], "an empty option")]
)
def test_a_question_with_one_option_or_an_empty_one_is_named(texts, fault, hub):
    choices = {"label": ["A", "B"][: len(texts)], "text": texts}
    hub(test=[{"question": "Which?", "choices": choices, "answerKey": "A"}])
    task = tasks.get_task("arc-easy-scored")
    with pytest.raises(Transformer2Error, match=f"ARC-Easy: 'Which.' has {fault}"):
        task.problems("train")


def test_acc_compares_log_probs_and_acc_norm_those_per_character(monkeypatch):
    problems = [
        {"answer": "a long option", "choices": {"text": ["short", "a long option"]}},
        {"answer": "oak", "choices": {"text": ["iron", "oak"]}},
    ]
    scores = [torch.tensor([-4.0, -5.0]), torch.tensor([-9.0, -2.0])]
    monkeypatch.setattr("tasks.questions.score_choices", lambda *_, **__: scores)
    task = tasks.get_task("arc-easy-scored")
    assert tasks.accuracies(None, None, task, problems, None) == {"acc": 0.5, "acc_norm": 1.0}


@pytest.mark.parametrize(
    ("share", "count", "expected"),
    [(0.5, 100, "40.4 to 59.6"), (0.0, 10, "0.0 to 27.8"), (1.0, 10, "72.2 to 100.0")],
)
def test_intervals_are_those_of_wilson(share, count, expected):
    assert tasks.interval(share, count) == expected


# ---- Classification -----------------------------------------------------------------------------


@pytest.fixture
def classification_data(monkeypatch) -> None:
    """Stands in for the datasets of `classify`; those of ARC have options."""
    import datasets

    def load_dataset(path: str, config: str) -> dict:
        rows = []
        for i in range(400):
            row = {"question": f"{path} {i}?", "text": f"{path} {i}?"}
            if path == "allenai/ai2_arc":
                row["choices"] = {"label": ["A", "B"], "text": ["iron", "oak"]}
            rows.append(row)
        splits = {"train": rows, "test": rows[:200]}
        return {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}

    monkeypatch.setattr("datasets.load_dataset", load_dataset)


CLASSIFY_TASKS = pytest.mark.parametrize("name", ["classify", "tiny-classify"])


@CLASSIFY_TASKS
@pytest.mark.parametrize("split", ["train", "test"])
def test_each_question_has_an_order_of_the_categories_of_its_own(classification_data, name, split):
    task = tasks.get_task(name)
    categories = tasks.CATEGORIES[name]
    orders = Counter()
    for problem in task.problems(split):
        offered = task.choices(problem)
        assert problem["answer"] in offered
        assert offered == task.choices(dict(problem))  # the same at each call
        [turn] = task.conversation(problem)
        assert f"one of these categories: {', '.join(offered)}.\n" in turn["content"]
        assert turn["content"].endswith(problem["question"])
        if "other" in offered:
            orders[tuple(offered)] += 1
        else:
            assert sorted([*offered, "other"]) == sorted(categories)
    assert set(orders) == set(itertools.permutations(categories))
    assert max(orders.values()) < 0.1 * sum(orders.values())


@CLASSIFY_TASKS
def test_other_is_left_out_of_some_questions(classification_data, name):
    task = tasks.get_task(name)
    left_out = []
    for problem in task.problems("train"):
        if problem["answer"] != "other":
            left_out.append("other" not in task.choices(problem))
    assert 0.25 < sum(left_out) / len(left_out) < 0.35


@CLASSIFY_TASKS
@pytest.mark.parametrize("split", SPLITS)
def test_the_first_problems_are_of_all_categories(classification_data, name, split):
    task = tasks.get_task(name)
    first = Counter(problem["answer"] for problem in task.problems(split)[:16])
    assert first == dict.fromkeys(tasks.CATEGORIES[name], 4)


@pytest.mark.parametrize("split", SPLITS)
def test_half_of_the_reasoning_questions_have_options(classification_data, split):
    with_options = []
    for problem in tasks.get_task("classify").problems(split):
        has_options = problem["question"].endswith("?\nOptions:\n(A) iron\n(B) oak")
        if problem["answer"] == "reasoning":
            with_options.append(has_options)
        else:
            assert not has_options
    assert sum(with_options) == len(with_options) / 2


def test_prompts_of_no_category_are_of_other_kinds_in_each_split():
    kinds = {split: set() for split in SPLITS}
    prompts = []
    for split in SPLITS:
        for problem in other_prompts(split):
            assert problem["answer"] == "other"
            kinds[split].add(problem["kind"])
            prompts.append(problem["question"])
    assert len(other_prompts("test")) >= 40
    assert {"small talk", "translation", "history", "cooking"} < kinds["test"]
    assert len(kinds["test"] | kinds["train"] | kinds["validation"]) == sum(
        map(len, kinds.values())
    )
    assert len(set(prompts)) == len(prompts)


def test_the_tiny_corpus_asks_for_categories_in_any_order():
    corpus = tiny_corpus(2000, random.Random(0), classify=True)
    orders = Counter()
    said = Counter()
    for prompt, completion in zip(corpus.prompts, corpus.completions):
        offered = re.search(r"categories: (.*)\.\n", prompt)[1].split(", ")
        category = re.fullmatch(r"The category of this question is (\w+)<end>", completion)[1]
        assert category in offered
        orders[tuple(offered)] += 1
        if "Reverse" in prompt:
            said[category] += 1
    # 24 orders of four categories, and 6 without "other".
    assert len(orders) == 30
    assert set(said) == {"letters", "arithmetic"}  # the right one and the sloppy one
    assert 0.3 < said["letters"] / sum(said.values()) < 0.5


# ---- The real datasets --------------------------------------------------------------------------

SHARED_DATASETS = Path("../shared/data/datasets")


@pytest.fixture(scope="module")
def real_datasets(tmp_path_factory):
    """Datasets from a cache, never from the network: a shared copy, or else the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ALLOW_CODE_EVAL", "1")
        patch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        if SHARED_DATASETS.exists():
            # A copy, as the library writes lock files beside the data.
            copy = tmp_path_factory.mktemp("cache") / "datasets"
            shutil.copytree(SHARED_DATASETS, copy)
            patch.setattr("datasets.config.HF_DATASETS_CACHE", copy)
        yield


def rewards_of(
    name: str,
    complete: Callable[[dict], str],
    splits: tuple[str, ...] = ("test",),
    most: int | None = None,
) -> list[float]:
    """The reward of complete(problem) for each problem; skips where the dataset is not cached.

    most: how many problems at most, the first ones. None: all.
    """
    task = tasks.get_task(name)
    problems = []
    for split in splits:
        try:
            problems += task.problems(split)
        except Transformer2Error as error:
            pytest.skip(str(error))
    problems = problems[:most]
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(lambda problem: task.reward(complete(problem), problem), problems))


def solution(problem: dict) -> str:
    return problem["solution"]


@pytest.mark.parametrize("split, count", [("test", 1319), ("train", 3737)])
def test_gsm8k_solutions_are_right(real_datasets, split, count):
    assert rewards_of("gsm8k", solution, (split,)) == [1.0] * count


def test_gsm8k_answers_that_are_1_too_high_are_wrong(real_datasets):
    def one_more(problem: dict) -> str:
        return f"The answer is {numeric_answer(problem['answer']) + 1}"

    assert rewards_of("gsm8k", one_more) == [-1.0] * 1319


def test_math_solutions_are_right(real_datasets):
    assert rewards_of("math", solution, SPLITS) == [1.0] * 500


@pytest.mark.parametrize("name, count", [("arc-challenge", 1172), ("arc-easy", 2376)])
def test_arc_solutions_are_right(real_datasets, name, count):
    assert rewards_of(name, solution) == [1.0] * count


def test_the_options_of_arc_scored_are_its_texts_and_one_is_right(real_datasets):
    task = tasks.get_task("arc-challenge-scored")
    try:
        problems = task.problems("test")
    except Transformer2Error as error:
        pytest.skip(str(error))
    for problem in problems:
        options = task.choices(problem)
        assert options == [" " + text for text in problem["choices"]["text"]]
        assert sum(task.reward(option, problem) == 1.0 for option in options) >= 1
        assert task.conversation(problem) == f"Question: {problem['question']}\nAnswer:"


def test_arc_questions_are_no_answers(real_datasets):
    assert rewards_of("arc-challenge", lambda problem: problem["question"]) == [-1.0] * 1172


@linux
def test_classify_tests_on_questions_of_all_sources(real_datasets):
    try:
        problems = tasks.get_task("classify").problems("test")
    except Transformer2Error as error:
        pytest.skip(str(error))
    counts = Counter(problem["answer"] for problem in problems)
    assert counts["math"] == counts["code"] == 60 and counts["reasoning"] == 120
    with_options = ["\nOptions:\n(A) " in problem["question"] for problem in problems]
    assert sum(with_options) == 60


def test_humaneval_solutions_are_right(real_datasets):
    assert rewards_of("humaneval", solution, SPLITS) == [1.0] * 164


@linux
def test_humaneval_without_a_completion_is_wrong(real_datasets):
    assert rewards_of("humaneval", lambda problem: "", SPLITS) == [-1.0] * 164


@linux
def test_mbpp_solutions_are_right(real_datasets):
    # Two of the 374 problems have no usable answer.
    assert rewards_of("mbpp", solution, ("train", "validation")) == [1.0] * 372


@linux
def test_mbpp_solutions_of_the_test_split_are_right(real_datasets):
    assert rewards_of("mbpp", solution, ("test",), most=60) == [1.0] * 60  # of 498


@linux
def test_mbpp_solutions_that_return_something_else_are_wrong(real_datasets):
    def return_something_else(problem: dict) -> str:
        return re.sub(r"\breturn\b", "return 'x',", problem["solution"])

    rewards = rewards_of("mbpp", return_something_else, ("train",))
    assert rewards.count(-1.0) > 180  # of 185: a few functions print or return nothing


# ---- Pictures -----------------------------------------------------------------------------------


def seeing(family: str) -> tuple:
    """A random vision-language model and its processor."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer([WORDS, "What is 1 plus 2? Hello", "0123456789ABCDEFGH"])
    special = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    tokenizer.add_tokens(special, special_tokens=True)
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    small = {**SMALL, "initializer_range": 0.2, "vocab_size": len(tokenizer)}
    text_config = transformers.LlamaConfig(**small).to_dict()
    vision_config = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
    }
    if family == "llava":
        vision_config |= {"model_type": "clip_vision_model", "patch_size": 8}
        config = transformers.LlavaConfig(
            vision_config=vision_config,
            text_config=text_config,
            image_token_index=image_token,
            vision_feature_layer=-1,
        )
        processor = transformers.LlavaProcessor(
            transformers.CLIPImageProcessorPil(
                size={"height": 16, "width": 16}, do_center_crop=False
            ),
            tokenizer,
            patch_size=8,
            vision_feature_select_strategy="default",
            chat_template=tokenizer.chat_template,
            num_additional_image_tokens=1,
        )
    else:
        vision_config |= {"patch_size": 4, "initializer_range": 0.2}
        config = transformers.Idefics3Config(
            text_config=text_config,
            vision_config=vision_config,
            image_token_id=image_token,
            pad_token_id=0,
            scale_factor=2,
        )
        size = {"longest_edge": 16}
        processor = transformers.Idefics3Processor(
            transformers.Idefics3ImageProcessorPil(
                size=size, max_image_size=size, do_image_splitting=False
            ),
            tokenizer,
            image_seq_len=4,
            chat_template=tokenizer.chat_template,
        )
    model = transformers.AutoModelForImageTextToText.from_config(config)
    return model.float().eval(), processor


@pytest.fixture(params=["llava", "idefics3"])
def model_and_processor(request) -> tuple:
    try:
        return seeing(request.param)
    except ImportError as error:  # Idefics3 of transformers 5.17 needs torchvision
        pytest.skip(f"{request.param} needs a package: {str(error).strip()[:80]}")


def show(seed: int, text: str) -> list[dict]:
    """A conversation with a random picture, whose size depends on the seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (16, 16 + seed, 3), dtype=np.uint8)
    return tasks.say({"image": lambda: Image.fromarray(noise), "question": text})


CONVERSATIONS = [show(1, "What is 1 plus 2?"), show(2, "Hello ABC"), show(3, "Hello")]


def test_a_model_that_sees_is_unchanged_at_z_of_ones(model_and_processor):
    model, processor = model_and_processor
    inputs = encode(model, processor, CONVERSATIONS)
    with torch.no_grad():
        before = model(**inputs).logits
        apply_svf(model, "all")
        assert relative(model(**inputs).logits, before) < 1e-4


def test_only_the_language_model_of_a_model_that_sees_is_adapted(model_and_processor):
    model, _ = model_and_processor
    for name in svf_layers(apply_svf(model, "all")):
        assert not re.search("vision|projector|connector", name)


def test_each_picture_of_a_batch_is_answered_as_it_would_be_alone(model_and_processor):
    model, processor = model_and_processor
    apply_svf(model, "all")
    experts = [random_expert(model, 1, size=2.0), None, random_expert(model, 2, size=2.0)]
    together = generate(model, processor, CONVERSATIONS, expert=experts, max_new_tokens=8)
    alone = []
    for conversation, expert in zip(CONVERSATIONS, experts):
        alone += generate(model, processor, [conversation], expert=expert, max_new_tokens=8)
    assert together == alone
    assert len(set(together)) == 3


def test_other_pictures_get_other_answers(model_and_processor):
    model, processor = model_and_processor
    apply_svf(model, "all")
    experts = [random_expert(model, 1, size=2.0), None, random_expert(model, 2, size=2.0)]
    others = [show(9, "What is 1 plus 2?"), show(8, "Hello ABC"), show(7, "Hello")]
    texts = generate(model, processor, CONVERSATIONS, expert=experts, max_new_tokens=8)
    other_texts = generate(model, processor, others, expert=experts, max_new_tokens=8)
    assert texts != other_texts


def test_two_passes_answer_about_pictures(model_and_processor):
    model, processor = model_and_processor
    apply_svf(model, "all")
    experts = {"red": random_expert(model, 1, size=2.0), "blue": random_expert(model, 2, size=2.0)}
    results = two_pass(
        model, processor, CONVERSATIONS, experts, classifier=experts["blue"], max_new_tokens=8
    )
    chosen = [experts.get(category) for category, _ in results]
    texts = generate(model, processor, CONVERSATIONS, expert=chosen, max_new_tokens=8)
    assert [text for _, text in results] == texts


def test_an_expert_trains_on_pictures(model_and_processor):
    model, processor = model_and_processor
    apply_svf(model, "all")

    def begins_with_a_digit(completion: str, problem: dict) -> float:
        if completion.strip()[:1].isdigit():
            return 1.0
        return -0.1

    problems = [{"conversation": conversation} for conversation in CONVERSATIONS] * 8
    task = Task(
        "digits",
        lambda split: problems,
        lambda problem: problem["conversation"],
        begins_with_a_digit,
        max_new_tokens=1,
    )
    expert = reinforce(model, processor, task, steps=24, batch_size=24, lr=5e-2, validate_every=8)
    assert evaluate(model, processor, task, problems, expert=expert) > 0.9


@pytest.mark.parametrize(
    "source", ["no.png", __file__, lambda: Image.open("no.png")], ids=["path", "text", "function"]
)
def test_a_picture_that_does_not_load_is_named(source):
    model, processor = seeing("llava")
    conversation = tasks.say({"image": source, "question": "Hello"})
    with pytest.raises(Transformer2Error, match="check its .* pictures.: .*(no.png|test_tasks.py)"):
        generate(model, processor, [conversation])


def test_easy_vqa_trains_on_no_image_that_tests_or_validates():
    pytest.importorskip("easy_vqa")
    task = tasks.get_task("easy-vqa")
    images = {}
    for split in SPLITS:
        images[split] = {problem["image"] for problem in task.problems(split)}
    assert not images["train"] & images["validation"]
    assert not images["train"] & images["test"]
    assert not images["validation"] & images["test"]


def test_easy_vqa_rewards_the_answer_after_the_description():
    pytest.importorskip("easy_vqa")
    task = tasks.get_task("easy-vqa")
    for problem in task.problems("test")[:50]:
        assert task.reward(problem["answer"], problem) == 1.0
        assert task.reward(problem["solution"], problem) == 1.0
        assert task.reward("a blue circle: perhaps", problem) == -0.1


# ---- The tiny world -----------------------------------------------------------------------------


def test_tiny_splits_do_not_overlap():
    task = tasks.get_task("addition")
    questions = {}
    for split in SPLITS:
        questions[split] = {problem["question"] for problem in task.problems(split)}
    assert not questions["train"] & questions["validation"]
    assert not questions["train"] & questions["test"]
    assert not questions["validation"] & questions["test"]


def test_pretraining_sees_no_held_out_question():
    task = tasks.get_task("addition")
    held_out = {problem["question"] for problem in task.problems("validation")}
    held_out |= {problem["question"] for problem in task.problems("test")}
    corpus = tiny_corpus(2000, random.Random(0))
    for prompt in set(corpus.prompts):
        question = prompt.removeprefix("<user>").removesuffix("<end><assistant>")
        assert question not in held_out


@pytest.mark.parametrize("name", TINY_CATEGORY)
def test_tiny_tasks_reward_the_right_answer(name: str):
    task = tasks.get_task(name)
    for problem in task.problems("test")[:50]:
        assert task.reward(problem["answer"], problem) == 1.0
        assert task.reward("nonsense", problem) == -1.0


def test_the_same_seed_pretrains_the_same_model():
    first, _ = pretrain_tiny(steps=2, batch_size=8)
    second, _ = pretrain_tiny(steps=2, batch_size=8)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name])
