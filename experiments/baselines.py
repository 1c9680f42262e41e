"""What claims.py measures on, and where it keeps the figures.

METHODS: what of a model trains. OBJECTIVES: what it learns from. PAIRS: base models of the shapes
of the built-in tiny one. A Lab trains experts once, a Results file holds the finished runs.
"""

import argparse
import copy
import json
import random
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

import train_expert
import transformer2 as t2
from experiments.curves import write_text
from tasks import TINY_UNSEEN, get_task, tiny

# ---- Methods: what of a model trains -------------------------------------------------------------


def svf(targets: str, model: nn.Module) -> nn.Module:
    """One z for each matrix of the targets."""
    return t2.apply_svf(model, targets, train_expert.CACHE / "svd")


def adapter(config_name: str, model: nn.Module, **settings: object) -> nn.Module:
    """The model with an adapter of PEFT, in the layers that PEFT takes for this architecture.

    torch's global generator draws the adapter's start.
    """
    peft = import_peft()
    config = getattr(peft, config_name)(task_type="CAUSAL_LM", **settings)
    return peft.get_peft_model(model, config).eval()


def import_peft():
    """The package PEFT. Raises Transformer2Error if it is not installed."""
    try:
        import peft
    except ImportError as error:
        way_out = "pip install -r experiments/requirements.txt"
        raise t2.Transformer2Error(f"this claim needs the package PEFT: {way_out}") from error
    return peft


METHODS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "SVF, mlp": partial(svf, "mlp"),
    "SVF, attention": partial(svf, "attention"),
    # as the paper's baseline
    "LoRA": partial(adapter, "LoraConfig", r=16, lora_alpha=32),
    # a factor for each number in the keys, the values and the inner layer of the MLPs
    "IA3": partial(adapter, "IA3Config"),
    # 64 numbers for each matrix, spread over its two largest singular components
    "TinyLoRA": partial(adapter, "TinyLoraConfig", r=2, u=64),
}


@torch.no_grad()
def set_values(model: nn.Module, values: t2.Expert) -> None:
    """Puts what an objective below returned into the model, in place."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(values[name.removesuffix(".z")])


# ---- Objectives: what a model learns from --------------------------------------------------------


def next_token(
    model: nn.Module, processor: t2.Processor, task: t2.Task, **hyperparameters: object
) -> t2.Expert:
    """Trains on the worked solutions by cross-entropy; everything else is as in t2.reinforce.

    The draws of problems, the schedule of the learning rate, the clipping and the validation are
    the same. Returns the values of the best validation accuracy, and puts the start back.
    """
    hp = t2.Hyperparameters(**hyperparameters)
    train_problems = task.problems("train")
    held_out_problems = task.problems("validation")[: hp.validation_problems]
    progress = t2.Progress(model, task, hp)
    for step in range(hp.steps + 1):
        if step > 0:  # step 0 only validates the start
            problems = t2.draw_problems(train_problems, hp.batch_size, hp.seed * 100_003 + step)
            set_next_token_gradient(model, processor, task, problems, hp)
            t2.descend(progress, t2.StepStats(step), hp)
        if step % hp.validate_every == 0 or step == hp.steps:
            z = t2.get_expert(model)  # None would be the base model
            score = t2.evaluate(model, processor, task, held_out_problems, expert=z)
            print(f"step {step:3}  validation {score:.1%}")
            if score >= progress.best_score:  # at a tie the later one
                progress.best, progress.best_score = progress.values(), score
    progress.set_values(progress.start)
    return progress.best


def set_next_token_gradient(model, processor, task, problems: list[dict], hp) -> None:
    """Sets the gradient of a token's mean cross-entropy: all solutions have the same reward."""
    solutions = [solution_tokens(processor, task, problem) for problem in problems]
    reward = len(problems) / sum(len(tokens) for tokens in solutions)
    answers = [[t2.Answer(tokens, text="", reward=reward)] for tokens in solutions]
    hp = replace(hp, baseline=False, kl_coef=0.0)
    t2.set_gradient(model, processor, replace(task, choices=None), problems, answers, hp)


def solution_tokens(processor: t2.Processor, task: t2.Task, problem: dict) -> list[int]:
    """Token ids of the worked solution, or of the answer alone where there is none.

    An answer that the model has to write itself has an end token.
    """
    text = problem.get("solution", problem["answer"])
    [solution] = t2.choices_of(processor, replace(task, choices=[text]), problem)
    end = t2.prepared_tokenizer(processor).eos_token_id
    if task.choices is None and end is not None:
        solution.tokens.append(end)
    return solution.tokens


OBJECTIVES: dict[str, Callable[..., t2.Expert]] = {
    "policy gradient": t2.reinforce,
    "next token": next_token,
}


# ---- Base models of the shapes of the tiny one ---------------------------------------------------


@dataclass(frozen=True)
class Base:
    """How a base model is pretrained. The second half may draw other questions than the first."""

    seed: int
    second_half: int | None = None  # the seed of these draws; None: no change

    def name(self, steps: int) -> str:
        return f"{train_expert.built_in_folder('tiny').name}-{steps}-{self.seed}-{self.second_half}"


# The experts of the first are put into the second.
PAIRS: dict[str, tuple[Base, Base]] = {
    "other seeds, 1 into 2": (Base(1), Base(2)),
    "other seeds, 3 into 4": (Base(3), Base(4)),
    "a common start": (Base(5, 6), Base(5, 7)),
}


def load_base(base: Base, steps: int, folder: Path) -> tuple[nn.Module, t2.Processor]:
    """A base model that was pretrained for so many steps. The first call pretrains it."""
    path = folder / base.name(steps)
    if not path.exists():
        if base.second_half is None:
            model, processor = tiny.pretrain_tiny(steps=steps, seed=base.seed)
        else:
            model, processor = load_base(Base(base.seed), steps // 2, folder)
            continue_pretraining(model, processor, steps - steps // 2, base.second_half)

        def save(path: Path) -> None:
            model.save_pretrained(path)
            processor.save_pretrained(path)

        t2.write_whole(path, save)
    return train_expert.load_model(str(path))


def continue_pretraining(model, processor, steps: int, seed: int) -> None:
    """Trains all weights further on the tiny corpus, mixed as in tiny.pretrain_tiny, in place."""
    rng = random.Random(seed)

    def make_batch(step: int) -> tiny.PretrainingBatch:
        if step % 8 == 7:
            return tiny.tiny_corpus(32, rng, classify=True)
        return tiny.tiny_corpus(128, rng)

    model.requires_grad_(True)
    tiny.pretrain(model, processor, make_batch, steps, lr=2e-3)


# ---- How much is measured, and on what -----------------------------------------------------------


@dataclass
class Suite:
    """The tasks of a kind of models."""

    trained: list[str]  # an expert is trained on each; the claims about training take the first
    unseen: list[str]
    classifier: str


SUITES = {"tiny": Suite(["reversal", "addition", "largest"], TINY_UNSEEN, "tiny-classify")}
REAL_SUITE = Suite(["arc-easy-scored"], ["arc-challenge-scored"], "classify")


@dataclass
class Settings:
    """How much is measured. A file holds runs of the same settings only."""

    hyper: dict = field(default_factory=dict)  # Hyperparameters in the place of the tasks' own
    test_problems: int = 1024  # at most
    shots: tuple = (3, 5, 10, 20)  # examples that the few-shot search sees, in the claim shots
    iterations: int = 20  # of this search, everywhere
    population: int = 32  # candidates in each
    alphas: tuple = tuple(tenth / 10 for tenth in range(-2, 13))
    methods: tuple = tuple(METHODS)
    lrs: tuple = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)  # one is chosen for each way to train
    lr_steps: int = 30  # of the runs that choose it
    lr_problems: int = 1024  # of validation that choose it, at most
    pairs: tuple = tuple(PAIRS)  # of base models
    pretraining_steps: int = 1300  # of these
    prompt_lengths: tuple = (16, 48, 96)  # tokens
    num_categories: tuple = (2, 4, 8)


QUICK = Settings(
    hyper={"steps": 4, "batch_size": 32, "validate_every": 2, "validation_problems": 32},
    test_problems=64,
    shots=(3, 10),
    iterations=2,
    alphas=(0.0, 0.5, 1.0),
    lrs=(3e-3, 3e-2),
    lr_steps=2,
    lr_problems=64,
    pairs=("a common start",),
    pretraining_steps=60,
    prompt_lengths=(16, 96),
    num_categories=(2, 8),
)
REAL = Settings(  # of a model that is not built in
    test_problems=500,
    iterations=3,
    population=16,
    methods=("SVF, mlp", "LoRA"),
    lrs=(3e-4, 2e-3, 1e-2),
    lr_steps=4,
    lr_problems=128,
)
LR_SEED = 100  # of the runs that choose a learning rate
SHOTS = 10  # where a claim is not about their number


class Lab:
    """A base model, its tasks and its experts, which are kept in files."""

    def __init__(self, args: argparse.Namespace):
        self.name = train_expert.folder_name(args.model)
        self.seeds = args.seeds
        self.out = args.out
        self.suite = SUITES.get(args.model, REAL_SUITE)
        self.settings = REAL if self.suite is REAL_SUITE else Settings()
        if args.quick:
            self.settings = QUICK
        self.dense_model, self.processor = train_expert.load_model(args.model)
        self.svf_models: dict[tuple, nn.Module] = {}
        self.results: Results | None = None  # of the claim that is measured

    def all_settings(self) -> dict:
        """What figures depend on: the base model, the settings, and those of the tasks."""
        settings = {"base": model_version(self.dense_model), **asdict(self.settings)}
        for task in [*self.suite.trained, self.suite.classifier]:
            settings[task] = get_task(task).hyper
        return settings

    def task(self, name: str) -> t2.Task:
        """A task, with the training settings of this Lab."""
        task = get_task(name)
        return replace(task, hyper={**task.hyper, **self.settings.hyper})

    def model(self, targets: str = "mlp", base: Base | None = None) -> nn.Module:
        """The base model after apply_svf. base: another one; made once, as it takes long."""
        key = (targets, base)
        if key not in self.svf_models:
            if base is None:
                dense_model = copy.deepcopy(self.dense_model)
            else:
                steps = self.settings.pretraining_steps
                dense_model, _ = load_base(base, steps, self.out / "experts")
            cache_dir = train_expert.CACHE / "svd"
            self.svf_models[key] = t2.apply_svf(dense_model, targets, cache_dir)
        return self.svf_models[key]

    def expert(
        self, task_name: str, seed: int, targets: str = "mlp", base: Base | None = None
    ) -> t2.Expert:
        """The expert of a task: trained at the first call, then from its file.

        Raises Transformer2Error if the file was trained with other settings.
        """
        model = self.model(targets, base)
        task = self.task(task_name)
        hyper = {**task.hyper, "seed": seed}
        facts = {"base": model_version(model), "targets": targets, "task": task_name, **hyper}
        name = f"{facts['base']}-{targets}-{task_name}-seed{seed}.safetensors"
        path = self.out / "experts" / name
        if not path.exists():
            print(f"\ntraining {name}", file=sys.stderr)
            progress = path.with_suffix(".state")  # after an interruption training goes on from it
            expert = t2.reinforce(model, self.processor, task, checkpoint=progress, **hyper)
            t2.save_expert(expert, path, **facts)
            progress.unlink(missing_ok=True)
        expert = t2.load_expert(path, model)
        if t2.expert_facts(path) != facts:
            reason = f"{path} was trained with other settings"
            raise t2.Transformer2Error(f"{reason}: delete it, or give another --out")
        return expert

    def trained_experts(self, seed: int, base: Base | None = None) -> dict:
        """Task -> its expert, for all tasks that experts are trained on."""
        return {name: self.expert(name, seed, base=base) for name in self.suite.trained}

    def problems(self, task_name: str, split: str = "test") -> list[dict]:
        """The problems of a split that are scored."""
        most = {"test": self.settings.test_problems, "validation": self.settings.lr_problems}
        return get_task(task_name).problems(split)[: most[split]]

    def score(
        self, model: nn.Module, task_name: str, expert: t2.Experts, split: str = "test"
    ) -> dict:
        """The accuracy on the problems of a split, with their number."""
        problems = self.problems(task_name, split)
        task = get_task(task_name)
        accuracy = t2.evaluate(model, self.processor, task, problems, expert=expert)
        return {"accuracy": accuracy, "problems": len(problems)}

    def search(
        self,
        model: nn.Module,
        task_name: str,
        experts: dict,
        seed: int,
        shots: int,
        per_layer: bool,
    ) -> tuple[t2.Expert, torch.Tensor]:
        """The mixture that t2.few_shot finds on some training problems, and its α."""
        task = get_task(task_name)
        problems = task.problems("train")
        count = min(shots, len(problems))
        rows = np.random.default_rng(seed).choice(len(problems), count, replace=False)
        examples = [problems[row] for row in rows]
        options = {"iterations": self.settings.iterations, "per_layer": per_layer, "seed": seed}
        options["population"] = self.settings.population
        return t2.few_shot(model, self.processor, task, examples, experts, **options)


def model_version(model: nn.Module) -> str:
    """A model's name; that of the tiny one has a part that changes with its source text."""
    return Path(model.config._name_or_path).name


# ---- The figures ---------------------------------------------------------------------------------


class Results:
    """The finished runs of a claim, in a JSON file that is written anew after each.

    about: facts of the file, with "settings". Raises Transformer2Error if the file cannot be
    written, or holds runs of other settings.
    """

    def __init__(self, path: Path, about: dict):
        self.path, self.about, self.records = path, about, []
        if path.exists():
            self.load()
        else:
            self.save()  # before anything is measured

    def load(self) -> None:
        way_out = "delete it, or give another --out"
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            self.records, theirs = content["runs"], content["about"]["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise t2.Transformer2Error(f"{self.path} holds no results: {way_out}") from error
        ours = json.loads(json.dumps(self.about["settings"]))  # as they are read again
        names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
        if names:
            reason = f"{self.path} holds runs with another {', '.join(names)}"
            raise t2.Transformer2Error(f"{reason}: {way_out}")

    def save(self) -> None:
        content = {"about": self.about, "runs": self.records}
        write_text(json.dumps(content, indent=1) + "\n", self.path)

    def find(self, run: dict) -> dict | None:
        """The record of a run, {"run", "figures", "seconds", "commit"}; None before it finished."""
        for record in self.records:
            if record["run"] == run:
                return record
        return None

    def add(self, run: dict, figures: dict, seconds: float) -> None:
        record = {"run": run, "figures": figures, "seconds": seconds}
        self.records.append({**record, "commit": self.about["commit"]})
        self.save()
