"""
Trains experts: a model and a task go in, a file with one z per weight matrix comes out.

    python train_expert.py                                              # on a CPU: the built-in tiny model, all of it
    python train_expert.py --model Qwen/Qwen2.5-0.5B-Instruct --task gsm8k

Below: the tasks, the built-in tiny model, the command line. The method itself is in transformer2.py.
"""
import argparse, ast, inspect, os, random, re, resource, signal, socket, subprocess, sys, tempfile, time, warnings, zlib
from fractions import Fraction
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
warnings.filterwarnings("ignore", module="<unknown>")  # a "\d" in a program that a model wrote

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
        max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.08, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
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

# ---- Rewards for text: what a model writes, read as an answer ----

STATED = r"(?i:####|\\boxed\{|\b(?:answer|option|choice)(?: is|:))"

def numeric_answer(text):
    """The number text states as its answer ("is 5 + 3 = 8" states 8), else its last; NaN, equal to nothing, if none."""
    text = re.sub(r"(?<=\d)(,|\{,\})(?=\d{3}(?!\d))|\\?\$", "", text.replace("−", "-"))
    *before, tail = re.split(STATED, text)
    stated = re.split(r"\n|\.\s|\}", tail.strip())[0].rpartition("=")[2] if before else ""
    numbers = partial(re.findall, r"(?:(?<![\w)])-)?\d*\.?\d+")  # the minus of 16-3 is no sign
    return float((numbers(stated)[:1] or numbers(text) or ["nan"])[-1])

def letter_answer(text, problem):
    """The letter of the option that text states or its last line is, by label or by words; "" if there is none."""
    *before, tail = re.split(STATED, text.replace(problem["question"], ""))  # never from the question's own words
    tail, end = (tail, "") if before else (tail.strip().rpartition("\n")[2], r"\W*$")
    options = zip(problem["choices"]["text"], "ABCDE")
    for option, letter in sorted(options, key=lambda pair: -len(pair[0])):  # "iron ore" before "iron"
        words = rf"(?i:{re.escape(option.strip(' .'))})(?!\w)"
        label = rf"{letter}(?![\w'])(?!(?<=A) [a-z])"  # the "A" of "A dog" is none
        if re.match(rf"\W*(?:(?:the|option|choice) )*(?:{label}\W*(?:{words})?|{words}){end}", tail):
            return letter
    return ""

MATH_RULES = [  # what differs in LaTeX and not in meaning, in this order
    (r"\\(left|right|[!,;: %$])|[$%*~°]|\^\{?\\circ\}?", ""), (r"\\[dt]frac", r"\\frac"),
    (r"(?<=[\d}])\s*\\(text|mbox|mathrm)\s*\{[^{}]*\}(\^\{?\d\}?)?", ""), (r"\\(?:text|mbox)\{([^{}]*)\}", r"\1"),
    (r"^\s*(-?[\d.,/]+)\s+[A-Za-z ]+\.?$", r"\1"), (r"\s|\.\s*$", ""), (r"^[a-z](=|\\in)", ""),  # 5 cm; x = 5
    (r"(?<=\d)(,|\{,\})(?=\d{3}(?!\d))", ""), (r"\\(sqrt|frac)(\d)", r"\\\1{\2}"), (r"([_^])\{(\w)\}", r"\1\2"),
    (r"(\\frac\{([^{}]|\{[^{}]*\})*\})(\d)", r"\1{\3}"), (r"\\frac\{(-?\w+)\}\{(\w+)\}", r"\1/\2")]

def math_form(answer):
    """A LaTeX answer in a form to compare. What it does not know as the same (1+x and x+1) stays different."""
    for pattern, new in MATH_RULES:
        answer = re.sub(pattern, new, answer)
    number = re.fullmatch(r"-?(\d{1,30}(/[1-9]\d{0,29})?|\d{0,30}\.\d{1,30})", answer)
    return str(Fraction(answer)) if number else answer

def math_answer(text):
    """math_form of what text states last, up to the brace that closes \\boxed{ or the sentence's end; "" if nothing."""
    *before, tail = re.split(STATED, text)
    stated = re.match(r"([^{}\n]|\{([^{}]|\{[^{}]*\})*\})*", tail.lstrip(" :*"))[0]
    return math_form(re.split(r"\.\s|\.$", stated)[0]) if before else ""

def extract_code(completion, problem):
    """The program in a completion: fenced blocks and the text around them, each from its first line of code as far
    as it is Python. Without the function of HumanEval's `prompt` in it, the completion is that function's body."""
    parts, header, code = re.split(r"```(?:[Pp]ython3?|py)?", completion[:20000]), problem.get("prompt"), ""
    if header and re.search(rf"^def {problem['entry_point']}\b", completion, re.M):
        parts = [header + "    pass", *parts]  # the header brings imports and helpers
    elif header:
        parts = [header + "    " + parts[len(parts) > 2].lstrip()]
    for part in parts:
        start = re.search(r"^(?:@|import |from \S+ import |def |class \w+[:(]|\w+ *= *)", part, re.M)
        lines = part[start.start():].splitlines() if start else []
        while lines:
            try:
                ast.parse("\n".join(lines))
                break
            except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
                del lines[min(getattr(error, "lineno", 0) or 1, len(lines)) - 1:]
        code += "\n".join(lines) + "\n"
    return code

# ---- Rewards for code. The worker process runs the completion and answers calls; the tester process runs the tests,
# and takes only literals for answers. The verdict is the tester's, and no expected value enters the worker: no exit,
# printed marker, odd __eq__ or patched builtin there makes a wrong answer right. ----

SANDBOX = r"""
import _imp, _signal, _thread, posix, resource, sys, time
code, (reader, writer) = sys.stdin.read(), (open(int(sys.argv[1]), mode, closefd=False) for mode in "rw")
for name in [n for n in dir(posix) if type(getattr(posix, n)) is type(len)]:  # mkfifo acts without an audit event
    if name not in "_exit cpu_count fspath getcwd getpid listdir lstat stat urandom".split():
        delattr(posix, name)
_thread.start_new_thread = _thread.start_new = None
for module in '''ast bisect calendar cmath collections copy dataclasses datetime decimal enum fractions functools
        hashlib heapq itertools json math operator os queue random re statistics string typing _strptime'''.split():
    if module.strip("_") in code + "heapq":  # now: nothing else can be imported later, and Counter imports heapq
        __import__(module)
del time.clock_settime, time.clock_settime_ns, _imp.create_builtin  # which would make a second posix
for what, most in ("CPU", 5), ("AS", 512 << 20), ("FSIZE", 0), ("NPROC", 0), ("NOFILE", 32), ("CORE", 0):
    resource.setrlimit(getattr(resource, "RLIMIT_" + what), (most, most))
_signal.alarm(60)  # should the caller be killed
# what is not known to be harmless ends the process; the names are the hook's own, so that nothing can replace them
sys.addaudithook(lambda event, args, stop=posix._exit, harmless=frozenset('''builtins.id compile exec time.sleep
    object.__getattr__ object.__setattr__ object.__delattr__ sys._getframe sys._getframemodulename'''.split()):
    event in harmless or stop(1))
"""
WORKER = SANDBOX + r"""
sys.modules["completion"] = module = type(sys)("completion")
exec(code, vars(module))
for call in reader:
    value = eval(call, vars(module))
    print(ascii(dict(value) if isinstance(value, dict) else value), file=writer, flush=True)
"""
TESTER = "import ast" + SANDBOX + r"""
def remote(name):
    def call(*args):
        print(f"{name}(*{args!a})", file=writer, flush=True)
        return ast.literal_eval(reader.readline())
    return call
exec(code, {"remote": remote})
posix._exit(0)  # at once: an ordinary end has audit events of its own
"""

def run_tests(code, tests, timeout=10.0):
    """True if the source `tests`, in which remote("f") is the function f of `code`, ends without an error in `timeout`
    seconds. Both of its processes are gone on return. Raises Transformer2Error without the user's leave."""
    if os.environ.get("HF_ALLOW_CODE_EVAL") != "1":
        raise Transformer2Error("this task runs code that a model wrote: read in README what its sandbox keeps off, "
                                "then allow it with HF_ALLOW_CODE_EVAL=1 in the environment")
    ends, options = socket.socketpair(), "-I -S -B -W ignore -c".split()
    with tempfile.TemporaryDirectory() as home, ends[0], ends[1]:
        worker, tester = [subprocess.Popen(
            [sys.executable, *options, script, str(end.fileno())], pass_fds=[end.fileno()], cwd=home, env={},
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
            for script, end in zip((WORKER, TESTER), ends)]
        ends[0].close()  # so that the tester sees when the worker is gone
        try:
            with worker.stdin:
                worker.stdin.write(code.encode(errors="replace"))
            tester.communicate(tests.encode(), timeout)
            return tester.returncode == 0
        except (subprocess.TimeoutExpired, BrokenPipeError):
            return False
        finally:
            os.killpg(worker.pid, signal.SIGKILL)  # not waited for until now, so that the number is still its own
            tester.kill()
            worker.wait(), tester.wait()

# ---- Real tasks. Even training rows train and odd ones validate, as in the authors' code. Of a dataset with only a
# test split every 16th row is "train" (for few-shot), those halfway between are "validation", the others "test". ----

def rows_of(path, config, prepare, split):
    """The rows of a split as dicts, with what `prepare` adds to each; those without an `answer` are left out."""
    try:
        from datasets import load_dataset, logging
        logging.set_verbosity_error()
        data = load_dataset(path, config)
    except Exception as error:  # the hub client's errors have no class in common
        raise Transformer2Error(f"dataset {path} cannot be loaded ({type(error).__name__}): go online once, or set "
                                "HF_HUB_OFFLINE=1 and HF_DATASETS_CACHE to a copy of its cache")
    step = 16 if "train" not in data else 1 if split == "test" else 2
    share = {0: "train", step // 2: "validation"} if step > 1 else {}
    try:
        rows = [{**row, **prepare(row)} for i, row in enumerate(data["train" if step == 2 else "test"])
                if share.get(i % step, "test") == split]
    except KeyError as column:
        raise Transformer2Error(f"dataset {path} has no column {column}: delete its cache and load it again")
    if lost := sum(not row["answer"] for row in rows):
        print(f"{path}: {lost} of {len(rows)} problems left out, as their answers cannot be used", file=sys.stderr)
    return [row for row in rows if row["answer"]]

def real_task(name, category, path, config, prepare, prompt, right, max_new_tokens=512, prefill=""):
    return Task(name, partial(rows_of, path, config, prepare), lambda p: say({"question": prompt.format(**p)}),
                lambda text, p: 1.0 if right(text, p) else -1.0, max_new_tokens, prefill, category=category)

def gsm8k():
    def prepare(row):
        solution, answer = re.sub(r"<<.*?>>", "", row["answer"]), re.search(r"#### *(-?[\d.,]*\d)", row["answer"])
        return {"question": row["question"], "answer": answer and answer[1], "solution": solution}
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
        solution = f"The answer is ({answer})."
        return {"question": row["question"], "answer": answer, "options": options, "solution": solution}
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
        return {"question": row["text"], "answer": tests * ("class " not in row["code"]), "solution": row["code"],
                "tests": "".join(f"{name} = remote({name!r})\n" for name in names) + tests}
    return code_task("mbpp", "code", "google-research-datasets/mbpp", "full", prepare,
                     "{question} Your code should satisfy these assertions:\n```python\n{answer}\n```")

def humaneval():
    def prepare(row):  # one test compares with the solution
        solution = row["prompt"] + row["canonical_solution"]
        return {"question": row["prompt"], "solution": solution, "answer": row["test"],
                "tests": f"{solution}\n{row['test']}\ncheck(remote({row['entry_point']!r}))"}
    return code_task("humaneval", "code", "openai/openai_humaneval", None, prepare,
                     "Write a solution to the following problem:\n```python\n{question}```")

CATEGORIES = ["reasoning", "math", "code", "other"]  # the paper's; no training question is "other"

def real_classify():
    def problems(split):
        count = {"train": 12, "validation": 16, "test": 32}[split]  # of each kind; an update sees all that train
        return [{"question": row[column], "answer": category} for path, config, column, category in (
            ("openai/gsm8k", "main", "question", "math"), ("google-research-datasets/mbpp", "full", "text", "code"),
            ("allenai/ai2_arc", "ARC-Easy", "question", "reasoning"))
            for row in rows_of(path, config, lambda row: {"answer": row[column]}, split)[:count]]
    return Task("classify", problems, lambda p: category_question(say(p), CATEGORIES), exact, prefill=CATEGORY_PREFILL,
                choices=CATEGORIES, hyper=dict(steps=20, batch_size=36, lr=4e-3))

TASKS = {name: partial(tiny_task, name) for name in TINY_CATEGORY} | {
    "tiny-classify": tiny_classify, "classify": real_classify, "gsm8k": gsm8k, "mbpp": mbpp, "math": math500,
    "arc-easy": partial(arc, "ARC-Easy"), "arc-challenge": partial(arc, "ARC-Challenge"), "humaneval": humaneval}
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
    parser.add_argument("--targets", default="mlp", help="mlp, attention, all, or a regular expression over layers")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--kl", type=float, dest="kl_coef")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--out", type=Path, default=Path("experts"), help="experts land in OUT/<model>/")
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
