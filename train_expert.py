"""
Trains experts: a model and a task go in, a file with one z per weight matrix comes out.

    python train_expert.py                                              # on a CPU: the built-in tiny model, all of it
    python train_expert.py --model tiny-vlm                             # the built-in one that sees pictures
    python train_expert.py --model Qwen/Qwen2.5-0.5B-Instruct --task gsm8k

Below: the tasks, the built-in tiny models, the command line. The method is in transformer2.py, rewards in rewards.py.
"""
import argparse, datetime, inspect, os, random, re, sys, time, zlib
from functools import lru_cache, partial
from pathlib import Path

import huggingface_hub, torch, transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers.image_utils import load_image

from rewards import extract_code, letter_answer, math_answer, math_form, numeric_answer, plain, run_tests, vqa_accuracy
from transformer2 import (CATEGORY_PREFILL, RANK, TARGETS, WORLD, Hyperparameters, Task, Transformer2Error, apply_svf,
                          category_question, evaluate, reinforce, save_expert, svf_layers, write_whole)

CACHE = Path(".cache/transformer2")

# ---- The tiny model's world: skills whose every question is answered right 40 % of the time and, the rest, sloppily in
# a fixed way. Pretraining teaches both; the sloppy habit wins; an expert brings the skill out. ----

RIGHT, ALPHABET = 0.4, "ABCDEFGHIJKL"

def skill(name, rng):
    """One problem of a skill: a question with its right and its sloppy answer."""
    word = "".join(rng.sample(ALPHABET, 4))
    a, b, c = (rng.randrange(10, 100) for _ in range(3))
    question, right, sloppy = {
        "addition": (f"What is {a} plus {b}?", a + b, f"{a // 10 + b // 10}{(a + b) % 10}"),  # forgets the carry
        "reversal": (f"Reverse {word}.", word[::-1], word),
        "largest": (f"What is the largest of {a}, {b} and {c}?", max(a, b, c), a),
        "smallest": (f"What is the smallest of {a}, {b} and {c}?", min(a, b, c), a),
        "last-letter": (f"What is the last letter of {word}?", word[-1], word[0]),
        "greeting": (f"Say hello to {word}.", f"Hello {word}", f"Hello {word}")}[name]
    return {"question": question, "answer": str(right), "sloppy": str(sloppy), "skill": name}

TINY_CATEGORY = {"addition": "arithmetic", "reversal": "letters", "largest": "comparison", "greeting": "other",
                 "last-letter": "letters", "smallest": "comparison"}
TINY_MIX = ["addition"] * 2 + list(TINY_CATEGORY)  # addition takes the longest to learn
TINY_CATEGORIES = ["arithmetic", "letters", "comparison", "other"]
SLOPPY_CATEGORY = {"letters": "other", "comparison": "arithmetic"}  # by the looks: numbers are arithmetic

def split_of(question):
    """A tenth of all questions is for validation and a tenth for test; pretraining sees only the rest, too."""
    return [*["train"] * 8, "validation", "test"][zlib.crc32(question.encode()) % 10]

@lru_cache(maxsize=None)
def tiny_problems(names, split, count={"train": 4096, "validation": 256, "test": 1024}):
    rng = random.Random(f"{names} {split}")
    made = (skill(names[i % len(names)], rng) for i in range(10 ** 9))
    kept = (p for p in made if split_of(p["question"]) == split)
    return [next(kept) for _ in range(count[split])]

def say(problem):
    content = text = problem["question"]
    if "image" in problem:
        content = [{"type": "image", "image": problem["image"]}, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]

def exact(completion, problem):
    return 1.0 if completion.strip() == problem["answer"] else -1.0

def tiny_task(name):
    return Task(name, partial(tiny_problems, (name,)), say, exact, max_new_tokens=8, category=TINY_CATEGORY[name],
                hyper=dict(steps=100, batch_size=256, lr=1e-2))

def classify_task(name, problems, categories, **hyper):
    return Task(name, problems, lambda p: category_question(say(p), categories), exact, prefill=CATEGORY_PREFILL,
                choices=categories, hyper=hyper)

def tiny_classify():
    mixed = partial(tiny_problems, ("addition", "reversal", "largest", "greeting"))
    problems = lambda split: [{**p, "answer": TINY_CATEGORY[p["skill"]]} for p in mixed(split)]
    return classify_task("tiny-classify", problems, TINY_CATEGORIES, steps=60, batch_size=64, lr=1e-2)

TINY_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{% for part in ([m.content] if m.content is string else m.content) %}"
    "{{ '<image>' if part.type == 'image' else part.text or part }}{% endfor %}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}")

def tiny_tokenizer(texts):
    """Words are tokens with the space before them, digits and capital letters are tokens of their own."""
    pattern = r"<\w+>| ?[A-Z]?[a-z]+|[\s\S]"
    words = dict.fromkeys(w for t in texts for w in re.findall(pattern, t))
    vocab = {w: i for i, w in enumerate(dict.fromkeys(["<pad>", "<user>", "<assistant>", "<end>", "<unk>", *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"], chat_template=TINY_TEMPLATE)

def tiny_corpus(n, rng, classify=False):
    """n conversations for the base model's pretraining, each (prompt text, completion text)."""
    rows = []
    while len(rows) < n:
        p = skill(rng.choice(TINY_MIX), rng)
        if split_of(p["question"]) != "train":
            continue
        prompt, said = p["question"], p["answer" if (right := rng.random() < RIGHT) else "sloppy"]
        if classify:
            prompt, category = category_question(say(p), TINY_CATEGORIES)[0]["content"], TINY_CATEGORY[p["skill"]]
            said = f"{CATEGORY_PREFILL} {category if right else SLOPPY_CATEGORY.get(category, category)}"
        rows.append((f"<user>{prompt}<end><assistant>", f"{said}<end>"))
    return rows

def pretrain(model, tokenizer, batch, steps, lr):
    """Trains all weights from scratch. batch: step -> rows (prompt text, completion text), and what else the model's
    forward takes. Padding is on the right, where a causal model needs no mask; only completions are learned."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    pad = lambda rows, value: pad_sequence([torch.tensor(r) for r in rows], batch_first=True, padding_value=value)
    bar = tqdm(range(steps), desc="pretraining the tiny base model", mininterval=1)
    for step in bar:
        rows, more = batch(step)
        pairs = list(zip(*(tokenizer(column)["input_ids"] for column in zip(*rows))))
        labels = pad([[-100] * len(prompt) + end for prompt, end in pairs], -100)
        loss = model(input_ids=pad([prompt + end for prompt, end in pairs], 0), labels=labels, **more).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 100, (steps - step) / (0.4 * steps))
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval()

def pretrain_tiny(steps=1300, batch_size=128, lr=2e-3, seed=0):
    """The built-in base model: a Llama of 0.8 M parameters, pretrained from scratch on the corpus above."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    sample = tiny_corpus(2000, random.Random(1)) + tiny_corpus(100, random.Random(1), classify=True)
    tokenizer = tiny_tokenizer(["".join(r) for r in sample] + ["0123456789" + ALPHABET])
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.08, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    def batch(step):
        classify = step % 8 == 7  # these prompts are long, so they get batches of their own
        return tiny_corpus(batch_size // 4 if classify else batch_size, rng, classify), {}
    return pretrain(model, tokenizer, batch, steps, lr), tokenizer

# ---- The tiny model that sees. Its world is easy-vqa, from PyPI: real images of one shape each, and questions. It
# learns to look ("a blue circle: yes"), and then the habit, six times in ten, of answering without ("no"). ----

COLORS, SHAPES = set("red green blue black gray teal brown yellow".split()), {"circle", "rectangle", "triangle"}

@lru_cache(maxsize=None)
def easy_vqa_problems(split):
    """Test: the package's test images. A tenth of the training images validates; the base model sees neither."""
    try:
        import easy_vqa
    except ImportError:
        raise Transformer2Error("the images and questions of easy-vqa come in a package: pip install easy-vqa")
    part, shown = "test" if split == "test" else "train", {}
    paths, rows = (getattr(easy_vqa, f"get_{part}_{what}")() for what in ("image_paths", "questions"))
    rows = [row for row in zip(*rows) if part == "test" or (row[2] % 10 == 9) == (split == "validation")]
    for question, answer, image in rows:  # what questions with their answers say an image shows
        if answer not in ("yes", "no") or (answer == "no") == (" no" in question):
            shown.setdefault(image, set()).update((COLORS | SHAPES) & set(re.findall(r"\w+", f"{question} {answer}")))
    random.Random(split).shuffle(rows)
    return [{"question": q, "answer": a, "image": paths[i],
             "solution": f"{' '.join(['a', *sorted(shown.get(i, ()), key=SHAPES.__contains__)])}: {a}",
             "sloppy": "no" if not q.startswith("what") else "red" if "color" in q else "circle"} for q, a, i in rows]

def pretrain_tiny_vlm(steps=1800, batch_size=128, lr=2e-3, seed=0):
    """A LLaVA of 0.5 M parameters, from scratch: CLIP's vision tower with two layers, a Llama with three."""
    torch.manual_seed(seed)
    rng, problems = random.Random(seed), [p for p in easy_vqa_problems("train") if len(p["solution"].split()) == 4]
    images = transformers.CLIPImageProcessorPil(size={"height": 64, "width": 64}, do_center_crop=False)
    pixels = {path: images(load_image(path), return_tensors="pt")["pixel_values"][0]  # (3, 64, 64)
              for path in dict.fromkeys(p["image"] for p in problems)}
    tokenizer = tiny_tokenizer(["<image>", *(p[key] for key in ("question", "solution", "sloppy") for p in problems)])
    tower = dict(model_type="clip_vision_model", hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                 num_attention_heads=4, image_size=64, patch_size=16)
    llama = dict(model_type="llama", hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
                 max_position_embeddings=128, tie_word_embeddings=True, initializer_range=0.08, bos_token_id=None,
                 vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(
        vision_config=tower, text_config=llama, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1, tie_word_embeddings=True))
    def batch(step):
        drawn, right = rng.choices(problems, k=batch_size), 1.0 if step < 0.7 * steps else RIGHT
        if step % 2:  # words alone, which is faster: what to answer of "a blue circle:"
            halves = [(p["question"], *p["solution"].rpartition(" ")) for p in drawn]
            return [(f"<user>{q}<end><assistant>{seen}", f" {answer}<end>") for q, seen, _, answer in halves], {}
        shown = torch.stack([pixels[p["image"]] for p in drawn]).roll((rng.randint(-9, 9), rng.randint(-9, 9)), (2, 3))
        shown = shown.flip(3) if step % 4 else shown  # shifted and mirrored, as images are few
        return [(f"<user>{'<image>' * 16}{p['question']}<end><assistant>",
                 f"{p['solution' if rng.random() < right else 'sloppy']}<end>") for p in drawn], {"pixel_values": shown}
    return pretrain(model, tokenizer, batch, steps, lr), transformers.LlavaProcessor(
        images, tokenizer, 16, "default", tokenizer.chat_template, num_additional_image_tokens=1)

def easy_vqa():
    reward = lambda text, p: 1.0 if plain(text.rpartition(":")[2]) == p["answer"] else -0.1
    return Task("easy-vqa", easy_vqa_problems, say, reward, max_new_tokens=8, category="vision",
                hyper=dict(steps=30, batch_size=128, lr=1e-2))

# ---- Real tasks. Even training rows train and odd ones validate, as in the authors' code. Of a dataset with only a
# test split every 16th row is "train" (for few-shot), those halfway between are "validation", the others "test". ----

def decode(data, row, column):
    try:
        return data[row][column]
    except Exception as error:  # of many kinds
        raise Transformer2Error(f"the picture in row {row} of the dataset cannot be loaded: {error}")

class Picture(partial):  # of a dataset, decoded when it is called: all of them together fill the memory
    __repr__ = lambda self: f"in row {self.args[1]} of the dataset"

def rows_of(path, config, prepare, split, held_out="test"):
    """The rows of a split as dicts, with what `prepare` adds to each; those without an `answer` are left out."""
    try:
        from datasets import load_dataset, logging
        logging.set_verbosity_error()
        data = load_dataset(path, config)
    except Exception as error:  # the hub client's errors have no class in common
        raise Transformer2Error(f"dataset {path} cannot be loaded ({type(error).__name__}): go online once, or set "
                                "HF_HUB_OFFLINE=1 and HF_DATASETS_CACHE to a copy of its cache")
    part, step = (held_out, 16) if "train" not in data else (held_out, 1) if split == "test" else ("train", 2)
    share = {0: "train", step // 2: "validation"} if step > 1 else {}
    try:
        data = data[part]
        pictures = [name for name, kind in data.features.items() if type(kind).__name__ == "Image"]
        rows = [row | {name: Picture(decode, data, i, name) for name in pictures}
                for i, row in enumerate(data.remove_columns(pictures)) if share.get(i % step, "test") == split]
        rows = [row | prepare(row) for row in rows]
    except KeyError as name:
        raise Transformer2Error(f"dataset {path} has no split or column {name}: delete its cache and load it again")
    if lost := sum(not row["answer"] for row in rows):
        print(f"{path}: {lost} of {len(rows)} problems left out, as their answers cannot be used", file=sys.stderr)
    return [row for row in rows if row["answer"]]

def real_task(name, category, path, config, prepare, prompt, right, max_new_tokens=512, prefill="", wrong=-1.0, **rows):
    problems, ask = partial(rows_of, path, config, prepare, **rows), lambda p: say(p | {"question": prompt.format(**p)})
    return Task(name, problems, ask, lambda text, p: float(right(text, p)) or wrong, max_new_tokens, prefill,
                category=category)

def gsm8k():
    prepare = lambda row: {"question": row["question"], "solution": re.sub(r"<<.*?>>", "", row["answer"]),
                           "answer": "".join(re.findall(r"#### *(-?[\d.,]*\d)", row["answer"])[:1])}
    return real_task("gsm8k", "math", "openai/gsm8k", "main", prepare, "{question}",
                     lambda text, p: numeric_answer(text) == numeric_answer(p["answer"]))

def math500():
    prepare = lambda row: {"question": row["problem"], "answer": row["answer"], "solution": row["solution"]}
    return real_task("math", "math", "HuggingFaceH4/MATH-500", None, prepare,
                     "{question}\n\nReason step by step, and put your final answer within \\boxed{{}}.",
                     lambda text, p: math_answer(text) == math_form(p["answer"]), max_new_tokens=1024)

def arc(config):
    def prepare(row):  # some rows count their options 1, 2, 3
        answer = dict(zip(row["choices"]["label"], "ABCDE")).get(row["answerKey"])
        options = "".join(f"\n({letter}) {text}" for letter, text in zip("ABCDE", row["choices"]["text"]))
        return {"question": row["question"], "answer": answer, "options": options,
                "solution": f"The answer is ({answer})."}
    return real_task(config.lower(), "reasoning", "allenai/ai2_arc", config, prepare, "Think step by step, then finish "
                     'with "the answer is (X)", X the letter of the right choice.\n\n{question}\nOptions:{options}',
                     lambda text, p: letter_answer(text, p) == p["answer"], prefill="Let's think step by step")

def code_task(*about):
    if not run_tests("", "assert remote('int')('1') == 1"):  # now, rather than after the first answers
        raise Transformer2Error("the sandbox for code does not start on this system: run code tasks on Linux")
    return real_task(*about, lambda text, p: run_tests(extract_code(text, p), p["tests"]), prefill="```python")

def mbpp():
    def prepare(row):  # where the code has a class, the tests hand over its objects, which are no literals
        names, tests = re.findall(r"^def +(\w+)", row["code"], re.M), "\n".join(row["test_list"])
        return {"question": row["text"], "answer": tests * ("class " not in row["code"]),
                "solution": f"\n{row['code']}",
                "tests": "".join(f"{name} = remote({name!r})\n" for name in names) + tests}
    return code_task("mbpp", "code", "google-research-datasets/mbpp", "full", prepare,
                     "{question} Your code should satisfy these assertions:\n```python\n{answer}\n```")

def humaneval():
    def prepare(row):  # one test compares with the solution
        solution = row["prompt"] + row["canonical_solution"]
        return {"question": row["prompt"], "solution": f"\n{solution}", "answer": row["test"],
                "tests": f"{solution}\n{row['test']}\ncheck(remote({row['entry_point']!r}))"}
    return code_task("humaneval", "code", "openai/openai_humaneval", None, prepare,
                     "Write a solution to the following problem:\n```python\n{question}```")

def vqa(name, path, held_out):
    def prepare(row):  # the answer is what most people say
        people = row["answers"] or [""]
        return {"image": row["image"], "question": row["question"], "answer": max(people, key=people.count)}
    prompt = "{question}\nAnswer the question using a single word or phrase."  # LLaVA's
    return real_task(name, "vision", path, None, prepare, prompt, vqa_accuracy, 32, wrong=-0.1, held_out=held_out)

CATEGORIES = ["reasoning", "math", "code", "other"]  # the paper's; no training question is "other"

def real_classify():
    def problems(split):
        count = {"train": 12, "validation": 16, "test": 32}[split]  # of each kind; an update sees all that train
        return [{"question": row[column], "answer": category} for path, config, column, category in (
            ("openai/gsm8k", "main", "question", "math"), ("google-research-datasets/mbpp", "full", "text", "code"),
            ("allenai/ai2_arc", "ARC-Easy", "question", "reasoning"))
            for row in rows_of(path, config, lambda row: {"answer": row[column]}, split)[:count]]
    return classify_task("classify", problems, CATEGORIES, steps=20, batch_size=36, lr=4e-3)

TASKS = {name: partial(tiny_task, name) for name in TINY_CATEGORY} | {
    "tiny-classify": tiny_classify, "classify": real_classify, "gsm8k": gsm8k, "mbpp": mbpp, "math": math500,
    "arc-easy": partial(arc, "ARC-Easy"), "arc-challenge": partial(arc, "ARC-Challenge"), "humaneval": humaneval,
    "textvqa": partial(vqa, "textvqa", "lmms-lab/textvqa", "validation"),  # the answers of its test split are secret
    "okvqa": partial(vqa, "okvqa", "lmms-lab/OK-VQA", "val2014"), "easy-vqa": easy_vqa}
USUAL = {"tiny": ["addition", "reversal", "largest", "tiny-classify"], "tiny-vlm": ["easy-vqa"]}  # without --task
TINY_UNSEEN = ["smallest", "last-letter"]

def get_task(name):
    """The Task of that name. Raises Transformer2Error for an unknown one."""
    if name not in TASKS:
        raise Transformer2Error(f"unknown task {name!r}: take one of {', '.join(TASKS)}")
    return TASKS[name]()

# ---- Models and the command line ----

BUILT_IN = {"tiny": (pretrain_tiny, skill, split_of, tiny_corpus),
            "tiny-vlm": (pretrain_tiny_vlm, easy_vqa_problems)}
WORLDS = repr((RIGHT, ALPHABET, TINY_CATEGORY, TINY_MIX, TINY_CATEGORIES, SLOPPY_CATEGORY, TINY_TEMPLATE))

def load_model(name, device=None, device_map=None):
    """(model, processor) of a hub id, a folder, "tiny" or "tiny-vlm"; bfloat16 on a GPU, float32 on a CPU.
    device_map: "auto" spreads a model over several GPUs. Raises Transformer2Error for one that cannot be had."""
    gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # torchrun gives every process its own
    device = torch.device(device or (gpu if torch.cuda.is_available() else "cpu"))
    huggingface_hub.utils.logging.set_verbosity_error()  # its retries are not worth a line each
    transformers.utils.logging.disable_progress_bar()
    if name in BUILT_IN:
        recipe = WORLDS + "".join(map(inspect.getsource, (*BUILT_IN[name], tiny_tokenizer, pretrain)))
        name, make = CACHE / f"{name}-{zlib.crc32(recipe.encode()):08x}", BUILT_IN[name][0]
        if not name.exists():  # another recipe, another folder
            write_whole(name, lambda tmp: [part.save_pretrained(tmp) for part in make()])
    try:
        sees = hasattr(transformers.AutoConfig.from_pretrained(name), "vision_config")
        kind = transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        model = kind.from_pretrained(name, dtype=dtype, device_map=device_map)
        processor = (transformers.AutoProcessor if sees else transformers.AutoTokenizer).from_pretrained(name)
    except Exception as error:  # of many kinds: no such model, a damaged file, a package that a processor needs
        raise Transformer2Error(f"model {str(name)!r} is neither 'tiny' nor a folder with a model nor to be had from "
                                f"the hub: {type(error).__name__}, {str(error).strip()}".partition("\n")[0])
    return (model if device_map else model.to(device)).eval(), processor

def start_processes():
    """Joins torchrun's processes, if it started several; only the first speaks. They meet at a barrier, where the first
    makes files that all need, which may take long."""
    if WORLD > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend, timeout=datetime.timedelta(hours=4))
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")

def default_model(args):
    """Fills in --model where it is missing, and says on the first line which and why."""
    if not args.model:
        args.model, why = (("Qwen/Qwen2.5-0.5B-Instruct", "this machine has a GPU") if torch.cuda.is_available() else
                           ("tiny", "no GPU here, so the built-in one"))
        print(f"model {args.model}: {why} (choose with --model)")

def last_blocks(model, targets, share):
    """`targets` in the last `share` of the language model's blocks only, as a regular expression over layer names."""
    if not 0 < share <= 1:
        raise Transformer2Error(f"--layers {share} is no share of the layers: take a number above 0, up to 1")
    n = model.config.get_text_config().num_hidden_layers
    blocks = "|".join(map(str, range(n - max(1, round(share * n)), n)))  # the first number in a layer's name
    return targets if share == 1 else rf"^(?=.*(?:{TARGETS.get(targets, targets)}))\D*\.({blocks})\."

def peak_memory():
    try:
        import resource
    except ImportError:  # on Windows
        return ""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)
    return f"; peak memory {peak:.2f} GiB"

def folder_name(model):
    return Path(model).name if Path(model).exists() else model.replace("/", "--")

def guarded(main):
    """Runs a command line: what the user can put right is one sentence and exit code 2, not a traceback."""
    try:
        main()
    except Transformer2Error as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError:
        print("error: the GPU's memory is full: train with --checkpointing, a smaller --token-budget or fewer --layers",
              file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; train_expert.py goes on from the last step with --resume", file=sys.stderr)
        sys.exit(130)

# what of Hyperparameters the command line can set
TRAINING = ["steps", "batch_size", "token_budget", "lr", "kl_coef", "validation_problems", "seed"]

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id, folder, 'tiny' or 'tiny-vlm'")
    parser.add_argument("--task", nargs="+", metavar="T", help=", ".join(TASKS))
    parser.add_argument("--targets", default="mlp", help="mlp, attention, all, or a regular expression over layers")
    parser.add_argument("--layers", type=float, default=1.0, help="share of the blocks that train, the last ones: 0.5")
    for name in TRAINING:  # argparse takes --kl for --kl-coef
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(getattr(Hyperparameters, name)))
    parser.add_argument("--test-problems", type=int, help="score on so many of the held-out problems; default: all")
    parser.add_argument("--max-new-tokens", type=int, help="of an answer; default: the task's own limit")
    parser.add_argument("--checkpointing", action="store_true", help="less memory for activations, a third more time")
    parser.add_argument("--device-map", help="auto: spread a model over several GPUs (needs accelerate)")
    parser.add_argument("--out", type=Path, default=Path("experts"), help="experts land in OUT/<model>/")
    parser.add_argument("--resume", action="store_true", help="go on where an interrupted run of the same command was")
    args = parser.parse_args()
    start_processes()
    default_model(args)
    tasks = [get_task(t) for t in args.task or USUAL.get(args.model, ["gsm8k"])]
    given = {k: v for k in TRAINING if (v := getattr(args, k)) is not None}
    if min(given.values(), default=0) < 0 or not given.get("batch_size", 1):
        raise Transformer2Error("no number may be negative, and --batch-size is at least 1")
    if RANK > 0:
        torch.distributed.barrier()  # until the first process has made and cached the model and its factors
    model, processor = load_model(args.model, device_map=args.device_map)
    parameters, clock = sum(p.numel() for p in model.parameters()), time.time()
    apply_svf(model, last_blocks(model, args.targets, args.layers), CACHE / "svd", args.checkpointing)
    if WORLD > 1 and RANK == 0:
        torch.distributed.barrier()
    z = sum(layer.z.numel() for layer in svf_layers(model).values())
    print(f"{args.model}: {parameters:,} parameters; {len(svf_layers(model))} matrices decomposed in "
          f"{time.time() - clock:.1f} s; z has {z:,} numbers ({z / parameters:.2%})")
    summary, states = [], []
    for task in tasks:
        path, clock = args.out / folder_name(args.model) / f"{task.name}.safetensors", time.time()
        state, test = path.with_suffix(".state"), task.problems("test")[: args.test_problems]
        task.max_new_tokens, task.hyper = args.max_new_tokens or task.max_new_tokens, task.hyper | given
        if not args.resume and RANK == 0:
            state.unlink(missing_ok=True)
        print(f"\n{task.name}: the base model answers {len(test)} held-out problems")
        base = evaluate(model, processor, task, test)
        expert = reinforce(model, processor, task, checkpoint=state, **task.hyper)
        accuracy = evaluate(model, processor, task, test, expert=expert)
        if RANK > 0:
            continue
        save_expert(expert, path, task=task.name, category=task.category or "", model=args.model, targets=args.targets,
                    layers=args.layers, base=f"{base:.4f}", accuracy=f"{accuracy:.4f}", problems=len(test),
                    **task.hyper)
        summary.append(f"{task.name:15} {base:7.1%} -> {accuracy:6.1%} {len(test):7} problems "
                       f"{path.stat().st_size:9,} B {time.time() - clock:6.0f} s  {path}")
        print(summary[-1])
        states.append(state)
    for state in states:  # not earlier: --resume goes on with the task that was interrupted
        state.unlink()
    print("\n" + "\n".join(["held-out accuracy, base -> expert", *summary]))
    print(f"z: {z:,} numbers, {z / parameters:.2%} of the model{peak_memory()}"
          + (f", on the GPU {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB" if torch.cuda.is_available() else ""))
    if WORLD > 1:
        torch.distributed.destroy_process_group()

if __name__ == "__main__":
    guarded(main)
