"""Trains experts: a model and a task go in, a file with one z per weight matrix comes out.

    python train_expert.py                     # without a GPU: four experts of the tiny model
    python train_expert.py --model tiny-vlm    # the built-in model that sees pictures
    python train_expert.py --model Qwen/Qwen2.5-0.5B-Instruct --task gsm8k

The method is in transformer2.py, the tasks and the built-in models are in tasks/.
"""

import argparse
import atexit
import contextlib
import datetime
import functools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import NoReturn

import torch
from torch import distributed, nn

from tasks import BUILT_IN_MODELS as BUILT_IN_MODELS  # "as": for others to import from here
from tasks import DEFAULT_TASKS, TASKS, TEST_PROBLEMS, get_task
from tasks.log import TrainingLog, process_peak_gib
from tasks.models import CACHE, load_model
from tasks.models import built_in_folder as built_in_folder
from transformer2 import (
    TARGETS,
    Hyperparameters,
    Processor,
    Task,
    Transformer2Error,
    apply_svf,
    check_seed,
    evaluate,
    process_rank,
    reinforce,
    save_expert,
    svf_layers,
    token_budget,
)


def main() -> None:
    args = read_arguments()
    start_processes()
    default_model(args)
    tasks = choose_tasks(args)
    with first_process_first():
        model, processor = load_model(args.model, device_map=args.device_map)
        size = decompose_targets(model, args)
        logs = open_logs(tasks, args)
    rows = []
    with token_budget(model, args.token_budget):
        for task, log in zip(tasks, logs):
            rows.append(train_task(model, processor, task, log, args))
    remove_progress(tasks, args)
    print_summary(rows, size)


def read_arguments() -> argparse.Namespace:
    """The command line. Raises Transformer2Error for what makes no sense."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", help="hub id, folder, 'tiny' or 'tiny-vlm'; default: tiny, on a GPU a Qwen2.5")
    add("--task", nargs="+", metavar="T", help=", ".join(TASKS) + "; default: gsm8k, tiny: its own")
    add("--targets", default="mlp", help="mlp, attention, all, or a regular expression over layers")
    add(
        "--layers", type=float, default=1.0, help="share of the blocks that train, from the last on"
    )
    add("--steps", type=int, help="updates of z; default, here and in the next two: the task's own")
    add("--batch-size", type=int, help="problems in an update")
    add("--lr", type=float, help="learning rate; it falls to 0 along a cosine")
    add("--kl-coef", type=float, help="λ, the weight of the KL; at 0, the default, not computed")
    add("--token-budget", type=int, help="most tokens in a batch of any kind; fewer: less memory")
    add("--validation-problems", type=int, help="the first N choose the best step; default: 128")
    add("--seed", type=int, help="of the draw of problems and of the sampled answers")
    add("--test-problems", type=int, help="number to score; default: all, of *-scored 500 or 200")
    add("--max-new-tokens", type=int, help="of an answer; default: the task's own limit")
    add("--checkpointing", action="store_true", default=None, help="less memory, a third more time")
    add("--device-map", help="auto: spread a model over several GPUs (needs accelerate)")
    add("--no-cache", action="store_true", help="keep no decompositions on disk, and read none")
    add("--out", type=Path, default=Path("experts"), help="experts and logs land in OUT/<model>/")
    add("--sample-every", type=int, default=10, metavar="N", help="steps between logged answers")
    add(
        "--resume",
        action="store_true",
        help="go on where the same command was interrupted; "
        "a run without it replaces older logs and experts of its tasks",
    )
    args = parser.parse_args()
    counts = ["batch_size", "validation_problems", "test_problems", "max_new_tokens"]
    check_numbers(args, [*counts, "token_budget", "sample_every"])
    return args


def start_processes() -> None:
    """Joins the processes that torchrun started, if there are several; only the first prints."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "nccl"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # The others wait for what the first process prepares, which may take long.
    distributed.init_process_group(backend, timeout=datetime.timedelta(hours=4))
    atexit.register(distributed.destroy_process_group)
    if process_rank() > 0:
        sys.stdout = open(os.devnull, "w")


def choose_tasks(args: argparse.Namespace) -> list[Task]:
    """The tasks to train, with the settings of the command line."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    settings = {f.name: given[f.name] for f in fields(Hyperparameters) if f.name in given}
    tasks = []
    for name in args.task or DEFAULT_TASKS.get(args.model, ["gsm8k"]):
        task = get_task(name)
        limit = args.max_new_tokens or task.max_new_tokens
        task = replace(task, max_new_tokens=limit, hyper={**task.hyper, **settings})
        tasks.append(replace(task, problems=functools.cache(task.problems)))  # read once
    return tasks


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """The first process runs the block and fills the caches; the others follow and read them."""
    if process_rank() > 0:
        distributed.barrier()
    yield
    if process_rank() == 0 and distributed.is_initialized():
        distributed.barrier()


def decompose_targets(model: nn.Module, args: argparse.Namespace) -> str:
    """Replaces the target layers by SVFLinear, in place. Prints and returns the size of z."""
    start_time = time.time()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    cache_dir = None if args.no_cache else CACHE / "svd"
    apply_svf(model, last_blocks(model, args.targets, args.layers), cache_dir)
    layers = svf_layers(model)
    z = sum(layer.z.numel() for layer in layers.values())
    size = f"{z:,} numbers, {z / parameters:.2%} of the model"
    print(f"{args.model}: {parameters:,} parameters; ", end="")
    print(f"{len(layers)} matrices decomposed in {time.time() - start_time:.1f} s; z has {size}")
    return size


def last_blocks(model: nn.Module, targets: str, share: float) -> str:
    """`targets` in the last blocks of the language model only, as a regular expression.

    share: how much of the blocks, above 0 and up to 1; any other raises Transformer2Error.
    """
    if not 0 < share <= 1:
        reason = f"--layers {share} is no share of the layers"
        raise Transformer2Error(f"{reason}: take a number above 0, up to 1")
    if share == 1:
        return targets
    block_count = model.config.get_text_config().num_hidden_layers
    first = block_count - max(1, round(share * block_count))
    # The first number in a layer's name is that of its block.
    numbers = "|".join(str(number) for number in range(first, block_count))
    pattern = TARGETS.get(targets, targets)
    return rf"^(?=.*(?:{pattern}))\D*\.({numbers})\."


def expert_path(task: Task, args: argparse.Namespace) -> Path:
    return args.out / folder_name(args.model) / f"{task.name}.safetensors"


def open_logs(tasks: list[Task], args: argparse.Namespace) -> list[TrainingLog]:
    """The tasks' logs. A new run replaces an older one's logs, and removes experts and progress.

    Raises Transformer2Error before it changes anything if a log cannot be written, or if --resume
    finds one with other settings.
    """
    logs = []
    for task in tasks:
        settings = {"model": args.model, "task": task.name, "targets": args.targets}
        settings |= {"layers": args.layers, "max_new_tokens": task.max_new_tokens}
        settings |= asdict(Hyperparameters(**task.hyper))
        path = expert_path(task, args).with_suffix(".log.jsonl")
        logs.append(TrainingLog(path, settings, args.sample_every))
    if process_rank() > 0:
        return logs
    for task, log in zip(tasks, logs):
        for split in ["train", "validation", "test"]:
            task.problems(split)  # raises an error for a missing dataset
        log.check(args.resume)
    if not args.resume:
        for task, log in zip(tasks, logs):
            log.start()
            expert_path(task, args).unlink(missing_ok=True)
            expert_path(task, args).with_suffix(".state").unlink(missing_ok=True)
    return logs


def train_task(
    model: nn.Module, processor: Processor, task: Task, log: TrainingLog, args: argparse.Namespace
) -> str:
    """Trains, scores and saves the expert of a task. Prints and returns its row of the summary."""
    start_time = time.time()
    path = expert_path(task, args)
    progress = path.with_suffix(".state")  # what --resume goes on from
    test = task.problems("test")[: args.test_problems or TEST_PROBLEMS.get(task.name)]
    print(f"\n{task.name}: the base model answers {len(test)} held-out problems")
    base = evaluate(model, processor, task, test)
    options = {"checkpoint": progress, "on_step": log.on_step}
    expert = reinforce(model, processor, task, **options, **task.hyper)
    accuracy = evaluate(model, processor, task, test, expert=expert)
    if process_rank() > 0:
        return ""

    facts = {"task": task.name, "category": task.category or "", "problems": len(test)}
    facts |= {"model": args.model, "targets": args.targets, "layers": args.layers}
    facts["blocks"] = model.config.get_text_config().num_hidden_layers
    facts |= {"base": f"{base:.4f}", "accuracy": f"{accuracy:.4f}", **task.hyper}
    save_expert(expert, path, **facts)
    row = f"{task.name:15} {base:7.1%} -> {accuracy:6.1%} {len(test):7} problems "
    row += f"{path.stat().st_size:9,} B {time.time() - start_time:6.0f} s  {path}"
    print(row)
    log.print_conclusions()
    return row


def remove_progress(tasks: list[Task], args: argparse.Namespace) -> None:
    """Not before all tasks are done: --resume has to find the finished ones, too."""
    if process_rank() == 0:
        for task in tasks:
            expert_path(task, args).with_suffix(".state").unlink(missing_ok=True)


def print_summary(rows: list[str], size: str) -> None:
    print("\nheld-out accuracy, base -> expert", *rows, sep="\n")
    print(f"z: {size}{peak_memory()}")


def peak_memory() -> str:
    """What the process and its GPU needed at most, as a part of a sentence."""
    text = ""
    peak = process_peak_gib()
    if peak is not None:
        text = f"; peak memory {peak:.2f} GiB"
    if torch.cuda.is_available():
        text += f", on the GPU {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"
    return text


# ---- What the other scripts need, too -----------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Reads a command line. What it does not understand raises Transformer2Error."""

    def __init__(self, description: str):
        plain = argparse.RawDescriptionHelpFormatter  # keeps the lines of the description
        super().__init__(description=description, formatter_class=plain)

    def error(self, message: str) -> NoReturn:
        raise Transformer2Error(message)


def folder_name(model_name: str) -> str:
    """The name of the folder for a model's experts."""
    if Path(model_name).exists():
        return os.path.basename(os.path.abspath(model_name))
    return model_name.replace("/", "--")


def default_model(args: argparse.Namespace) -> None:
    """Fills in --model where it is missing, and prints which model that is and why."""
    if args.model:
        return
    if torch.cuda.is_available():
        args.model, reason = "Qwen/Qwen2.5-0.5B-Instruct", "this machine has a GPU"
    else:
        args.model, reason = "tiny", "no GPU here, so the built-in one"
    print(f"model {args.model}: {reason} (choose with --model)")


def check_numbers(args: argparse.Namespace, positive: list[str]) -> None:
    """Raises Transformer2Error for a number below 0, or below 1 if its name is in `positive`."""
    check_seed(args.seed or 0)
    for name, value in vars(args).items():
        least = 1 if name in positive else 0
        # The share of --layers has a check of its own. nan is not >= anything.
        if isinstance(value, int | float) and name != "layers" and not least <= value < math.inf:
            flag = f"--{name.replace('_', '-')} {value}"
            raise Transformer2Error(f"{flag} is out of range: it must be at least {least}")


def guarded(main: Callable[[], None]) -> None:
    """Runs a command line. What its user can put right is one sentence and exit code 2."""
    try:
        main()
        return
    except (Transformer2Error, OSError) as error:
        message, code = f"error: {error}", 2
    except torch.OutOfMemoryError:
        message, code = "error: the GPU's memory is full: take a smaller model", 2
    except KeyboardInterrupt:
        way_on = "train_expert.py with --resume, claims.py with the same --out"
        message, code = f"\nstopped; these go on from what is done: {way_on}", 130
    print(message, file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    guarded(main)
