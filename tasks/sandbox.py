"""Runs a program that a model wrote, with tests, in processes that can do little else.

The *worker* process runs the program and answers calls of its functions. The *tester* process runs
the tests and takes only literals (numbers, strings, lists, ...) for results. The verdict is the
tester's, and no expected value enters the worker: no exit, no printed marker, no odd `__eq__` and
no replaced builtin there makes a wrong result right. What the sandbox keeps off, and what it does
not, is in README.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile

from transformer2 import Transformer2Error

# How both processes begin: they read their source, then give up what a program could do harm with.
SANDBOX = r"""
import _imp, _signal, _thread, posix, resource, sys, time

# The source to run comes from stdin; the two processes talk over a socket.
code = sys.stdin.read()
socket = int(sys.argv[1])
reader = open(socket, "r", closefd=False)
writer = open(socket, "w", closefd=False)

# 1) No functions of the operating system but these. (The audit hook below does not suffice: some,
#    like mkfifo, act without an audit event.)
allowed = "_exit cpu_count fspath getcwd getpid listdir lstat stat urandom".split()
for name in dir(posix):
    is_builtin_function = type(getattr(posix, name)) is type(len)
    if is_builtin_function and name not in allowed:
        delattr(posix, name)

# 2) No threads.
_thread.start_new_thread = None
_thread.start_new = None

# 3) Modules that the program may need are imported now, as nothing can be imported later.
modules = '''ast bisect calendar cmath collections copy dataclasses datetime decimal enum fractions
    functools hashlib heapq itertools json math operator os queue random re statistics string
    typing'''
for name in modules.split():
    if name in code:
        __import__(name)
import heapq  # collections.Counter imports it when it is used
if "strptime" in code:
    import _strptime  # likewise datetime.strptime

# 4) No setting of the clock, and no second copy of posix with all its functions.
del time.clock_settime, time.clock_settime_ns, _imp.create_builtin

# 5) Limits.
def limit(resource_kind, most):
    resource.setrlimit(resource_kind, (most, most))

limit(resource.RLIMIT_CPU, 5)  # seconds
limit(resource.RLIMIT_AS, 512 << 20)  # bytes of memory
limit(resource.RLIMIT_FSIZE, 0)  # bytes of any file
limit(resource.RLIMIT_NPROC, 0)  # further processes
limit(resource.RLIMIT_NOFILE, 32)  # open files
limit(resource.RLIMIT_CORE, 0)  # bytes of a core dump
_signal.alarm(60)  # ends this process if the one that started it is killed

# 6) From here on Python reports what the program does as audit events, and every event that is not
#    known to be harmless ends the process: opening files, importing, starting processes, ... Calls
#    without an event, like os.stat, pass.
harmless_events = '''builtins.id compile exec time.sleep object.__getattr__ object.__setattr__
    object.__delattr__ sys._getframe sys._getframemodulename'''

# The hook's names are its own arguments, and its only name is deleted: so nothing can replace them.
def audit(event, args, stop=posix._exit, harmless=frozenset(harmless_events.split())):
    if event not in harmless:
        stop(1)

sys.addaudithook(audit)
del audit
"""

WORKER = (
    SANDBOX
    + r"""
module = type(sys)("completion")
sys.modules["completion"] = module
exec(code, vars(module))
for call in reader:
    value = eval(call, vars(module))
    if isinstance(value, dict):
        value = dict(value)  # a Counter or defaultdict, so that it prints as a literal
    print(ascii(value), file=writer, flush=True)
"""
)

TESTER = (
    "import ast  # before the sandbox starts"
    + SANDBOX
    + r"""
# The function `name` of the program, to be called here: its arguments and its result travel as
# literals, one line each.
def remote(name):
    def call(*arguments):
        print(f"{name}(*{arguments!a})", file=writer, flush=True)
        return ast.literal_eval(reader.readline())

    return call

exec(code, {"remote": remote})
posix._exit(0)  # at once: an ordinary end has audit events of its own
"""
)


def run_tests(code: str, tests: str, timeout: float = 10.0) -> bool:
    """True if the source `tests` ends without an error within `timeout` seconds.

    In `tests`, remote("f") is the function f of `code`. Both processes are gone on return. Raises
    Transformer2Error unless HF_ALLOW_CODE_EVAL=1 in the environment allows running such code.
    """
    if os.environ.get("HF_ALLOW_CODE_EVAL") != "1":
        raise Transformer2Error(
            "this task runs code that a model wrote: read in README what its sandbox keeps off, "
            "then allow it with HF_ALLOW_CODE_EVAL=1 in the environment"
        )
    worker_end, tester_end = socket.socketpair()
    with tempfile.TemporaryDirectory() as home, worker_end, tester_end:
        worker = start(WORKER, worker_end, home)
        tester = start(TESTER, tester_end, home)
        worker_end.close()  # so that the tester notices when the worker is gone
        try:
            with worker.stdin:
                worker.stdin.write(code.encode(errors="replace"))
            tester.communicate(tests.encode(), timeout)
            return tester.returncode == 0
        except (subprocess.TimeoutExpired, BrokenPipeError):
            return False
        finally:
            # The worker was not waited for until now, so its number is still its own.
            os.killpg(worker.pid, signal.SIGKILL)
            tester.kill()
            worker.wait()
            tester.wait()


def start(script: str, end: socket.socket, home: str) -> subprocess.Popen:
    """A process that runs `script` in the folder `home`, with one end of a socket and stdin.

    It has no environment and no site packages, and is the leader of a session of its own.
    """
    options = ["-I", "-S", "-B", "-W", "ignore"]
    return subprocess.Popen(
        [sys.executable, *options, "-c", script, str(end.fileno())],
        pass_fds=[end.fileno()],
        cwd=home,
        env={},
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
