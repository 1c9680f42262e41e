"""What the tasks share: reading a dataset, its three splits, and making a task of its rows."""

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformer2 import CATEGORY_PREFILL, Task, Transformer2Error, category_question


def say(problem: dict) -> list[dict]:
    """The conversation that puts a problem to the model: one user turn, with a picture if any."""
    content = problem["question"]
    if "image" in problem:
        picture = {"type": "image", "image": problem["image"]}
        content = [picture, {"type": "text", "text": problem["question"]}]
    return [{"role": "user", "content": content}]


def exact(completion: str, problem: dict) -> float:
    """The reward 1 for exactly the right answer, otherwise -1."""
    if completion.strip() == problem["answer"]:
        return 1.0
    return -1.0


def classify_task(
    name: str, problems: Callable[[str], list[dict]], categories: list[str], **hyper
) -> Task:
    """The task of pass 1: choose the category of a question, in an order of the question's own.

    problems: split -> problems, whose answer is one of the categories. hyper: Hyperparameters.
    """

    def offered(problem: dict) -> list[str]:
        rng = random.Random(problem["question"])  # the same order at each call
        return offer_categories(categories, problem["answer"], rng)

    def conversation(problem: dict) -> list[dict]:
        return category_question(say(problem), offered(problem))

    options = {"prefill": CATEGORY_PREFILL, "choices": offered, "hyper": hyper}
    return Task(name, problems, conversation, exact, **options)


def offer_categories(categories: list[str], answer: str, rng: random.Random) -> list[str]:
    """The categories in random order; "other", unless it is the answer, is left out of 30 %.

    This teaches an expert the meaning of the categories instead of their places in the list.
    """
    offered = rng.sample(categories, len(categories))
    if answer != "other" and rng.random() < 0.3:
        offered.remove("other")
    return offered


# ---- Datasets of the hub ------------------------------------------------------------------------
# Even training rows train and odd ones validate (the authors' code: likewise for GSM8K and ARC). Of
# a dataset with only a test split every 16th row is "train", which is enough for few-shot
# adaptation, the rows halfway between these are "validation", and all the others "test".


@dataclass(frozen=True)
class Source:
    """A dataset of the hub: its name there, its configuration, and which of its splits tests."""

    path: str
    config: str | None = None
    held_out: str = "test"


@dataclass(repr=False)
class Picture:
    """A picture of a dataset. Calling it decodes it: all decoded at once would fill the memory."""

    data: Sequence[dict]
    row: int
    column: str

    def __call__(self):
        """The picture as PIL has it. Raises Transformer2Error if it cannot be decoded."""
        try:
            return self.data[self.row][self.column]
        except Exception as error:  # decoders raise many kinds of errors
            raise Transformer2Error(f"cannot load the picture {self}: {error}") from error

    def __repr__(self) -> str:
        return f"in row {self.row} of the dataset"


def load_problems(source: Source, prepare: Callable[[dict], dict], split: str) -> list[dict]:
    """The problems of a split: the rows of the dataset, each with what `prepare` makes of it.

    prepare: row -> what to add to it, `question` and `answer`. If its answer is empty it is left
    out. Raises Transformer2Error if the dataset cannot be loaded or lacks a split or column.
    """
    data = load(source)
    problems = []
    try:
        for row in rows_of_split(data, source, split):
            problems.append(row | prepare(row))
    except KeyError as name:
        reason = f"dataset {source.path} has no split or column {name}"
        raise Transformer2Error(f"{reason}: delete its cache and load it again") from name
    usable = [problem for problem in problems if problem["answer"]]
    lost = len(problems) - len(usable)
    if lost > 0:
        counts = f"{lost} of {len(problems)} problems left out"
        print(f"{source.path}: {counts}, as their answers cannot be used", file=sys.stderr)
    return usable


def load(source: Source) -> dict:
    """All splits of a dataset, by name. Raises Transformer2Error if it cannot be loaded."""
    try:
        from datasets import load_dataset, logging  # here, as few commands need it and it is slow

        logging.set_verbosity_error()
        return load_dataset(source.path, source.config)
    except Exception as error:  # the hub client's errors have no class in common
        reason = f"dataset {source.path} cannot be loaded ({type(error).__name__})"
        way_out = "go online once, or set HF_HUB_OFFLINE=1 and HF_DATASETS_CACHE to a cached copy"
        raise Transformer2Error(f"{reason}: {way_out}") from error


def rows_of_split(data: dict, source: Source, split: str) -> list[dict]:
    """The rows of one of our three splits; in the place of each picture a Picture, not decoded."""
    # 1) Which of the dataset's own splits to read, and to which of ours its rows go, in turn.
    if "train" not in data:
        part = data[source.held_out]
        turns = ["train"] + 7 * ["test"] + ["validation"] + 7 * ["test"]
    elif split == "test":
        part = data[source.held_out]
        turns = ["test"]
    else:
        part = data["train"]
        turns = ["train", "validation"]

    # 2) Read the rows, but for their pictures.
    columns = part.features.items()  # (name, type) of each
    pictures = [name for name, kind in columns if type(kind).__name__ == "Image"]
    rows = []
    for i, row in enumerate(part.remove_columns(pictures)):
        if turns[i % len(turns)] == split:
            for name in pictures:
                row[name] = Picture(part, i, name)
            rows.append(row)
    return rows


def dataset_task(
    name: str,
    category: str,
    source: Source,
    prepare: Callable[[dict], dict],
    prompt: str,
    score: Callable[[str, dict], float],
    max_new_tokens: int = 512,
    prefill: str = "",
    wrong_reward: float = -1.0,
) -> Task:
    """A task made of the rows of a dataset.

    prepare: as for load_problems. prompt: a format string that is filled in with the problem.
    score: completion and problem -> how right it is, from 0 to 1; 0 becomes `wrong_reward`.
    """

    def problems(split: str) -> list[dict]:
        return load_problems(source, prepare, split)

    def conversation(problem: dict) -> list[dict]:
        return say({**problem, "question": prompt.format(**problem)})

    def reward(completion: str, problem: dict) -> float:
        value = float(score(completion, problem))
        if value == 0.0:
            return wrong_reward
        return value

    return Task(name, problems, conversation, reward, max_new_tokens, prefill, category=category)
