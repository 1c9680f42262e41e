"""The claims of the paper, each measured by one command.

    python experiments/claims.py strategies           # trains experts with five seeds, scores them
    python experiments/claims.py methods --seeds 0 1  # LoRA and others beside SVF; needs PEFT
    python experiments/claims.py all --quick          # every claim in a small form, in minutes

A claim prints a table, and writes every single run to experiments/results/CLAIM-MODEL.json as soon
as it is done (with --quick to a temporary folder). The same command with the same --out goes on
after the last finished run. Three claims of the tiny model also get a drawing beside that file.
"""

import argparse
import contextlib
import copy
import importlib.metadata
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import combinations, product
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # where the modules below are

import train_expert
import transformer2 as t2
from experiments import baselines, pictures
from experiments.baselines import LR_SEED, METHODS, OBJECTIVES, SHOTS, Lab, Results
from experiments.curves import mean
from experiments.speed import about_this_run, endless_answers
from experiments.steps import text_of_length
from tasks import CATEGORIES, get_task, interval

# A claim is a generator of runs: a function that measures, and its arguments beside the Lab. The
# function returns figures by name; an accuracy is {"accuracy": share, "problems": count}.
Figures = dict[str, object]
Runs = Iterator[tuple[Callable[..., Figures], dict]]


def main() -> None:
    args = read_arguments()
    lab = Lab(args)
    names = list(CLAIMS) if args.claim == "all" else [args.claim]
    for name in names:
        if args.claim == "all" and name in TINY_ONLY and lab.name != "tiny":
            print(f"\n{name} is left out: it needs --model tiny")
            continue
        start_time = time.time()
        records = measure_claim(name, lab)
        print(f"\n{name}, {lab.name}, {time.time() - start_time:.0f} s")
        print_tables(records)
    print("\nAccuracies are in percent. In brackets: the lowest and the highest of several runs,")
    print("or the 95 % interval of Wilson for the accuracy of a single run.")
    print(f"Every single run is in {args.out}")


def read_arguments() -> argparse.Namespace:
    parser = train_expert.Parser(__doc__)
    add = parser.add_argument
    add("claim", choices=[*CLAIMS, "all"], metavar="CLAIM", help=", ".join(CLAIMS) + ", or all")
    add("--quick", action="store_true", help="little training, few problems, only the first seed")
    add("--model", default="tiny", help="hub id, folder or 'tiny'")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="of training and search")
    add("--out", type=Path, help="folder of the results, and of the experts")
    args = parser.parse_args()
    if args.quick:
        args.seeds = args.seeds[:1]
    if args.out is None:
        args.out = Path(tempfile.mkdtemp()) if args.quick else Path(__file__).parent / "results"
    for seed in args.seeds:
        t2.check_seed(seed)
    return args


def measure_claim(name: str, lab: Lab) -> list[dict]:
    """The records of all runs of a claim. Each is written to the claim's file when it is done."""
    if name in TINY_ONLY and lab.name != "tiny":
        raise t2.Transformer2Error(f"{name} needs base models or tasks of ours: give --model tiny")
    if name == "methods":
        baselines.import_peft()
    about = {"claim": name, "model": lab.name, "seeds": lab.seeds, "settings": lab.all_settings()}
    about |= about_this_run()
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        about["peft"] = importlib.metadata.version("peft")
    lab.results = Results(lab.out / f"{name}-{lab.name}.json", about)
    runs = []
    with contextlib.redirect_stdout(sys.stderr):
        for measure, run in CLAIMS[name](lab):
            runs.append(run)
            if lab.results.find(run) is None:
                print(f"\n{name}: {run}", flush=True)
                start_time = time.time()
                figures = measure(lab, **run)
                lab.results.add(run, figures, time.time() - start_time)
        if name in pictures.PICTURES and lab.suite is not baselines.REAL_SUITE:
            pictures.draw_file(name, lab.results.path)
    return [lab.results.find(run) for run in runs]


# ---- Self-adaptation: section 3.2, Tables 2, 8 and 10 --------------------------------------------

SEARCHES = {"few-shot, α per expert": False, "few-shot, α per expert and block": True}


def strategies(lab: Lab) -> Runs:
    """Table 2: each expert alone and all strategies, on tasks that no expert was trained on."""
    for task in lab.suite.unseen:
        yield score_expert, {"task": task, "strategy": "base"}
        for seed in lab.seeds:
            for name in lab.suite.trained:
                yield score_expert, {"task": task, "strategy": f"expert {name}", "seed": seed}
            for strategy in ["prompt", "classifier"]:
                yield score_dispatch, {"task": task, "strategy": strategy, "seed": seed}
            for strategy in SEARCHES:
                yield score_search, {"task": task, "strategy": strategy, "seed": seed}


def shots(lab: Lab) -> Runs:
    """Tables 8 and 10: the few-shot search with more and more examples."""
    for task in lab.suite.unseen:
        yield score_expert, {"task": task, "strategy": "base"}
        for strategy, count, seed in product(SEARCHES, lab.settings.shots, lab.seeds):
            run = {"task": task, "strategy": strategy, "shots": count, "seed": seed}
            yield score_search, run


def score_expert(lab: Lab, task: str, strategy: str, seed: int = 0) -> Figures:
    """One expert for all prompts, or the base model."""
    expert = None if strategy == "base" else lab.expert(strategy.removeprefix("expert "), seed)
    return {"test": lab.score(lab.model(), task, expert)}


def score_dispatch(lab: Lab, task: str, strategy: str, seed: int) -> Figures:
    """An expert for each prompt, which pass 1 chooses."""
    classifier = lab.expert(lab.suite.classifier, seed) if strategy == "classifier" else None
    experts = {}
    for name, expert in lab.trained_experts(seed).items():
        experts[get_task(name).category] = expert
    conversations = [get_task(task).conversation(problem) for problem in lab.problems(task)]
    categories = CATEGORIES[lab.suite.classifier]
    chosen = t2.classify(lab.model(), lab.processor, conversations, categories, expert=classifier)
    row_experts = [experts.get(category) for category in chosen]
    counts = sorted(Counter(chosen).items())
    return {"test": lab.score(lab.model(), task, row_experts), "chosen": counts}


def score_search(lab: Lab, task: str, strategy: str, seed: int, shots: int = SHOTS) -> Figures:
    """The mixture of experts that the few-shot search finds."""
    model, experts = lab.model(), lab.trained_experts(seed)
    start_time = time.time()
    mixture, alphas = lab.search(model, task, experts, seed, shots, SEARCHES[strategy])
    seconds = time.time() - start_time
    figures = {"test": lab.score(model, task, mixture), "search, s": seconds}
    return {**figures, "alphas": alphas.tolist()}


def compose(lab: Lab) -> Runs:
    """alpha z_first + (1 - alpha) z_second, on the tasks of both."""
    for first, second in combinations(lab.suite.trained, 2):
        for alpha, seed in product(lab.settings.alphas, lab.seeds):
            yield score_mixture, {"first": first, "second": second, "alpha": alpha, "seed": seed}


def score_mixture(lab: Lab, first: str, second: str, alpha: float, seed: int) -> Figures:
    experts = [lab.expert(first, seed), lab.expert(second, seed)]
    mixture = t2.mix(experts, torch.tensor([alpha, 1 - alpha]))
    return {task: lab.score(lab.model(), task, mixture) for task in [first, second]}


# ---- What trains, and how: Tables 1 and 4 --------------------------------------------------------


def modules(lab: Lab) -> Runs:
    """Table 4: SVF in the layers of the MLPs, of the attention, or in all."""
    yield score_untrained, {"targets": "none"}
    for targets, seed in product(["mlp", "attention", "all"], lab.seeds):
        yield score_targets, {"targets": targets, "seed": seed}


def methods(lab: Lab) -> Runs:
    """Tables 1 and 4: SVF and other methods, with policy gradients and with next-token prediction.

    Each pair has the learning rate that is best on validation problems, in short runs.
    """
    steps = t2.Hyperparameters(**lab.task(lab.suite.trained[0]).hyper).steps
    yield score_untrained, {"method": "none"}
    for method, objective in product(lab.settings.methods, OBJECTIVES):
        pair = {"method": method, "objective": objective}
        accuracies = {}
        for lr in lab.settings.lrs:
            run = {**pair, "lr": lr, "steps": lab.settings.lr_steps, "seed": LR_SEED}
            yield validate_method, run
            figures = lab.results.find(run)["figures"]  # measured by now
            accuracies[lr] = figures["validation"]["accuracy"]
        best_lr = max(accuracies, key=accuracies.get)  # at a tie the smallest
        for seed in lab.seeds:
            yield score_method, {**pair, "lr": best_lr, "steps": steps, "seed": seed}


def score_untrained(lab: Lab, **names: str) -> Figures:
    """The base model."""
    return {"trained numbers": 0, **score_tasks(lab, lab.model(), None)}


def score_targets(lab: Lab, targets: str, seed: int) -> Figures:
    expert = lab.expert(lab.suite.trained[0], seed, targets)
    count = sum(z.numel() for z in expert.values())
    return {"trained numbers": count, **score_tasks(lab, lab.model(targets), expert)}


def validate_method(lab: Lab, **run: object) -> Figures:
    model = train_method(lab, **run)
    expert = t2.get_expert(model)  # empty for an adapter of PEFT, which is in use anyway
    return {"validation": lab.score(model, lab.suite.trained[0], expert, "validation")}


def score_method(lab: Lab, **run: object) -> Figures:
    model = train_method(lab, **run)
    count = sum(values.numel() for values in model.parameters() if values.requires_grad)
    return {"trained numbers": count, **score_tasks(lab, model, t2.get_expert(model))}


def train_method(lab: Lab, method: str, objective: str, **hyperparameters: object) -> nn.Module:
    """A model that one method and one objective trained on the first task."""
    torch.manual_seed(hyperparameters["seed"])  # an adapter's start is random
    model = METHODS[method](copy.deepcopy(lab.dense_model))
    task = lab.task(lab.suite.trained[0])
    hyper = {**task.hyper, "kl_coef": 0.0, **hyperparameters}
    baselines.set_values(model, OBJECTIVES[objective](model, lab.processor, task, **hyper))
    return model


def score_tasks(lab: Lab, model: nn.Module, expert: t2.Experts) -> Figures:
    """Accuracy on the first trained task and on the unseen ones."""
    names = [lab.suite.trained[0], *lab.suite.unseen]
    return {name: lab.score(model, name, expert) for name in names}


# ---- Experts in another base model: Table 5 ------------------------------------------------------


def transfer(lab: Lab) -> Runs:
    """Table 5: the experts of one base model in another one of the same shapes."""
    for pair, task, seed in product(lab.settings.pairs, lab.suite.trained, lab.seeds):
        yield score_transfer, {"pair": pair, "task": task, "seed": seed}


def score_transfer(lab: Lab, pair: str, task: str, seed: int) -> Figures:
    source, target = baselines.PAIRS[pair]
    model = lab.model(base=target)
    others = lab.trained_experts(seed, source)
    mixture, alphas = lab.search(model, task, others, seed, SHOTS, per_layer=False)
    generator = torch.Generator().manual_seed(seed)
    shuffled = {}  # in random order within each layer
    for name, z in others[task].items():
        shuffled[name] = z[torch.randperm(len(z), generator=generator)]
    experts = {
        "base": None,
        "other's": others[task],
        "other's, shuffled": shuffled,
        "few-shot mix of other's": mixture,
        "own": lab.expert(task, seed, base=target),
    }
    scores = {name: lab.score(model, task, expert) for name, expert in experts.items()}
    return {**scores, "alphas": alphas.tolist()}


# ---- What z does ---------------------------------------------------------------------------------

RANKS = {  # shares of the ranks that keep their z; the largest singular value has the first rank
    "none": (0, 0),
    "all": (0, 1),
    "first half": (0, 0.5),
    "first quarter": (0, 0.25),
    "last half": (0.5, 1),
    "last quarter": (0.75, 1),
}


def spectrum(lab: Lab) -> Runs:
    """Which singular values an expert scales, and which of them its accuracy needs."""
    for task, seed in product(lab.suite.trained, lab.seeds):
        for layer in t2.svf_layers(lab.model()):
            yield measure_bands, {"task": task, "layer": layer, "seed": seed}
        for ranks in RANKS:
            yield score_ranks, {"task": task, "ranks": ranks, "seed": seed}


def measure_bands(lab: Lab, task: str, layer: str, seed: int) -> Figures:
    """The mean |z - 1| of ten equal bands of ranks."""
    z = lab.expert(task, seed)[layer]
    bands = enumerate((z - 1).abs().tensor_split(10), start=1)
    return {f"|z-1| {number}": band.mean().item() for number, band in bands}


def score_ranks(lab: Lab, task: str, ranks: str, seed: int) -> Figures:
    """An expert whose z is 1 outside of some ranks."""
    part = {}
    for name, z in lab.expert(task, seed).items():
        first, last = [round(share * len(z)) for share in RANKS[ranks]]
        part[name] = torch.ones_like(z)
        part[name][first:last] = z[first:last]
    return {"test": lab.score(lab.model(), task, part)}


# ---- The cost of pass 1: Table 3 -----------------------------------------------------------------

NAMES = ["arithmetic", "letters", "comparison", "other", "math", "code", "reasoning", "vision"]


def cost(lab: Lab) -> Runs:
    """Table 3: 24 prompts in both passes. The seed draws the prompts."""
    lengths, counts = lab.settings.prompt_lengths, lab.settings.num_categories
    for length, count, seed in product(lengths, counts, lab.seeds):
        yield measure_cost, {"length": length, "categories": count, "seed": seed}


def measure_cost(lab: Lab, length: int, categories: int, seed: int) -> Figures:
    """Seconds and tokens that run through the model, with padding; 100 tokens in pass 2."""
    model, processor, rng = lab.model(), lab.processor, random.Random(seed)
    texts = [text_of_length(model, processor, length, rng) for _ in range(24)]
    prompts = [[{"role": "user", "content": text}] for text in texts]
    passes = {
        "pass 1": partial(t2.classify, model, processor, prompts, NAMES[:categories]),
        "pass 2": partial(t2.generate, model, processor, prompts, max_new_tokens=100),
    }
    figures, tokens = {}, []  # tokens: of each forward pass

    def count(layer: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        tokens.append(inputs[0].numel())

    with model.get_input_embeddings().register_forward_hook(count), endless_answers(model):
        for name, run in [*passes.items(), *passes.items()]:  # the first round warms up
            tokens.clear()
            start_time = time.perf_counter()
            run()
            figures[f"{name}, s"] = time.perf_counter() - start_time
            figures[f"{name}, tokens"] = sum(tokens)
    figures["pass 1 / pass 2, s"] = figures["pass 1, s"] / figures["pass 2, s"]
    return figures


# ---- Tables --------------------------------------------------------------------------------------


def print_tables(records: list[dict]) -> None:
    """A table for all runs that have the same figures, with a row for those that differ in seed."""
    tables = {}  # names of figures -> run without its seed -> figures of the seeds
    for record in records:
        figures = record["figures"].items()  # those that are lists are in the file only
        figures = {name: value for name, value in figures if not isinstance(value, list)}
        run = {name: value for name, value in record["run"].items() if name != "seed"}
        rows = tables.setdefault(tuple(figures), {})
        rows.setdefault(tuple(run.items()), []).append(figures)
    for names, rows in tables.items():
        keys = list(dict.fromkeys(key for run in rows for key, _ in run))
        lines = [[*keys, "runs", *names]]
        for run, seeds in rows.items():
            labels = [str(dict(run).get(key, "")) for key in keys]
            cells = [summary([figures[name] for figures in seeds]) for name in names]
            lines.append([*labels, str(len(seeds)), *cells])
        widths = [max(len(cell) for cell in column) for column in zip(*lines)]
        print()
        for line in lines:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


def summary(values: list) -> str:
    """The mean of a figure over its runs, with an interval."""
    if isinstance(values[0], dict):
        shares = [100 * value["accuracy"] for value in values]
        spread = f"{min(shares):.1f} to {max(shares):.1f}"
        if len(values) == 1:
            spread = interval(values[0]["accuracy"], values[0]["problems"])
        return f"{mean(shares):.1f} ({spread})"
    if min(values) == max(values):
        return f"{round(values[0], 4)}"
    return f"{mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"


TINY_ONLY = ["compose", "transfer"]  # several trained tasks, several base models
CLAIMS: dict[str, Callable[[Lab], Runs]] = {
    "strategies": strategies,
    "compose": compose,
    "shots": shots,
    "modules": modules,
    "spectrum": spectrum,
    "cost": cost,
    "transfer": transfer,
    "methods": methods,  # the last, as it is the only one that needs PEFT
}

if __name__ == "__main__":
    train_expert.guarded(main)
