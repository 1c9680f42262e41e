"""The tasks that experts are trained and tested on, by name."""

import math
from collections.abc import Callable
from functools import partial

from tasks import code, pictures, questions, tiny
from tasks.data import say as say  # "as say": for others to import from here
from tasks.models import BUILT_IN_MODELS as BUILT_IN_MODELS
from tasks.models import built_in_source as built_in_source
from tasks.tiny import TINY_UNSEEN as TINY_UNSEEN
from transformer2 import Experts, Model, Processor, Task, Transformer2Error, evaluate

Tasks = dict[str, Callable[[], Task]]  # name -> function that makes the task
# The small world of the model "tiny".
SKILLS = ["addition", "reversal", "largest", "greeting", "last-letter", "smallest"]
TINY_TASKS: Tasks = {skill: partial(tiny.tiny_task, skill) for skill in SKILLS}
TINY_TASKS["tiny-classify"] = tiny.tiny_classify
QUESTION_TASKS: Tasks = {
    "classify": questions.real_classify,
    "gsm8k": questions.gsm8k,
    "mbpp": code.mbpp,
    "math": questions.math500,
    "arc-easy": partial(questions.arc, "ARC-Easy"),
    "arc-challenge": partial(questions.arc, "ARC-Challenge"),
    "arc-easy-scored": partial(questions.arc_scored, "ARC-Easy"),
    "arc-challenge-scored": partial(questions.arc_scored, "ARC-Challenge"),
    "humaneval": code.humaneval,
}
PICTURE_TASKS: Tasks = {  # the answers of TextVQA's test split are secret
    "textvqa": partial(pictures.vqa, "textvqa", "lmms-lab/textvqa", "validation"),
    "okvqa": partial(pictures.vqa, "okvqa", "lmms-lab/OK-VQA", "val2014"),
    "easy-vqa": pictures.easy_vqa,
}
TASKS: Tasks = {**TINY_TASKS, **QUESTION_TASKS, **PICTURE_TASKS}

DEFAULT_TASKS = {  # built-in model -> the tasks that train without --task
    "tiny": ["addition", "reversal", "largest", "tiny-classify"],
    "tiny-vlm": ["easy-vqa"],
}

# Task -> how many held-out problems are scored without --test-problems, where it is not all.
TEST_PROBLEMS = {"arc-easy-scored": 500, "arc-challenge-scored": 200}

CATEGORIES = {  # classification task -> its categories
    "tiny-classify": tiny.TINY_CATEGORIES,
    "classify": questions.CATEGORIES,
}


def get_task(name: str) -> Task:
    """The Task of that name. Raises Transformer2Error for an unknown one."""
    if name not in TASKS:
        raise Transformer2Error(f"unknown task {name!r}: take one of {', '.join(TASKS)}")
    return TASKS[name]()


def accuracies(
    model: Model, processor: Processor, task: Task, problems: list[dict], expert: Experts
) -> dict[str, float]:
    """The share of right answers as "acc", for the scored tasks also as "acc_norm"."""
    if task.name.endswith("-scored"):
        return questions.option_accuracy(model, processor, task, problems, expert)
    return {"acc": evaluate(model, processor, task, problems, expert=expert)}


def scores(
    model: Model, processor: Processor, task: Task, problems: list[dict], expert: Experts
) -> str:
    """The accuracies with their 95 % intervals, as text."""
    texts = []
    for name, share in accuracies(model, processor, task, problems, expert).items():
        texts.append(f"{name} {share:6.1%} ({interval(share, len(problems))})")
    return ", ".join(texts)


def four_orders(categories: list[str]) -> list[list[str]]:
    """Of four categories, each stands in each place once, and after each other one once."""
    mixed = categories[1::2] + categories[::2]
    return [categories, categories[::-1], mixed, mixed[::-1]]


def interval(share: float, count: int) -> str:
    """The 95 % interval of Wilson for a share of `count` problems, in percent."""
    z2 = 1.96**2  # of the normal distribution's 97.5 % quantile
    middle = share + z2 / (2 * count)
    half_width = math.sqrt(z2 * share * (1 - share) / count + (z2 / (2 * count)) ** 2)
    low = abs(middle - half_width) / (1 + z2 / count)  # abs: 0, not -0
    high = (middle + half_width) / (1 + z2 / count)
    return f"{100 * low:.1f} to {100 * high:.1f}"
