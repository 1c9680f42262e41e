"""
Rewards that can be trusted: answers read out of what a model writes, and programs run in a sandbox.

A wrong reward quietly teaches the wrong thing, and a reward for code runs a model's code on the reader's machine. What
the sandbox keeps off and what it does not is in README. The tasks that use these rewards are in train_expert.py.
"""
import ast, os, re, signal, socket, subprocess, sys, tempfile, warnings
from fractions import Fraction
from functools import partial
from itertools import accumulate

from transformer2 import Transformer2Error

warnings.filterwarnings("ignore", module="<unknown>")  # a "\d" in a program that a model wrote

# ---- Rewards for text: what a model writes, read as an answer ----

STATED = (r"(?i:####(?=\W*(?:\d|[A-E]\b))|\\boxed\{|"  # not a heading
          r"\b(?:answer|(?:the|correct|right|best) (?:option|choice))\W{0,2}(?: is|:))")

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
        label = rf"{letter}(?![\w'])(?!(?<=A) (?!because|since|as |and )[a-z])"  # the "A" of "A dog" is none
        if re.match(rf"\W*(?:(?i:the|option|choice)\W+)*(?:{label}\W*(?:{words})?|{words}){end}", tail):
            return letter
    return ""

MATH_RULES = [  # what differs in LaTeX and not in meaning, in this order
    (r"(?<!\\)\\(left|right|[!,;: %$()\[\]])|[$%*~°]|\^\{?\\circ\}?", ""), (r"\\[dt]frac", r"\\frac"),
    (r"(?<=[\d}])\s*\\(text|mbox|mathrm)\s*\{[^{}]*\}(\^\{?\d\}?)?", ""), (r"\\(?:text|mbox)\{([^{}]*)\}", r"\1"),
    (r"^\s*(-?[\d.,/]+)\s+[A-Za-z ]+\.?$", r"\1"), (r"\s|\.\s*$", ""), (r"^[a-z](=|\\in)", ""),  # 5 cm; x = 5
    (r"(?<=\d)(,|\{,\})(?=\d{3}(?!\d))", ""), (r"\\(sqrt|frac)(\d)", r"\\\1{\2}"), (r"([_^])\{(\w)\}", r"\1\2"),
    (r"(\\frac\{([^{}]|\{[^{}]*\})*\})(\d)", r"\1{\3}"), (r"(?<!\d)\\frac\{(-?\w+)\}\{(\w+)\}", r"\1/\2")]

def math_form(answer):
    """A LaTeX answer in a form to compare. What it does not know as the same (1+x and x+1) stays different."""
    for pattern, new in MATH_RULES:
        answer = re.sub(pattern, new, answer)
    number = re.fullmatch(r"-?(\d{1,30}(/[1-9]\d{0,29})?|\d{0,30}\.\d{1,30})", answer)
    return str(Fraction(answer)) if number else answer

def math_answer(text):
    """math_form of what text boxed last, up to the brace that closes it, or else stated last; "" if nothing."""
    *before, tail = re.split(r"\\boxed\{" if (boxed := "\\boxed{" in text) else STATED, text)
    if not boxed:
        return math_form(re.split(r"\.\s|\.$|\n", tail.lstrip(" :*\n"))[0]) if before else ""
    depths = accumulate((c == "{") - (c == "}") for c in tail)
    return math_form(tail[: next((i for i, depth in enumerate(depths) if depth < 0), None)])

def extract_code(completion, problem):
    """The program in a completion: fenced blocks and the text around them, each from its first line of code as far
    as it is Python. Without the function of HumanEval's `prompt` in it, the completion is that function's body."""
    parts, header, code = re.split(r"```(?:[Pp]ython3?|py)?", completion[:20000]), problem.get("prompt"), ""
    fenced = len(parts) > 1 and len(parts) % 2  # the first fence opens a block, or else closes the prompt's
    if header and re.search(rf"^def {problem['entry_point']}\b", completion, re.M):
        parts = [header + "    pass", *parts]  # the header brings imports and helpers
    elif header:
        parts = [header + "    " + parts[fenced].lstrip()]
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

DIGITS = {word: str(n) for n, word in enumerate("zero one two three four five six seven eight nine ten".split())}

def plain(answer):
    """An answer as the VQA benchmark compares it: no capitals, punctuation or articles, digits for numbers."""
    words = re.sub(r"[^\w\s.$%&:]|_", " ", re.sub(r"(?<=\d),(?=\d)|['’]|\.(?!\d)", "", answer.lower())).split()
    return " ".join(DIGITS.get(word, word) for word in words if word not in ("a", "an", "the"))

def vqa_accuracy(text, problem):
    """The VQA benchmark's: right if three people say so; the mean over leaving each of the people out."""
    said, people = plain(text), [plain(a) for a in problem["answers"]]
    return sum(min(1.0, (people.count(said) - (p == said)) / 3) for p in people) / len(people)

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
call = lambda *text: print(*text, file=writer, flush=True) or ast.literal_eval(reader.readline())
exec(code, {"remote": lambda name: lambda *args: call(f"{name}(*{args!a})")})
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
