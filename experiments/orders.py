"""How well classification experts find each kind of prompt, in four orders of the categories.

    python experiments/orders.py --model DIR --json FILE EXPERT ...

It takes the held-out prompts of the task classify: questions of math, code and reasoning, the
last with and without options, and prompts of other kinds. Each EXPERT is a file that
`train_expert.py --task classify` wrote, each with a seed of its own.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # where the modules below are

import train_expert
import transformer2 as t2
from experiments.curves import write_text
from experiments.speed import about_this_run
from tasks import CATEGORIES, four_orders, get_task, say


def main() -> None:
    args = read_arguments()
    model, processor = train_expert.load_model(args.model)
    t2.apply_svf(model, cache_dir=train_expert.CACHE / "svd")
    problems = get_task("classify").problems("test")
    experts = {}
    for path in args.experts:
        expert = t2.load_expert(path, model)
        seed = t2.expert_facts(path).get("seed", 0)
        experts[f"seed {seed}"] = measure(model, processor, problems, expert)
        if args.json:  # after each, so that nothing is lost
            write_text(as_json(args.model, experts), args.json)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experts", nargs="+", type=Path, help="files of classification experts")
    parser.add_argument("--model", required=True, help="hub id or folder")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser.parse_args()


def kind_of(problem: dict) -> str:
    """The row of the table that a prompt counts in."""
    if problem["answer"] != "reasoning":
        return problem["answer"]
    if "\nOptions:" in problem["question"]:
        return "reasoning, with options"
    return "reasoning, without options"


def measure(model, processor, problems: list[dict], expert: t2.Expert) -> list[dict]:
    """Prints and returns the share of each kind of prompt that an expert finds in each order."""
    prompts = [say(problem) for problem in problems]
    kinds = [kind_of(problem) for problem in problems]
    cells = []
    for order in four_orders(CATEGORIES["classify"]):
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
    print(f"\nmath, code and reasoning in all orders: {share:.1%}; the worst cell: {worst:.1%}")
    return cells


def as_json(model: str, experts: dict[str, list[dict]]) -> str:
    about = {"model": Path(model).name, **about_this_run()}
    return json.dumps({"about": about, "experts": experts}, indent=1) + "\n"


if __name__ == "__main__":
    train_expert.guarded(main)
