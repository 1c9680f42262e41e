"""Answers in two passes: pass 1 finds out which expert a prompt needs, pass 2 answers with it.

python adapt.py                       # after `python train_expert.py`: all three strategies on tiny
python adapt.py --model tiny-vlm      # some held-out pictures, and what each expert says of them
python adapt.py --model DIR "a prompt" ...    # your own prompts, with the experts in experts/DIR
"""

import argparse
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import nn

from tasks import CATEGORIES, TASKS, TEST_PROBLEMS, four_orders, get_task, interval, say, scores
from tasks.models import CACHE, load_model
from tasks.tiny import TINY_UNSEEN
from train_expert import Parser, check_numbers, default_model, folder_name, guarded
from transformer2 import (
    Expert,
    Experts,
    Processor,
    Task,
    Transformer2Error,
    apply_svf,
    classify,
    expert_facts,
    few_shot,
    generate,
    load_expert,
    two_pass,
)

STRATEGIES = ["prompt", "classifier", "few-shot"]
EXAMPLES = 6  # held-out problems that are answered, or pictures that are looked at


@dataclass
class Library:
    """A model and its experts."""

    model: nn.Module
    processor: Processor
    by_name: dict[str, Expert]  # name of the file -> expert, without the classifier
    by_category: dict[str, Expert | None]  # answer of pass 1 -> expert; None: the base model
    classifiers: dict[str, Expert | None]  # strategy with a pass 1 -> expert that classifies in it


def main() -> None:
    args = read_arguments()
    default_model(args)
    args.shots = args.shots or (20 if args.model == "tiny" else 10)
    args.population = args.population or (32 if args.model == "tiny" else 16)
    args.iterations = args.iterations or (20 if args.model == "tiny" else 3)
    tasks = choose_tasks(args)
    dispatch = get_task("tiny-classify" if args.model == "tiny" else "classify")
    library = load_library(args, dispatch)

    if args.prompts:
        show_tasks(library, tasks, args)
        show_answers(library, [{"question": prompt} for prompt in args.prompts], args)
    elif hasattr(library.processor, "image_processor"):  # it sees pictures
        show_pictures(library, tasks)
        show_tasks(library, tasks, args)
    elif args.task:
        show_tasks(library, tasks, args)
    else:
        show_dispatch(library, dispatch, args)
        show_tasks(library, tasks, args)
        show_answers(library, dispatch.problems("test")[:EXAMPLES], args)


def read_arguments() -> argparse.Namespace:
    """The command line. Raises Transformer2Error for numbers that make no sense."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("prompts", nargs="*", help="answer these (not right after --task); without any: tables")
    add("--model", help="hub id, folder, 'tiny' or 'tiny-vlm'; by default as train_expert.py")
    add("--experts", type=Path, help="default: experts/<model>")
    add("--task", nargs="+", metavar="UNSEEN", help=", ".join(TASKS))
    add("--strategy", nargs="+", default=STRATEGIES, choices=STRATEGIES, help="default: all")
    add("--shots", type=int, help="examples that few-shot looks at; default: tiny 20, others 10")
    add("--population", type=int, help="candidates in an iteration; default: tiny 32, others 16")
    add("--iterations", type=int, help="of the search of few-shot; default: tiny 20, others 3")
    add("--test-problems", type=int, help="number to score; default: all, of *-scored 500 or 200")
    add("--max-new-tokens", type=int, help="of an answer; default: the task's own, 150 to a prompt")
    add("--seed", type=int, default=0, help="of the few-shot examples and of the search")
    add("--no-cache", action="store_true", help="keep no decompositions on disk, and read none")
    args = parser.parse_args()
    check_numbers(args, ["shots", "population", "iterations", "test_problems", "max_new_tokens"])
    return args


def choose_tasks(args: argparse.Namespace) -> list[Task]:
    """The tasks on which the strategies are compared."""
    names = args.task or []
    if args.model == "tiny" and not args.task and not args.prompts:
        names = TINY_UNSEEN
    tasks = []
    for name in names:
        task = get_task(name)
        tasks.append(replace(task, max_new_tokens=args.max_new_tokens or task.max_new_tokens))
    return tasks


def load_library(args: argparse.Namespace, dispatch: Task) -> Library:
    """Loads the model and all experts of its folder, and prints what there is.

    Raises Transformer2Error for a model or experts that cannot be loaded or do not fit together.
    """
    folder = args.experts or Path("experts") / folder_name(args.model)
    headers = read_headers(folder, args.model)
    targets = read_targets(folder, headers)
    model, processor = load_model(args.model)
    apply_svf(model, targets, None if args.no_cache else CACHE / "svd")

    # A category that no expert is for is answered by the base model.
    by_category = dict.fromkeys(CATEGORIES[dispatch.name])
    library = Library(model, processor, {}, by_category, classifiers={"prompt": None})
    for name, header in headers.items():
        expert = load_expert(folder / f"{name}.safetensors", model)
        if header["model"] != args.model:
            print(f"note: expert {name} was trained on {header['model']}")
        if name.endswith("classify"):
            if header.get("task", name) not in CATEGORIES:
                print(f"note: the classifier {name} was trained on another task, {header['task']}")
            library.classifiers["classifier"] = expert
            continue
        category = header.get("category") or name
        if library.by_category.get(category) is not None:
            print(f"note: expert {name} takes the place of another one for {category} prompts")
        library.by_name[name] = expert
        library.by_category[category] = expert
    names = ", ".join(library.by_name) or "none"
    classifier = "yes" if "classifier" in library.classifiers else "no"
    print(f"{args.model}: experts {names}; classifier: {classifier}")

    # Only the strategies that were asked for.
    for strategy in set(library.classifiers) - set(args.strategy):
        del library.classifiers[strategy]
    return library


def read_headers(folder: Path, model_name: str) -> dict[str, dict[str, str]]:
    """Name of the file -> the facts in its header, for all experts of a folder.

    Raises Transformer2Error if there is no expert, or one that cannot be read.
    """
    headers = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            facts = expert_facts(path)
        except Exception as error:  # a damaged file raises errors of many kinds
            raise Transformer2Error(f"cannot read the expert {path}: {error}") from error
        headers[path.stem] = {"model": model_name, "targets": "mlp", **facts}
    if not headers:
        command = f"python train_expert.py --model {model_name}"
        raise Transformer2Error(f"no experts in {folder}: train some with {command}")
    return headers


def read_targets(folder: Path, headers: dict[str, dict[str, str]]) -> str:
    """The targets of all experts. Raises Transformer2Error if they differ."""
    targets = sorted({header["targets"] for header in headers.values()})
    if len(targets) > 1:
        reason = f"the experts in {folder} have different targets ({', '.join(targets)})"
        raise Transformer2Error(f"{reason}: keep those of one kind there, and move the others")
    return targets[0]


def show_dispatch(library: Library, dispatch: Task, args: argparse.Namespace) -> None:
    """Prints which categories the strategies find for held-out prompts, in four orders."""
    problems = dispatch.problems("test")[: args.test_problems]
    truth = [problem["answer"] for problem in problems]
    prompts = [say(problem) for problem in problems]
    model, processor, categories = library.model, library.processor, list(library.by_category)
    for strategy, expert in library.classifiers.items():
        counts = Counter()
        accuracy = {}
        for order in four_orders(categories):
            chosen = classify(model, processor, prompts, order, expert=expert)
            counts.update(zip(truth, chosen))
            accuracy[", ".join(order)] = np.mean(np.array(chosen) == truth)
        mean = np.mean(list(accuracy.values()))
        worst = min(accuracy, key=accuracy.get)
        print(f"\ndispatch by {strategy}: {mean:.1%} ({interval(mean, len(truth))}) ", end="")
        print(f"of {len(truth)} held-out prompts, each in four orders of the categories; ", end="")
        print(f"{accuracy[worst]:.1%} in the worst, {worst}")
        print_confusion(categories, counts)


def print_confusion(categories: list[str], counts: Counter) -> None:
    """Prints a row per true category and a column per chosen one. counts: of (true, chosen)."""
    print(" " * 14 + "".join(f"{category:>12}" for category in categories) + f"{'right':>12}")
    for true_category in categories:
        row = [counts[true_category, category] for category in categories]
        if sum(row) > 0:
            cells = "".join(f"{count:12}" for count in row)
            share = counts[true_category, true_category] / sum(row)
            print(f"  {true_category:12}{cells}{share:12.1%}")


def show_tasks(library: Library, tasks: list[Task], args: argparse.Namespace) -> None:
    """Prints the accuracy of base model, experts and strategies on each task, with intervals."""
    if not library.by_name:  # only a classifier
        return
    for task in tasks:
        test = task.problems("test")[: args.test_problems or TEST_PROBLEMS.get(task.name)]
        known = task.name in library.by_name
        relation = "a task of its own expert" if known else "a task no expert here was trained on"
        print(f"\n{task.name}, {relation}: accuracy on {len(test)} held-out problems")
        figures = {id(None): show_score("base model", library, task, test, expert=None)}
        for name, expert in library.by_name.items():
            figures[id(expert)] = show_score(f"expert {name}", library, task, test, expert)
        conversations = [task.conversation(problem) for problem in test]
        model, processor, categories = library.model, library.processor, list(library.by_category)
        for strategy, expert in library.classifiers.items():
            chosen = classify(model, processor, conversations, categories, expert=expert)
            row_experts = [library.by_category[category] for category in chosen]
            if set(chosen) == {chosen[0]}:  # its figures are known
                print(f"  {strategy:24} {figures[id(row_experts[0])]}  (all are {chosen[0]})")
            else:
                show_score(strategy, library, task, test, row_experts)
        if "few-shot" in args.strategy:
            show_few_shot(library, task, test, args)


def show_score(label: str, library: Library, task: Task, test: list, expert: Experts) -> str:
    """Prints and returns the accuracy on `test` with its 95 % interval. expert: as for evaluate."""
    start_time = time.time()
    figures = scores(library.model, library.processor, task, test, expert)
    print(f"  {label:24} {figures}  {time.time() - start_time:5.1f} s", flush=True)
    return figures


def show_few_shot(library: Library, task: Task, test: list[dict], args: argparse.Namespace) -> None:
    """Prints the accuracy of the mixtures of experts that a few training problems choose."""
    problems = task.problems("train")
    count = min(args.shots, len(problems))
    rows = np.random.default_rng(args.seed).choice(len(problems), count, replace=False)
    shots = [problems[row] for row in rows]
    settings = {"population": args.population, "iterations": args.iterations, "seed": args.seed}
    model, processor, experts = library.model, library.processor, library.by_name
    for label, per_layer in {"few-shot": True, "few-shot, one α each": False}.items():
        start_time = time.time()
        mixture, alphas = few_shot(
            model, processor, task, shots, experts, per_layer=per_layer, **settings
        )
        note = f"{time.time() - start_time:.1f} s"
        if not per_layer:
            values = [f"{name} {alpha:+.2f}" for name, [alpha] in zip(experts, alphas)]
            note += "  α " + ", ".join(values)
        print(f"  (cross-entropy search on {len(shots)} problems: {note})")
        show_score(label, library, task, test, mixture)


def show_answers(library: Library, problems: list[dict], args: argparse.Namespace) -> None:
    """Prints each prompt's category, and its answer without and with the category's expert."""
    model, processor, experts = library.model, library.processor, library.by_category
    conversations = [say(problem) for problem in problems]
    limit = args.max_new_tokens or 150
    base_answers = generate(model, processor, conversations, max_new_tokens=limit)
    classifier = library.classifiers.get("classifier")
    adapted = two_pass(
        model, processor, conversations, experts, classifier=classifier, max_new_tokens=limit
    )
    for problem, base_answer, (category, answer) in zip(problems, base_answers, adapted):
        truth = f" (truth: {problem['answer']})" if "answer" in problem else ""
        if experts.get(category) is None:
            answer = "the same: no expert for this category"
        print(f"\nprompt    {problem['question']}")
        print(f"category  {category}{truth}")
        print(f"base      {base_answer.strip()}")
        print(f"answer    {answer.strip()}")


def show_pictures(library: Library, tasks: list[Task]) -> None:
    """Prints what the base model and every expert say of a few held-out pictures."""
    if not tasks:  # the ones that the experts are for
        tasks = [get_task(name) for name in library.by_name if name in TASKS]
    for task in tasks:
        problems = task.problems("test")[:EXAMPLES]
        conversations = [task.conversation(problem) for problem in problems]
        model, processor = library.model, library.processor
        options = {"max_new_tokens": task.max_new_tokens, "prefill": task.prefill}
        answers = {}
        for name, expert in {"base": None, **library.by_name}.items():
            answers[name] = generate(model, processor, conversations, expert=expert, **options)
        for i, problem in enumerate(problems):
            print(f"\n{'picture':12}{problem.get('image', 'none')}")
            print(f"{'question':12}{problem['question']} (truth: {problem['answer']})")
            for name, texts in answers.items():
                verdict = "right" if task.reward(texts[i], problem) > 0 else "wrong"
                print(f"{name:12}{texts[i].strip()}  ({verdict})")


if __name__ == "__main__":
    guarded(main)
