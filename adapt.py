"""
Answers in two passes: pass 1 finds out which expert a prompt needs, pass 2 answers with it.

    python adapt.py                                 # right after `python train_expert.py`: the whole paper at work
    python adapt.py --model tiny-vlm                # a few held-out pictures, and what each expert says of them
    python adapt.py --model DIR "a prompt" ...      # your own prompts, with the experts in experts/<model>
"""
import argparse
import time
from pathlib import Path

import numpy as np
from safetensors import safe_open

from train_expert import (CACHE, TASKS, TINY_UNSEEN, default_model, folder_name, get_task, guarded, load_model, say)
from transformer2 import (Transformer2Error, apply_svf, classify, evaluate, few_shot, generate, load_expert, two_pass)

def read_experts(folder, model_name):
    """{file stem: header} of a folder of experts. Raises Transformer2Error where it is empty or its targets differ."""
    headers = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as f:
                headers[path.stem] = f.metadata() or {}
        except Exception as error:
            raise Transformer2Error(f"cannot read the expert {path}: {error}")
    if not headers:
        raise Transformer2Error(f"no experts in {folder}: train some with python train_expert.py --model {model_name}")
    if len(targets := {about.get("targets", "mlp") for about in headers.values()}) > 1:
        raise Transformer2Error(f"the experts in {folder} have different targets ({', '.join(sorted(targets))}): keep "
                                "those of one kind there, and move the others")
    return headers

def confusion(title, categories, truth, chosen):
    """Prints counts, one row per true category, one column per chosen one."""
    right = np.mean([t == c for t, c in zip(truth, chosen)])
    print(f"\n{title}: {right:.1%} of {len(truth)} held-out prompts")
    print(" " * 14 + "".join(f"{c:>12}" for c in categories))
    for t in dict.fromkeys(truth):
        print(f"  {t:12}" + "".join(f"{sum(a == t and b == c for a, b in zip(truth, chosen)):12}" for c in categories))

def compare(model, processor, task, experts, by_category, ways, args):
    """Prints a line with test accuracy for the base model, every expert and every strategy on an unseen task."""
    test, score = task.problems("test")[: args.test_problems], {}
    def measure(name, expert):
        clock = time.time()
        score[name] = evaluate(model, processor, task, test, expert=expert)
        print(f"  {name:24} {score[name]:7.1%}  {time.time() - clock:5.1f} s", flush=True)
    trained = "a task of its own expert" if task.name in experts else "a task no expert was trained on"
    print(f"\n{task.name}, {trained}: accuracy on {len(test)} held-out problems")
    measure("base model", None)
    for name, expert in experts.items():
        measure(f"expert {name}", expert)
    conversations = [task.conversation(p) for p in test]
    for strategy, z in ways.items():
        chosen = classify(model, processor, conversations, list(by_category), expert=z)
        measure(strategy, [by_category[c] for c in chosen])
    if "few-shot" in args.strategy:
        shots = task.problems("train")
        shots = np.random.default_rng(args.seed).choice(shots, min(args.shots, len(shots)), replace=False).tolist()
        for name, per_layer in (("few-shot", True), ("few-shot, one α each", False)):
            clock = time.time()
            z, alphas = few_shot(model, processor, task, shots, experts, per_layer=per_layer, seed=args.seed,
                                 population=args.population, iterations=args.iterations)
            note = "" if per_layer else "  α " + ", ".join(f"{n} {a:+.2f}" for n, a in zip(experts, alphas[:, 0]))
            print(f"  (cross-entropy search on {len(shots)} problems: {time.time() - clock:.1f} s{note})")
            measure(name, z)

def look(model, processor, task, experts):
    """Prints what the base model and every expert say of a few held-out pictures."""
    problems = task.problems("test")[:6]
    say = lambda expert: generate(model, processor, [task.conversation(p) for p in problems], expert=expert,
                                  prefill=task.prefill, max_new_tokens=task.max_new_tokens)
    said = {name: say(expert) for name, expert in {"base": None, **experts}.items()}
    for i, p in enumerate(problems):
        print(f"\n{'picture':12}{p.get('image', 'none')}\n{'question':12}{p['question']} (truth: {p['answer']})")
        for name, texts in said.items():
            right = task.reward(texts[i], p) > 0
            print(f"{name:12}{texts[i].strip()}  {'(right)' if right else '(wrong)'}")

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="*", help="answer these (not right after --task); without any, show tables")
    parser.add_argument("--model", help="hub id, folder, 'tiny' or 'tiny-vlm'")
    parser.add_argument("--experts", type=Path, help="default: experts/<model>")
    parser.add_argument("--task", nargs="+", default=[], metavar="UNSEEN", help=", ".join(TASKS))
    parser.add_argument("--strategy", nargs="+", default=["prompt", "classifier", "few-shot"],
                        choices=["prompt", "classifier", "few-shot"])
    parser.add_argument("--shots", type=int, default=10, help="problems that few-shot adaptation may look at")
    parser.add_argument("--population", type=int, default=32, help="candidates in an iteration of few-shot adaptation")
    parser.add_argument("--iterations", type=int, default=20, help="of few-shot adaptation")
    parser.add_argument("--test-problems", type=int, help="score on so many of the held-out problems; default: all")
    parser.add_argument("--max-new-tokens", type=int, help="of an answer; default: the task's own, 150 to a prompt")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    default_model(args)
    tasks = [get_task(t) for t in args.task or (TINY_UNSEEN if args.model == "tiny" and not args.prompts else [])]
    for task in tasks:
        task.max_new_tokens = args.max_new_tokens or task.max_new_tokens
    folder = args.experts or Path("experts") / folder_name(args.model)
    headers = read_experts(folder, args.model)
    model, processor = load_model(args.model)
    apply_svf(model, next(iter(headers.values())).get("targets", "mlp"), CACHE / "svd")
    loaded = {stem: load_expert(folder / f"{stem}.safetensors", model) for stem in headers}
    for stem, about in headers.items():
        if about.get("model", args.model) != args.model:
            print(f"note: expert {stem} was trained on {about['model']}")
    classifier = next((e for stem, e in loaded.items() if stem.endswith("classify")), None)
    experts = {stem: e for stem, e in loaded.items() if not stem.endswith("classify")}
    dispatch = get_task("tiny-classify" if args.model == "tiny" else "classify")
    by_category = dict.fromkeys(dispatch.choices)  # a category without an expert is answered by the base weights
    for stem, expert in experts.items():
        category = headers[stem].get("category") or stem
        if by_category.get(category):
            print(f"note: expert {stem} takes the place of another one for prompts of the category {category}")
        by_category[category] = expert
    categories = list(by_category)
    ways = {"prompt": None} | ({"classifier": classifier} if classifier else {})  # strategy -> the expert of pass 1
    ways = {strategy: z for strategy, z in ways.items() if strategy in args.strategy}
    print(f"{args.model}: experts {', '.join(experts) or 'none'}; classifier: {'yes' if classifier else 'no'}")

    prompts, truth = args.prompts, None
    sees = hasattr(processor, "image_processor")
    if not prompts and sees:  # pass 1 tells text prompts apart; here the pictures are the point
        for task in tasks or [get_task(stem) for stem in experts if stem in TASKS]:
            look(model, processor, task, experts)
    elif not prompts and not args.task:
        problems = dispatch.problems("test")
        conversations, truth = [say(p) for p in problems], [p["answer"] for p in problems]
        for strategy, z in ways.items():
            chosen = classify(model, processor, conversations, categories, expert=z)
            confusion(f"dispatch by {strategy}", categories, truth, chosen)
        spread = np.linspace(0, len(problems) - 1, 6).astype(int)  # a few of every kind
        prompts, truth = [problems[i]["question"] for i in spread], [truth[i] for i in spread]
    for task in tasks:
        if experts:
            compare(model, processor, task, experts, by_category, ways, args)
    if not prompts:
        return
    conversations, how = [say({"question": p}) for p in prompts], dict(max_new_tokens=args.max_new_tokens or 150)
    before = generate(model, processor, conversations, **how)
    after = two_pass(model, processor, conversations, by_category, classifier=ways.get("classifier"), **how)
    for i, (prompt, base, (category, answer)) in enumerate(zip(prompts, before, after)):
        print(f"\nprompt    {prompt}\ncategory  {category}{f' (truth: {truth[i]})' if truth else ''}"
              f"\nbase      {base.strip()}")
        print(f"answer    {answer.strip() if by_category[category] else 'the same: no expert for this category'}")

if __name__ == "__main__":
    guarded(main)
