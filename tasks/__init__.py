"""The tasks that experts are trained and tested on, and the built-in models, by name."""

import inspect
from collections.abc import Callable
from functools import partial

from tasks import code, pictures, questions, tiny
from tasks.data import offer_categories, say
from tasks.tiny import TINY_UNSEEN
from transformer2 import Task, Transformer2Error

__all__ = [
    "BUILT_IN_MODELS",
    "CATEGORIES",
    "DEFAULT_TASKS",
    "TASKS",
    "TINY_UNSEEN",
    "built_in_source",
    "get_task",
    "say",
]

TASKS: dict[str, Callable[[], Task]] = {  # name -> function that makes the task
    # the small world of the model "tiny"
    "addition": partial(tiny.tiny_task, "addition"),
    "reversal": partial(tiny.tiny_task, "reversal"),
    "largest": partial(tiny.tiny_task, "largest"),
    "greeting": partial(tiny.tiny_task, "greeting"),
    "last-letter": partial(tiny.tiny_task, "last-letter"),
    "smallest": partial(tiny.tiny_task, "smallest"),
    "tiny-classify": tiny.tiny_classify,
    # questions and programs
    "classify": questions.real_classify,
    "gsm8k": questions.gsm8k,
    "mbpp": code.mbpp,
    "math": questions.math500,
    "arc-easy": partial(questions.arc, "ARC-Easy"),
    "arc-challenge": partial(questions.arc, "ARC-Challenge"),
    "humaneval": code.humaneval,
    # pictures (the answers of TextVQA's test split are secret)
    "textvqa": partial(pictures.vqa, "textvqa", "lmms-lab/textvqa", "validation"),
    "okvqa": partial(pictures.vqa, "okvqa", "lmms-lab/OK-VQA", "val2014"),
    "easy-vqa": pictures.easy_vqa,
}

DEFAULT_TASKS = {  # built-in model -> the tasks that train without --task
    "tiny": ["addition", "reversal", "largest", "tiny-classify"],
    "tiny-vlm": ["easy-vqa"],
}

CATEGORIES = {  # classification task -> its categories
    "tiny-classify": tiny.TINY_CATEGORIES,
    "classify": questions.CATEGORIES,
}

BUILT_IN_MODELS: dict[str, Callable] = {  # name -> function that pretrains: (model, processor)
    "tiny": tiny.pretrain_tiny,
    "tiny-vlm": pictures.pretrain_tiny_vlm,
}


def get_task(name: str) -> Task:
    """The Task of that name. Raises Transformer2Error for an unknown one."""
    if name not in TASKS:
        raise Transformer2Error(f"unknown task {name!r}: take one of {', '.join(TASKS)}")
    return TASKS[name]()


def built_in_source(name: str) -> str:
    """The source text that decides what a built-in model is: another text, another model.

    It gives the folder in which the model is kept a name of its own.
    """
    source = inspect.getsource(tiny) + inspect.getsource(offer_categories)
    if name == "tiny-vlm":
        source += inspect.getsource(pictures)
    return source
