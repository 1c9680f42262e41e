"""How well classification experts find the kinds of prompts, in several orders of the categories.

    python experiments/orders.py --model DIR --json FILE EXPERT ...
    python experiments/orders.py --model tiny --json experiments/results/orders-tiny.json

It takes the held-out prompts of the task classify: questions of math, code and reasoning, the
last with and without options, and prompts of other kinds, each kind in four orders. For the
built-in tiny model it takes those of tiny-classify, all together in each of the 24 orders. Each
EXPERT is a file that `train_expert.py` wrote for this task, each with a seed of its own; without
any it is the one in the folder experts.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # where the modules below are

import train_expert
import transformer2 as t2
from experiments.baselines import REAL_SUITE, SUITES
from experiments.curves import write_text
from experiments.speed import about_this_run
from tasks import CATEGORIES, four_orders, get_task, say


def main() -> None:
    args = read_arguments()
    task_name = SUITES.get(args.model, REAL_SUITE).classifier
    paths = args.experts or [default_expert(args.model, task_name)]
    model, processor = train_expert.load_model(args.model)
    t2.apply_svf(model, cache_dir=train_expert.CACHE / "svd")
    problems = get_task(task_name).problems("test")
    experts = {}
    for path in paths:
        expert = t2.load_expert(path, model)
        seed = t2.expert_facts(path).get("seed", 0)
        experts[f"seed {seed}"] = measure(model, processor, task_name, problems, expert)
        if args.json:  # after each, so that nothing is lost
            write_text(as_json(args.model, experts), args.json)


def read_arguments() -> argparse.Namespace:
    parser = train_expert.Parser(__doc__)
    parser.add_argument("experts", nargs="*", type=Path, metavar="EXPERT", help="an expert's file")
    parser.add_argument("--model", required=True, help="hub id, folder or 'tiny'")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser.parse_args()


def default_expert(model_name: str, task_name: str) -> Path:
    """The file that train_expert.py wrote. Raises Transformer2Error if it is not there."""
    path = Path("experts", train_expert.folder_name(model_name), f"{task_name}.safetensors")
    if not path.exists():
        way_out = f"train it with train_expert.py --model {model_name} --task {task_name}"
        raise t2.Transformer2Error(f"there is no {path}: {way_out}, or name a file")
    return path


def orders_of(task_name: str) -> list[list[str]]:
    """The orders of a task's categories that are measured."""
    categories = CATEGORIES[task_name]
    if task_name == "classify":
        return four_orders(categories)
    return [list(order) for order in itertools.permutations(categories)]


def kind_of(problem: dict, task_name: str) -> str:
    """The row of the table that a prompt counts in."""
    if task_name != "classify":
        return "all prompts"
    if problem["answer"] != "reasoning":
        return problem["answer"]
    if "\nOptions:" in problem["question"]:
        return "reasoning, with options"
    return "reasoning, without options"


def measure(
    model, processor, task_name: str, problems: list[dict], expert: t2.Expert
) -> list[dict]:
    """Prints and returns the share of each kind of prompt that an expert finds in each order."""
    prompts = [say(problem) for problem in problems]
    kinds = [kind_of(problem, task_name) for problem in problems]
    cells = []
    for order in orders_of(task_name):
        chosen = t2.classify(model, processor, prompts, order, expert=expert)
        print("\n" + ", ".join(order))
        for kind in dict.fromkeys(kinds):
            own = [i for i in range(len(problems)) if kinds[i] == kind]
            right = sum(chosen[i] == problems[i]["answer"] for i in own)
            print(f"  {kind:28} {right / len(own):6.1%} of {len(own)}", flush=True)
            cells.append({"order": order, "kind": kind, "right": right, "prompts": len(own)})
    questions = [cell for cell in cells if cell["kind"] != "other"]
    share = sum(cell["right"] for cell in questions) / sum(cell["prompts"] for cell in questions)
    worst = min(cell["right"] / cell["prompts"] for cell in questions)
    print(f"\nall kinds but other, in all orders: {share:.1%}; the worst cell: {worst:.1%}")
    return cells


def as_json(model: str, experts: dict[str, list[dict]]) -> str:
    about = {"model": Path(model).name, **about_this_run()}
    return json.dumps({"about": about, "experts": experts}, indent=1) + "\n"


if __name__ == "__main__":
    train_expert.guarded(main)
