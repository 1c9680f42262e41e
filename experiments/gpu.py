"""What one GPU does: the speed of rollouts, and the time and the memory of training steps.

    python experiments/gpu.py --json FILE                   # all shapes
    python experiments/gpu.py --only Qwen2.5-0.5B

The models have the shapes of real ones and random weights in bfloat16, so no hub is needed. Prompts
have 200 tokens, and no answer ends before its limit. MLP targets, with the KL.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).parents[1]))  # where the modules below are

import train_expert
import transformer2 as t2
from experiments.curves import write_text
from experiments.speed import about_this_run, random_experts
from experiments.steps import SHAPES
from tasks.tiny import tiny_tokenizer

PROMPT_LENGTH = 200  # tokens
COMPARED_ROWS, COMPARED_TOKENS = 64, 64  # where ways to generate are compared
TOKENIZER = tiny_tokenizer(["0123456789"])


def main() -> None:
    args = read_arguments()
    if not torch.cuda.is_available():
        raise t2.Transformer2Error("this machine has no GPU: there is nothing to measure")
    rows = []
    for name in args.only or SHAPES:
        print(f"\n{name}", flush=True)
        rows.append({"model": name, **measure_generation(SHAPES[name])})
        rows[-1] |= measure_step(SHAPES[name], args.step_rows, args.step_tokens)
        if args.json:  # after each model, so that nothing is lost
            about = {**about_this_run(), "step_rows": args.step_rows}
            about["step_tokens"] = args.step_tokens
            content = {"about": about, "rows": rows}
            write_text(json.dumps(content, indent=1) + "\n", args.json)


def read_arguments() -> argparse.Namespace:
    parser = train_expert.Parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=SHAPES, help="shapes; default: all")
    parser.add_argument("--step-rows", type=int, default=256, help="problems of a training step")
    parser.add_argument("--step-tokens", type=int, default=512, help="of each of its answers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    return parser.parse_args()


def random_model(config: LlamaConfig, factored: bool) -> nn.Module:
    """A model with random weights, or with random factors, as decomposing takes minutes."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        if factored:
            t2.apply_svf(model)
    model.to_empty(device="cuda")
    for tensor in [*model.parameters(), *model.buffers()]:
        nn.init.normal_(tensor.data, std=0.02)
    for layer in t2.svf_layers(model).values():
        nn.init.ones_(layer.z.data)
    # Its buffers are computed, not read.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to("cuda")
    model.generation_config.eos_token_id = 2**40  # there is no such token: no answer ends
    return model.eval()


def seconds(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start_time = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start_time


def peak_gib() -> float:
    """The most memory that was taken since the last call."""
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return peak


def show(figures: dict[str, float]) -> dict[str, float]:
    for name, value in figures.items():
        print(f"  {value:10.2f}  {name}", flush=True)
    return figures


def prompts(count: int) -> list[str]:
    """Each is a number of 200 digits; a token is a digit."""
    return [f"{row:0{PROMPT_LENGTH}}" for row in range(count)]


def measure_generation(config: LlamaConfig) -> dict[str, float]:
    """Tokens per second of plain transformers and of our ways to generate."""
    texts = prompts(COMPARED_ROWS)

    def plain() -> None:
        inputs = t2.encode(model, TOKENIZER, texts)
        options = {"max_new_tokens": COMPARED_TOKENS, "pad_token_id": 0, "do_sample": True}
        model.generate(**inputs, top_k=0, **options)

    def ours(expert: t2.Experts, temperature: float) -> Callable[[], None]:
        def run() -> None:
            options = {"max_new_tokens": COMPARED_TOKENS, "temperature": temperature, "seed": 0}
            t2.generate(model, TOKENIZER, texts, expert=expert, **options)

        return run

    figures = {}

    def measure(name: str, run: Callable[[], None]) -> None:
        run()  # warms up
        speed = COMPARED_ROWS * COMPARED_TOKENS / seconds(run)
        figures.update(show({f"tokens/s, {name}": speed}))

    model = random_model(config, factored=False)
    measure("plain transformers, sampled", plain)
    model = None
    gc.collect()
    model = random_model(config, factored=True)
    experts = random_experts(model)
    mixed = [experts[row % 3] for row in range(COMPARED_ROWS)]
    measure("one expert, sampled", ours(experts[0], 1.0))
    measure("one expert, greedy and folded", ours(experts[0], 0.0))
    measure("three experts, mixed", ours(mixed, 1.0))
    return figures


def measure_step(config: LlamaConfig, rows: int, new_tokens: int) -> dict[str, float]:
    """Time and peak memory of the three parts of a training step."""
    gc.collect()
    torch.cuda.empty_cache()
    model = random_model(config, factored=True)
    problems = [{"question": text} for text in prompts(rows)]

    def reward(text: str, problem: dict) -> float:
        return 1.0 if len(text) % 2 else -1.0

    task = t2.Task("numbers", list, lambda p: p["question"], reward, max_new_tokens=new_tokens)
    hp = t2.Hyperparameters(kl_coef=0.1, lr=1e-3)
    progress = t2.Progress(model, task, hp)
    expert = t2.get_expert(model)
    answers = []

    def rollout() -> None:
        sampled = t2.rollout(model, TOKENIZER, task, problems, expert, temperature=1.0, seed=0)
        answers.extend([answer] for answer in sampled)

    def gradient() -> None:
        t2.set_gradient(model, TOKENIZER, task, problems, answers, hp)

    figures = {"GiB of weights": torch.cuda.memory_allocated() / 2**30}
    peak_gib()
    figures["s, rollout"] = seconds(rollout)
    figures["GiB, peak of the rollout"] = peak_gib()
    figures["s, log-probabilities and gradient"] = seconds(gradient)
    figures["GiB, peak of the gradient"] = peak_gib()
    figures["s, optimizer"] = seconds(lambda: t2.descend(progress, t2.StepStats(1), hp))
    total = sum(value for name, value in figures.items() if name.startswith("s, "))
    figures["s, step"] = total
    for kind, tokens in vars(model).get("fitting_tokens", {}).items():
        figures[f"tokens of a batch that fitted, {kind}"] = tokens
    figures["tokens/s of the rollout"] = rows * new_tokens / figures["s, rollout"]
    return show(figures)


if __name__ == "__main__":
    train_expert.guarded(main)
