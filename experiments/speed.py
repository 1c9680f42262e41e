"""Speed and memory, each figure a ratio of two ways to do the same in one run.

    python experiments/speed.py                           # on the built-in tiny model
    python experiments/speed.py --model DIR --repeats 2 --json experiments/results/speed.json
    python experiments/speed.py --only step counted       # these groups of figures only

The ways of a group take turns, so that a slow moment of the machine meets them all. A time is the
median of the rounds after a first one, which warms up. Memory is bytes of tensors alive, counted.
"""

import argparse
import contextlib
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # where the modules below are

import train_expert
import transformer2 as t2
from experiments.steps import (
    SHAPES,
    ComposedForm,
    Way,
    counted_memory,
    make_rows,
    our_step,
    peak_gib,
    with_lora,
)
from experiments.steps import Peak as Peak  # so that it can be imported from here
from tasks import get_task, say
from tasks.sandbox import run_tests


def main() -> None:
    args = read_arguments()
    bench = Benchmark(args.model, args.repeats)
    for name in args.only or GROUPS:
        GROUPS[name](bench)
        if args.json:
            bench.save(args.json)


def read_arguments() -> argparse.Namespace:
    parser = train_expert.Parser(__doc__)
    parser.add_argument("--model", default="tiny", help="hub id, folder or 'tiny'")
    parser.add_argument("--repeats", type=int, default=3, help="rounds after the one that warms up")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    parser.add_argument("--only", nargs="+", choices=GROUPS, help="groups of figures; default: all")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats} is out of range: take 1 or more")
    return args


class Benchmark:
    """A model to measure on, and the figures so far."""

    def __init__(self, model_name: str, repeats: int):
        self.repeats = repeats
        self.dense_model, self.processor = train_expert.load_model(model_name)
        self.model = t2.apply_svf(copy.deepcopy(self.dense_model))
        self.rows: list[dict] = []
        self.about = {"model": model_name, "repeats": repeats, **about_this_run()}
        print(self.about)

    def seconds(self, ways: dict[str, Way]) -> dict[str, float]:
        """The median time of each way."""
        times = {name: [] for name in ways}
        for _ in range(self.repeats + 1):
            for name, run in ways.items():
                start_time = time.perf_counter()
                run()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                times[name].append(time.perf_counter() - start_time)
        return {name: statistics.median(rounds[1:]) for name, rounds in times.items()}

    def report(self, title: str, unit: str, values: dict[str, float]) -> None:
        """Prints and keeps the values of a group, with their ratios to the first of them."""
        first = next(iter(values.values()))
        for name, value in values.items():
            ratio = value / first
            row = {"title": title, "name": name, "unit": unit, "value": value, "ratio": ratio}
            self.rows.append(row)
            print(f"{ratio:8.3f} x {value:12.3f} {unit:9} {title}: {name}", flush=True)

    def save(self, path: Path) -> None:
        text = json.dumps({"about": self.about, "rows": self.rows}, indent=1)
        t2.write_whole(path, lambda temporary: temporary.write_text(text + "\n"))


def about_this_run() -> dict[str, str]:
    """What figures depend on beside their settings: the machine, the versions, the commit."""
    machine = f"{torch.get_num_threads()} CPU threads"
    if torch.cuda.is_available():
        machine = torch.cuda.get_device_name()
    commit = git("rev-parse", "HEAD")
    if git("status", "--porcelain", "--", "*.py"):  # the code is not that of the commit
        commit += "-dirty"
    return {
        "machine": machine,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit,
    }


def git(*arguments: str) -> str:
    """What a command of git says of this project; nothing where it is no checkout."""
    command = ["git", "-C", Path(__file__).parents[1], *arguments]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


# ---- Decomposition -------------------------------------------------------------------------------


def measure_decomposition(bench: Benchmark) -> None:
    """The MLP's matrices by torch.linalg.svd, by decompose, and from the cache."""
    layers = t2.matching_layers(bench.dense_model, "mlp")
    weights = [layer.weight.detach() for layer in layers.values()]
    with tempfile.TemporaryDirectory() as folder:
        ways = {
            "torch.linalg.svd": lambda: [
                torch.linalg.svd(weight.float(), full_matrices=False) for weight in weights
            ],
            "ours": lambda: [t2.decompose(weight) for weight in weights],
            "ours, cached": lambda: [t2.decompose_cached(weight, folder) for weight in weights],
        }
        bench.report("decompose the MLP's matrices", "s", bench.seconds(ways))


# ---- The training step ---------------------------------------------------------------------------


def measure_step(bench: Benchmark) -> None:
    """Time and peak memory of a training step with 8 rows, in all its forms."""
    model, processor = bench.model, bench.processor
    rows = make_rows(model, processor, 8)
    composed = ComposedForm(bench.dense_model, model)
    composed_ways = {
        "composed form": lambda: composed.step(rows),
        "composed form, one row at a time": lambda: composed.step(rows, rows_at_a_time=1),
        "composed form, lean": lambda: composed.step(rows, lean=True),
    }
    our_ways = {
        "ours": our_step(model, processor, rows),
        "ours, with the KL": our_step(model, processor, rows, kl_coef=0.1),
        "ours, with checkpointing": our_step(model, processor, rows, checkpointing=True),
        "ours, one row at a time": our_step(model, processor, rows, token_budget=1),
    }
    lora_ways = {}
    lora_model = with_lora(bench.dense_model)
    if lora_model is not None:
        lora_ways["PEFT LoRA, rank 16 on q and v"] = our_step(lora_model, processor, rows)
    seconds = bench.seconds({**composed_ways, **our_ways, **lora_ways})
    bench.report("training step, 8 rows of 128 tokens", "s", seconds)

    peaks = {}
    for name, run in composed_ways.items():
        peaks[name] = peak_gib(run, *composed.modules())
    for name, run in our_ways.items():
        peaks[name] = peak_gib(run, model)
    for name, run in lora_ways.items():
        peaks[name] = peak_gib(run, lora_model)
    bench.report("its peak memory, weights included", "GiB", peaks)


def measure_large_step(bench: Benchmark) -> None:
    """Time of a training step with 64 rows, and what its micro-batches save in memory."""
    rows = make_rows(bench.model, bench.processor, 64)
    composed = ComposedForm(bench.dense_model, bench.model)
    in_micro_batches = our_step(bench.model, bench.processor, rows)
    in_one_piece = our_step(bench.model, bench.processor, rows, token_budget=10**9)
    ways = {"composed form": lambda: composed.step(rows), "ours": in_micro_batches}
    bench.report("training step, 64 rows of 128 tokens", "s", bench.seconds(ways))

    peaks = {
        "in one piece": peak_gib(in_one_piece, bench.model),
        "in micro-batches": peak_gib(in_micro_batches, bench.model),
    }
    bench.report("peak memory of our step with 64 rows, weights included", "GiB", peaks)


# ---- Generation and the two passes ---------------------------------------------------------------


def sums(count: int) -> list[dict]:
    """Problems of about the same length."""
    problems = []
    for a in range(count):
        problems.append({"question": f"What is {a} plus {a + 1}?", "answer": str(2 * a + 1)})
    return problems


def random_experts(model: nn.Module) -> list[t2.Expert]:
    """Three experts near the base model."""
    generator = torch.Generator().manual_seed(0)
    experts = [{}, {}, {}]
    for expert in experts:
        for name, layer in t2.svf_layers(model).items():
            expert[name] = 1 + 0.05 * torch.randn(layer.s.shape, generator=generator)
    return experts


def endless_answers(*models: nn.Module) -> contextlib.AbstractContextManager:
    """In this `with` block no token ends an answer, so that every answer has its full length."""
    no_token = 2**40
    return t2.changed([(model.generation_config, "eos_token_id", no_token) for model in models])


def measure_generation(bench: Benchmark) -> None:
    """24 answers of 200 tokens by plain transformers and by ours; what pass 1 adds to them."""
    dense_model, model, processor = bench.dense_model, bench.model, bench.processor
    prompts = [say(problem) for problem in sums(24)]
    experts = random_experts(model)
    mixed = [*experts, None] * 6  # one for each prompt

    def plain() -> None:
        inputs = t2.encode(dense_model, processor, prompts)
        dense_model.generate(**inputs, max_new_tokens=200, do_sample=False, pad_token_id=0)

    def ours(expert: t2.Experts, tokens: int = 200) -> Way:
        options = {"expert": expert, "max_new_tokens": tokens}
        return lambda: t2.generate(model, processor, prompts, **options)

    def pass_1() -> None:
        t2.classify(model, processor, prompts, ["reasoning", "math", "code", "other"])

    ways = {
        "plain transformers": plain,
        "one expert (folded meanwhile)": ours(experts[0]),
        "three experts and none, mixed": ours(mixed),
    }
    passes = {"pass 2, 100 tokens": ours(mixed, 100), "pass 1, three categories and other": pass_1}
    with endless_answers(dense_model, model):
        seconds = bench.seconds(ways)
        speeds = {name: 24 * 200 / value for name, value in seconds.items()}
        bench.report("generate 24 answers of 200 tokens", "tokens/s", speeds)
        peaks = {
            "three experts and none, mixed": peak_gib(ours(mixed), model),
            "one expert (folded meanwhile)": peak_gib(ours(experts[0]), model),
        }
        bench.report("peak memory of generating, weights included", "GiB", peaks)
        bench.report("two passes over 24 prompts", "s", bench.seconds(passes))


# ---- The few-shot search -------------------------------------------------------------------------


def measure_search(bench: Benchmark) -> None:
    """The cross-entropy search, its population in batches or one by one: with the same result."""
    model, processor, problems = bench.model, bench.processor, sums(10)
    experts = random_experts(model)
    population = 32 if bench.about["model"] == "tiny" else 16
    found = []  # the α of every run

    def reward(text: str, problem: dict) -> float:
        return float(problem["answer"] in text)

    task = t2.Task("sums", list, say, reward, max_new_tokens=8)

    def score_one_by_one(candidates: list[np.ndarray]) -> list[tuple]:
        scores = []
        for candidate in candidates:
            scores += t2.score_mixtures(model, processor, task, problems, experts, [candidate])
        return scores

    def one_by_one() -> None:
        first = np.eye(4, 3, -1)[..., None]  # the base model and every expert, as in few_shot
        alphas = t2.cross_entropy_method(score_one_by_one, first, population, 2, seed=0)
        found.append(alphas)

    def in_batches() -> None:
        named = dict(zip("abc", experts))
        settings = {"population": population, "iterations": 2}
        _, alphas = t2.few_shot(model, processor, task, problems, named, **settings)
        found.append(alphas.numpy())

    ways = {"one candidate after the other": one_by_one, "in batches": in_batches}
    title = f"cross-entropy search, 2 x {population} candidates on 10 problems"
    bench.report(title, "s", bench.seconds(ways))
    for alphas in found:
        assert np.allclose(alphas, found[0]), "the two ways found different mixtures"


# ---- Choices -------------------------------------------------------------------------------------


def option_problems(count: int) -> list[dict]:
    """Questions with four options: of ARC-Easy where it can be loaded, otherwise made up."""
    problems = []
    try:
        for row in get_task("arc-easy").problems("test"):
            texts = row["choices"]["text"]
            if len(texts) == 4:
                problems.append({"question": row["question"], "options": texts})
        print("options: questions of ARC-Easy")
    except t2.Transformer2Error as error:
        print(f"options: made-up questions, for the {error}")
        for number in range(count):
            question = f"Which number comes right after {number}, if one counts aloud by ones?"
            texts = [f"It is the number {number + i}" for i in range(4)]
            problems.append({"question": question, "options": texts})
    return problems[:count]


def measure_options(bench: Benchmark) -> None:
    """The gradient of questions with options of several tokens, by one pass a prompt or four."""
    model, problems = bench.model, option_problems(32)

    def conversation(problem: dict) -> str:
        return f"Question: {problem['question']}\nAnswer:"

    def options(problem: dict) -> list[str]:
        return [" " + text for text in problem["options"]]

    task = t2.Task("options", list, conversation, reward=None, choices=options)
    answers = [t2.choices_of(bench.processor, task, problem) for problem in problems]
    for choices in answers:
        choices[0].reward = 1.0  # any values do

    def cached() -> None:
        t2.set_gradient(model, bench.processor, task, problems, answers, t2.Hyperparameters())

    def whole_sequences() -> None:
        with t2.changed([(model, "_is_stateful", True)]):  # as if its cache could not be copied
            cached()

    ways = {"whole sequences": whole_sequences, "ours, cached": cached}
    bench.report("four options of 32 questions, forward and backward", "s", bench.seconds(ways))


# ---- The sandbox, and models that are not there --------------------------------------------------

PROGRAM = "def f(x):\n    return x * x"
TESTS = "f = remote('f')\nassert f(2) == 4\nassert f(-3) == 9\nassert f(0.5) == 0.25"  # as MBPP's


def measure_sandbox(bench: Benchmark) -> None:
    """64 programs with their tests, 16 at a time."""
    if os.environ.get("HF_ALLOW_CODE_EVAL") != "1":
        print("the sandbox is not measured: that needs HF_ALLOW_CODE_EVAL=1 in the environment")
        return

    def run_programs() -> None:
        with ThreadPoolExecutor(16) as pool:
            passed = list(pool.map(run_tests, [PROGRAM] * 64, [TESTS] * 64))
        assert all(passed), "a right program did not pass its tests"

    seconds = bench.seconds({"64 programs": run_programs})
    bench.report("sandbox, 16 programs at a time", "s", seconds)


def measure_counted_memory(bench: Benchmark) -> None:
    """The memory of larger models, counted."""
    for name, config in SHAPES.items():
        bench.report(f"{name}, counted", "GiB", counted_memory(config))


GROUPS = {
    "decompose": measure_decomposition,
    "step": measure_step,
    "large-step": measure_large_step,
    "generate": measure_generation,
    "search": measure_search,
    "options": measure_options,
    "sandbox": measure_sandbox,
    "counted": measure_counted_memory,
}

if __name__ == "__main__":
    train_expert.guarded(main)
