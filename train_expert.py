"""
Trains experts: a model and a task go in, a file with one z per weight matrix comes out.

    python train_expert.py                                              # on a CPU: the built-in tiny model, all of it
    python train_expert.py --model Qwen/Qwen2.5-0.5B-Instruct --task gsm8k

Below: the tasks, the built-in tiny model, the command line. The method itself is in transformer2.py.
"""
import argparse
import inspect
import os
import random
import re
import resource
import sys
import time
import zlib
from functools import lru_cache, partial
from pathlib import Path

import huggingface_hub
import torch
import transformers
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from transformer2 import (CATEGORY_PREFILL, Task, Transformer2Error, apply_svf, category_question, evaluate,
                          reinforce, save_expert, svf_layers)

CACHE = Path(".cache/transformer2")

# ----------------------------------------------------------------------------------------------------------------------
# The tiny model's world: skills whose every question is answered right 40 % of the time and, the rest, sloppily in a
# fixed way. Pretraining teaches both; the sloppy habit wins; an expert brings the skill out.

RIGHT = 0.4
ALPHABET = "ABCDEFGHIJKL"

def add_without_carry(a, b):
    return f"{a // 10 + b // 10}{(a + b) % 10}"

def skill(name, rng):
    """One question of a skill, with its right and its sloppy answer."""
    word = "".join(rng.sample(ALPHABET, 4))
    a, b, c = (rng.randrange(10, 100) for _ in range(3))
    match name:
        case "addition":
            return f"What is {a} plus {b}?", str(a + b), add_without_carry(a, b)
        case "reversal":
            return f"Reverse {word}.", word[::-1], word
        case "largest":
            return f"What is the largest of {a}, {b} and {c}?", str(max(a, b, c)), str(a)
        case "smallest":
            return f"What is the smallest of {a}, {b} and {c}?", str(min(a, b, c)), str(a)
        case "last-letter":
            return f"What is the last letter of {word}?", word[-1], word[0]
        case "greeting":
            return f"Say hello to {word}.", f"Hello {word}", f"Hello {word}"

TINY_CATEGORY = {"addition": "arithmetic", "reversal": "letters", "largest": "comparison", "greeting": "other",
                 "last-letter": "letters", "smallest": "comparison"}
TINY_MIX = ["addition"] * 2 + list(TINY_CATEGORY)  # addition takes the longest to learn
TINY_CATEGORIES = ["arithmetic", "letters", "comparison", "other"]
SLOPPY_CATEGORY = {"letters": "other", "comparison": "arithmetic"}  # by the looks: numbers are arithmetic

def tiny_problem(name, rng):
    question, right, sloppy = skill(name, rng)
    return {"question": question, "answer": right, "sloppy": sloppy, "skill": name}

def split_of(question):
    """Eight tenths of all questions are for training, one for validation, one for test: the base model's pretraining
    sees only the first kind as well."""
    return ["validation", "test"][h - 8] if (h := zlib.crc32(question.encode()) % 10) > 7 else "train"

@lru_cache(maxsize=None)
def tiny_problems(names, split, count={"train": 4096, "validation": 256, "test": 1024}):
    rng = random.Random(f"{names} {split}")
    made = (tiny_problem(names[i % len(names)], rng) for i in range(10 ** 9))
    kept = (p for p in made if split_of(p["question"]) == split)
    return [next(kept) for _ in range(count[split])]

def say(problem):
    return [{"role": "user", "content": problem["question"]}]

def exact(completion, problem):
    return 1.0 if completion.strip() == problem["answer"] else -1.0

TINY_HYPER = dict(steps=100, batch_size=256, lr=1e-2)

def tiny_task(name):
    return Task(name, lambda split: tiny_problems((name,), split), say, exact, max_new_tokens=8,
                category=TINY_CATEGORY[name], hyper=TINY_HYPER)

def tiny_classify():
    def problems(split):
        return [{**p, "answer": TINY_CATEGORY[p["skill"]]}
                for p in tiny_problems(("addition", "reversal", "largest", "greeting"), split)]
    return Task("tiny-classify", problems, lambda p: category_question(say(p), TINY_CATEGORIES), exact,
                prefill=CATEGORY_PREFILL, choices=TINY_CATEGORIES, hyper=dict(steps=60, batch_size=64, lr=1e-2))

def tiny_tokenizer(texts):
    """Words are tokens with the space before them, digits and capital letters are tokens of their own."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    pattern = r"<\w+>| ?[A-Z]?[a-z]+|[\s\S]"
    words = dict.fromkeys(w for t in texts for w in re.findall(pattern, t))
    vocab = {w: i for i, w in enumerate(dict.fromkeys(["<pad>", "<user>", "<assistant>", "<end>", "<unk>", *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
        chat_template="{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
                      "{% if add_generation_prompt %}<assistant>{% endif %}")

def tiny_corpus(n, rng, classify=False):
    """n conversations for the base model's pretraining, each (prompt text, completion text)."""
    rows = []
    while len(rows) < n:
        p = tiny_problem(rng.choice(TINY_MIX), rng)
        if split_of(p["question"]) != "train":
            continue
        right = rng.random() < RIGHT
        if classify:
            prompt, category = category_question(say(p), TINY_CATEGORIES)[0]["content"], TINY_CATEGORY[p["skill"]]
            completion = f"{CATEGORY_PREFILL} {category if right else SLOPPY_CATEGORY.get(category, category)}"
        else:
            prompt, completion = p["question"], p["answer"] if right else p["sloppy"]
        rows.append((f"<user>{prompt}<end><assistant>", f"{completion}<end>"))
    return rows

def pretrain_tiny(steps=1300, batch_size=128, lr=2e-3, seed=0):
    """The built-in base model: a Llama of 0.8 M parameters, pretrained from scratch on the corpus above."""
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(seed)
    rng = random.Random(seed)
    sample = tiny_corpus(2000, random.Random(1)) + tiny_corpus(100, random.Random(1), classify=True)
    tokenizer = tiny_tokenizer(["".join(r) for r in sample] + ["0123456789" + ALPHABET])
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.08, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None, pad_token_id=tokenizer.pad_token_id))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    bar = tqdm(range(steps), desc="pretraining the tiny base model", mininterval=1)
    for step in bar:
        classify = step % 8 == 7  # these prompts are long, so they get batches of their own
        rows = tiny_corpus(batch_size // 4 if classify else batch_size, rng, classify)
        prompts, ends = (tokenizer([r[i] for r in rows])["input_ids"] for i in (0, 1))
        T = max(len(p) + len(e) for p, e in zip(prompts, ends))
        ids = torch.tensor([p + e + [0] * (T - len(p) - len(e)) for p, e in zip(prompts, ends)])
        labels = torch.tensor([[-100] * len(p) + e + [-100] * (T - len(p) - len(e)) for p, e in zip(prompts, ends)])
        loss = model(input_ids=ids, labels=labels).loss  # padding on the right of a causal model needs no mask
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 100, (steps - step) / (0.4 * steps))
        optimizer.step()
        optimizer.zero_grad()
        if not classify:
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval(), tokenizer

# ----------------------------------------------------------------------------------------------------------------------
# Real tasks. Even training rows train and odd ones validate, as in the authors' code.

def rows_of(path, config, columns, split):
    """The dataset's rows of a split, as dicts; a Transformer2Error where it cannot be had."""
    try:
        from datasets import load_dataset, logging
        logging.set_verbosity_error()
        rows = load_dataset(path, config, split="test" if split == "test" else "train")
    except Exception as error:  # the hub client's errors have no class in common
        raise Transformer2Error(f"dataset {path} cannot be loaded ({type(error).__name__}): go online once, or set "
                                "HF_HUB_OFFLINE=1 and HF_DATASETS_CACHE to a copy of its cache")
    if missing := set(columns.split()) - set(rows.column_names):
        raise Transformer2Error(f"dataset {path} has no column {missing.pop()!r}: delete its cache and load it again")
    return [dict(row) for i, row in enumerate(rows) if split == "test" or i % 2 == (split == "validation")]

NUMBER = r"-?\d[\d,]*(?:\.\d+)?"

def numeric_answer(text):
    """The number behind the last "####", "answer is" or \\boxed{, else the last number; NaN, equal to nothing, if none."""
    stated = re.split(r"####|\\boxed\{|answer is", text.replace("$", ""))
    numbers = re.findall(NUMBER, stated[-1])[: 1 if len(stated) > 1 else None] or re.findall(NUMBER, text)
    return float(numbers[-1].replace(",", "")) if numbers else float("nan")

def gsm8k():
    def problems(split):
        return [{**row, "solution": re.sub(r"<<.*?>>", "", row["answer"]), "answer": row["answer"].split("####")[-1]}
                for row in rows_of("openai/gsm8k", "main", "question answer", split)]
    return Task("gsm8k", problems, say, lambda completion, problem:
                1.0 if numeric_answer(completion) == numeric_answer(problem["answer"]) else -1.0,
                max_new_tokens=512, category="math")

CATEGORIES = ["reasoning", "math", "code", "other"]  # the paper's; no training question is "other"

def real_classify():
    sources = [("openai/gsm8k", "main", "question", "math"), ("google-research-datasets/mbpp", "full", "text", "code"),
               ("allenai/ai2_arc", "ARC-Easy", "question", "reasoning")]
    def problems(split):
        count = {"train": 150, "validation": 16, "test": 32}[split]  # of each kind
        return [{"question": row[column], "answer": category} for path, config, column, category in sources
                for row in rows_of(path, config, column, split)[:count]]
    return Task("classify", problems, lambda p: category_question(say(p), CATEGORIES), exact, prefill=CATEGORY_PREFILL,
                choices=CATEGORIES, hyper=dict(steps=20, batch_size=24, lr=4e-3))

TASKS = {name: partial(tiny_task, name) for name in TINY_CATEGORY} | {
    "tiny-classify": tiny_classify, "gsm8k": gsm8k, "classify": real_classify}
TINY_EXPERTS = ["addition", "reversal", "largest", "tiny-classify"]
TINY_UNSEEN = ["smallest", "last-letter"]

def get_task(name):
    """The Task of that name. Raises Transformer2Error for an unknown one."""
    if name not in TASKS:
        raise Transformer2Error(f"unknown task {name!r}: take one of {', '.join(TASKS)}")
    return TASKS[name]()

# ----------------------------------------------------------------------------------------------------------------------
# Models and the command line

def load_model(name, device=None):
    """(model, processor) of a hub id, a local folder or "tiny"; bfloat16 on a GPU, float32 on a CPU."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    huggingface_hub.utils.logging.set_verbosity_error()  # its retries are not worth a line each
    transformers.utils.logging.disable_progress_bar()
    if name == "tiny":
        made_by = "".join(map(inspect.getsource, (skill, tiny_corpus, tiny_tokenizer, pretrain_tiny)))
        name = CACHE / f"tiny-{zlib.crc32(made_by.encode()):08x}"  # another recipe, another folder
        if not name.exists():
            tmp = Path(f"{name}.{os.getpid()}")
            for part in pretrain_tiny():
                part.save_pretrained(tmp)
            os.replace(tmp, name)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    try:
        sees = hasattr(AutoConfig.from_pretrained(name), "vision_config")
        processor = (AutoProcessor if sees else AutoTokenizer).from_pretrained(name)
        model = (AutoModelForImageTextToText if sees else AutoModelForCausalLM).from_pretrained(name, dtype=dtype)
    except (OSError, ValueError) as error:
        raise Transformer2Error(f"model {str(name)!r} is neither 'tiny' nor a folder with a model nor to be had from "
                                f"the hub: {str(error).splitlines()[0]}")
    return model.to(device).eval(), processor

def default_model(args):
    """Fills in --model and --task, and says on the first line which and why."""
    if args.model:
        return
    cuda = torch.cuda.is_available()
    args.model = "Qwen/Qwen2.5-0.5B-Instruct" if cuda else "tiny"
    print(f"model {args.model}: {'this machine has a GPU' if cuda else 'no GPU here, so the built-in one'} "
          "(choose with --model)")

def folder_name(model):
    return Path(model).name if Path(model).exists() else model.replace("/", "--")

def guarded(main):
    """Runs a command line: what the user can put right is one sentence and exit code 2, not a traceback."""
    try:
        main()
    except Transformer2Error as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
    except KeyboardInterrupt:
        sys.exit(print("\nstopped; train_expert.py goes on from the last step with --resume", file=sys.stderr) or 130)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id, folder or 'tiny'")
    parser.add_argument("--task", nargs="+", metavar="T", help=", ".join(TASKS))
    parser.add_argument("--targets", default="mlp", help="mlp, attention, all, or a regular expression over layer names")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--kl", type=float, dest="kl_coef")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--out", type=Path, default=Path("experts"), help="experts land in OUT/<model>/<task>.safetensors")
    parser.add_argument("--resume", action="store_true", help="go on where an interrupted run of the same command was")
    args = parser.parse_args()
    default_model(args)
    tasks = [get_task(t) for t in args.task or (TINY_EXPERTS if args.model == "tiny" else ["gsm8k"])]
    given = {k: v for k in ("steps", "batch_size", "lr", "kl_coef", "seed") if (v := getattr(args, k)) is not None}
    model, processor = load_model(args.model)
    parameters, clock = sum(p.numel() for p in model.parameters()), time.time()
    apply_svf(model, args.targets, CACHE / "svd")
    z = sum(layer.z.numel() for layer in svf_layers(model).values())
    print(f"{args.model}: {parameters:,} parameters; {len(svf_layers(model))} matrices decomposed in "
          f"{time.time() - clock:.1f} s; z has {z:,} numbers ({z / parameters:.2%})")
    summary = []
    for task in tasks:
        path, clock = args.out / folder_name(args.model) / f"{task.name}.safetensors", time.time()
        test = task.problems("test")
        state = path.with_suffix(".state")
        if not args.resume:
            state.unlink(missing_ok=True)
        print(f"\n{task.name}: the base model answers {len(test)} held-out problems")
        base = evaluate(model, processor, task, test)
        expert = reinforce(model, processor, task, checkpoint=state, **{**task.hyper, **given})
        accuracy = evaluate(model, processor, task, test, expert=expert)
        save_expert(expert, path, task=task.name, category=task.category or "", model=args.model, targets=args.targets,
                    base=f"{base:.4f}", accuracy=f"{accuracy:.4f}", problems=len(test), **{**task.hyper, **given})
        state.unlink(missing_ok=True)
        summary.append(f"{task.name:15} {base:7.1%} -> {accuracy:6.1%} {len(test):7} problems {path.stat().st_size:9,} B "
                       f"{time.time() - clock:6.0f} s  {path}")
        print(summary[-1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)
    print("\n" + "\n".join(["held-out accuracy, base -> expert", *summary]))
    print(f"z: {z:,} numbers, {z / parameters:.2%} of the model; peak memory {peak:.2f} GiB"
          + (f", on the GPU {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB" if torch.cuda.is_available() else ""))

if __name__ == "__main__":
    guarded(main)
