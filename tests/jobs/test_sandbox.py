"""Programs that attack: each would pass if its attack worked, so each has to end as a failed sample."""

import contextlib
import gzip
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time

import pytest

from jobs import sandbox
from jobs.sandbox import Program, SandboxError, many, run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux confines programs")

ALL = ("namespaces", "landlock", "seccomp")
MODES = (ALL, ("landlock", "seccomp"), ("namespaces", "seccomp"))
LIMITS = {"seconds": 0.7, "memory": 1 << 28}
TESTS = "assert add(1, 2) == 3\nassert add([1], [2]) == [1, 2]"
RIGHT = "def add(a, b):\n    return a + b\n"
SECRET = "a-secret-of-the-environment"

# OUTSIDE, PARENT and LATER are replaced: a folder with files, the process that runs the tests, a file to appear.
HOSTILE = {
    "fork bomb": "import os\nwhile True:\n    os.fork()",
    "vfork and clone by number": """
        import ctypes
        libc = ctypes.CDLL(None)
        if all(libc.syscall(n, 17, 0, 0, 0, 0) < 0 for n in (56, 57, 58, 435)): raise SystemExit
        """,
    "daemon that outlives": """
        import os, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                time.sleep(1)
                open("LATER", "w").close()
        """,
    "threads that start and start": """
        import threading, time
        while True:
            threading.Thread(target=time.sleep, args=(60,)).start()
        """,
    "memory hog": "x = []\nwhile True:\n    x.append(bytearray(1 << 26))",
    "one large piece": "x = b'x' * (1 << 34)",
    "memory that unpacks": "import zlib\nx = zlib.decompress(zlib.compress(bytes(1 << 29)) , bufsize=1 << 33) * 4",
    "huge integer": "x = 1 << 10**11",
    "integer that never ends": "x = 9 ** 9 ** 9",
    "endless loop": "while True: pass",
    "endless loop that catches everything": """
        while True:
            try:
                while True: pass
            except BaseException: pass
        """,
    "ignored signals, then sleep": """
        import signal, time
        for s in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(s, signal.SIG_IGN)
        time.sleep(60)
        """,
    "regular expression that explodes": "import re\nre.match(r'(a+)+$', 'a' * 64 + 'b')",
    "deletion of files": "import shutil\nshutil.rmtree('OUTSIDE')",
    "deletion of everything": """
        import os
        gone = 0
        for folder, _, names in os.walk("OUTSIDE", topdown=False):
            for name in names:
                os.unlink(os.path.join(folder, name))
                gone += 1
        assert gone
        """,
    "writing outside": "open('OUTSIDE/file', 'a').write('x')",
    "new file outside": "open('OUTSIDE/new', 'w').write('x')",
    "truncation while reading": "import os\nos.open('OUTSIDE/file', os.O_RDONLY | os.O_TRUNC)",
    "rights of a file": "import os\nos.chmod('OUTSIDE/file', 0o777)",
    "times of a file": "import os\nos.utime('OUTSIDE/file', (0, 0))",
    "symlink to the outside": "import os\nos.symlink('OUTSIDE/file', 'link')\nopen('link', 'a').write('x')",
    "hard link to the outside": "import os\nos.link('OUTSIDE/file', 'link')\nopen('link', 'a').write('x')",
    "renaming into the outside": "import os\nopen('a', 'w').write('x')\nos.rename('a', 'OUTSIDE/file')",
    "changes of the installation": "import json\nopen(json.__file__, 'a').write(' ')",
    "reading outside": "assert open('OUTSIDE/file').read()",
    "other devices": """
        opened = 0
        for name in ("zero", "full", "random", "tty", "ptmx", "fuse", "kmsg", "mem", "shm/x", "net/tun"):
            try: open(f"/dev/{name}", "r+b"); opened += 1
            except OSError: pass
        assert opened
        """,
    "listing outside": "import os\nassert os.listdir('OUTSIDE')",
    "the environment": "import os\nassert 'SECRET' in os.environ or len(os.environ) > 1",
    "the parent's environment": "assert 'SECRET' in open('/proc/PARENT/environ').read()",
    "any process's environment": """
        import os
        found = [p for p in os.listdir('/proc') if p.isdigit() and open(f'/proc/{p}/environ', 'rb').read()]
        assert found
        """,
    "memory of the checker": "import os\nos.open(f'/proc/{os.getppid()}/mem', os.O_RDWR)",
    "sockets of every family": """
        import socket
        opened = 0
        for family in range(46):
            for kind in (1, 2, 3, 5):
                try: socket.socket(family, kind, 0); opened += 1
                except OSError: pass
        assert opened
        """,
    "pair of sockets": "import socket\nsocket.socketpair()",
    "socket by number": "import ctypes\nassert ctypes.CDLL(None).syscall(41, 2, 1, 0) >= 0",
    "sockets by io_uring": """
        import ctypes
        assert ctypes.CDLL(None).syscall(425, 8, ctypes.create_string_buffer(256)) >= 0
        """,
    "a call of the other architecture": """
        import ctypes, mmap
        code = mmap.mmap(-1, 4096, prot=7)
        code.write(bytes.fromhex('b81400000031dbcd80c3'))  # mov eax, 20; xor ebx, ebx; int 0x80; ret
        ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()
        """,
    "killing the parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
    "killing the parent's group": "import os, signal\nos.killpg(os.getpgid(os.getppid()), signal.SIGKILL)",
    "killing everything": "import os, signal\nos.kill(-1, signal.SIGKILL)",
    "killing by the owner of a pipe": """
        import fcntl, os
        r, w = os.pipe()
        fcntl.fcntl(r, 8, PARENT)  # F_SETOWN
        """,
    "stopping the parent": "import os, signal\nos.kill(PARENT, signal.SIGSTOP)",
    "stopping itself": "import os, signal\nsignal.raise_signal(signal.SIGSTOP)\nimport time\ntime.sleep(60)",
    "tracing the parent": """
        import ctypes, os
        libc = ctypes.CDLL(None)
        assert libc.ptrace(16, os.getppid(), 0, 0) == 0 or libc.ptrace(16, PARENT, 0, 0) == 0
        """,
    "reading memory of others": """
        import ctypes, os
        class Part(ctypes.Structure):
            _fields_ = [("at", ctypes.c_void_p), ("n", ctypes.c_size_t)]
        here = ctypes.create_string_buffer(8)
        mine, theirs = Part(ctypes.addressof(here), 8), Part(id(None), 8)
        assert ctypes.CDLL(None).process_vm_readv(os.getppid(), ctypes.byref(mine), 1, ctypes.byref(theirs), 1, 0) > 0
        """,
    "filling the disk": """
        block = bytes(1 << 20)
        for i in range(100000):
            with open(f"f{i % 200}-{i}", "wb") as f: f.write(block)
        """,
    "one huge file": "f = open('f', 'wb')\nwhile True: f.write(bytes(1 << 20))",
    "sparse file": "f = open('f', 'wb')\nf.truncate(1 << 40)",
    "many files": "for i in range(10**6): open(f'f{i}', 'w').close()",
    "many open files": "f = [open(__import__('json').__file__) for _ in range(10000)]",
    "folders in folders": "import os\nwhile True:\n    os.mkdir('d')\n    os.chdir('d')",
    "files in memory": "import os\nf = os.memfd_create('x')\nwhile True: os.write(f, bytes(1 << 20))",
    "output without end": "while True: print('x' * 10**6)",
    "output of a gigabyte": "for _ in range(1024): print('x' * (1 << 20))",
    "deep recursion": "def f(): return f()\nf()",
    "deep recursion without a limit": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): return f()\nf()",
    "segfault": "import ctypes\nctypes.string_at(0)",
    "other limits": "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (65, 65))",
    "another program": "import os, sys\nos.execv(sys.executable, [sys.executable, '-c', 'pass'])",
    "a shell": "import os\nassert os.system('true') == 0",
    "a subprocess": "import subprocess\nsubprocess.run(['true'], check=True)",
    "new namespaces": """
        import ctypes
        libc = ctypes.CDLL(None)
        assert any(libc.unshare(f) == 0 for f in (0x10000000, 0x00020000, 0x40000000))
        """,
    "mounts": """
        import ctypes
        libc = ctypes.CDLL(None)
        assert libc.mount(b"tmpfs", b"/usr", b"tmpfs", 0, None) == 0 or libc.umount2(b"/usr", 2) == 0
        """,
    "another root": "import os\nos.chroot('/')",
    "another user": "import os\nos.setresuid(0, 0, 0)\nos.setgroups([])",
    "exit before the tests": "import sys\nsys.exit(0)",
    "hard exit before the tests": "import os\nos._exit(0)",
}
# These define a wrong function, and try to be believed.
LIARS = {
    "exit in the function": "def add(a, b): raise SystemExit(0)",
    "hard exit in the function": "import os\ndef add(a, b): os._exit(0)",
    "exit at the end": "import atexit, sys\natexit.register(sys.exit, 0)\ndef add(a, b): return 0",
    "the marker of a pass": """
        import os
        for fd in range(64):
            for words in (b'{"passed": true}', b'\\x00\\x00\\x00\\x10{"passed": true}'):
                try: os.write(fd, words)
                except OSError: pass
        def add(a, b): return 0
        """,
    "answers in advance": """
        import os
        for fd in range(3, 64):
            try: os.write(fd, b'\\x00\\x00\\x00\\x0e{"value": true}' * 10)
            except OSError: pass
        def add(a, b): return 0
        """,
    "equal to everything": """
        class Equal(int):
            def __eq__(self, other): return True
        def add(a, b): return Equal(0)
        """,
    "an object that is no value": """
        class Equal:
            def __eq__(self, other): return True
        def add(a, b): return Equal()
        """,
    "other builtins": """
        import builtins
        builtins.AssertionError = type("AssertionError", (BaseException,), {})
        builtins.exec = builtins.compile = lambda *a, **k: None
        def add(a, b): return 0
        """,
    "another check": """
        import sys
        def check(*a): return True
        for frame in sys._current_frames().values():
            while frame:
                frame.f_globals.update(check=check, _check=check, _wait=lambda *a, **k: {"passed": True})
                frame = frame.f_back
        def add(a, b): return 0
        """,
    "another json": """
        import json
        json.dumps = lambda *a, **k: '{"passed": true, "reason": ""}'
        def add(a, b): return 0
        """,
    "the tests from memory": """
        import gc
        def add(a, b):
            for text in gc.get_objects():
                if "assert add" in repr(text)[:100000]: return 3
            return 0
        """,
    "closed descriptors": "import os\nos.closerange(0, 64)\ndef add(a, b): return a + b",
    "requests read from under the harness": "import os\nprint(os.read(3, 1 << 16))\ndef add(a, b): return a + b",
    "an answer too long": "def add(a, b): return 'x' * (1 << 25)",
    "an answer too deep": "def add(a, b):\n    x = []\n    x.append(x)\n    return x",
    "no function": "addition = 1",
    "wrong": "def add(a, b): return 3",
}  # fmt: skip


@pytest.fixture
def outside():
    """A folder that is open to everyone, which no program may change."""
    folder = pathlib.Path(tempfile.mkdtemp(dir="/tmp"))
    (folder / "inner").mkdir()
    (folder / "file").write_text("outside")
    (folder / "inner" / "file").write_text("outside")
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


def tree(folder):
    state = {}
    for path in (folder, *sorted(folder.rglob("*"))):
        s = path.lstat()
        state[str(path)] = (s.st_mode, s.st_ino, s.st_size, s.st_mtime_ns, s.st_nlink)
    return state


def left_over():
    """Processes of the sandbox that are still there after a while; other tests may run theirs beside."""
    found = sandboxed()
    deadline = time.monotonic() + 10
    while found and time.monotonic() < deadline:
        time.sleep(0.1)
        found &= sandboxed()
    return found


def sandboxed():
    found = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if b"sandbox_inside" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes():
                found.add(int(pid))
    return found


def programs(outside):
    """Name, program: the attack first and, if it worked, a function that is right."""
    for name, attack in HOSTILE.items():
        text = textwrap.dedent(attack).strip() + "\n" + RIGHT
        text = text.replace("OUTSIDE", str(outside)).replace("LATER", f"{outside}/later").replace("SECRET", SECRET)
        yield name, Program(text.replace("PARENT", str(os.getpid())), TESTS, "add")
    for name, lie in LIARS.items():
        yield name, Program(textwrap.dedent(lie), TESTS, "add")


@pytest.mark.parametrize("layers", MODES[:2], ids="+".join)
def test_hostile_programs_fail_and_leave_nothing(outside, layers, monkeypatch, tmp_path):
    monkeypatch.setenv(SECRET, SECRET)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    named = list(programs(outside))
    before = tree(outside)

    # what only waits for its end waits beside the others
    outcomes = dict(many([program for _, program in named], workers=8, layers=layers, **LIMITS))

    ends = {name: outcomes[i] for i, (name, _) in enumerate(named)}
    assert {name: outcome for name, outcome in ends.items() if outcome.passed} == {}
    assert all(outcome.layers == layers and outcome.seconds < 30 for outcome in ends.values())
    assert not any("sandbox itself" in outcome.reason for outcome in ends.values())
    assert tree(outside) == before
    assert left_over() == set()
    assert os.listdir(tmp_path) == []
    for name, expected in REASONS.items():
        assert expected in ends[name].reason, (name, ends[name])


REASONS = {
    "endless loop": "took longer than 0.7 s",
    "one large piece": "MemoryError",
    "the parent's environment": "/proc",
    "hard exit before the tests": "exit status 0",
    "segfault": "SIGSEGV",
    "wrong": "AssertionError",
    "an object that is no value": "no plain value",
    "no function": "KeyError",
}


def test_without_root(outside):
    """The same as a user without rights, with a Python that everyone can read."""
    python = next((p for p in (os.path.realpath(sys.executable), "/usr/bin/python3") if _serves(p)), None)
    if os.getuid() != 0 or python is None:
        pytest.skip("not root, or no Python of 3.11 or newer that everyone can run")
    folder = outside / "program" / "jobs"
    folder.mkdir(parents=True)
    source = os.path.dirname(sandbox.__file__)
    for name in ("sandbox.py", "sandbox_inside.py", "sandbox_layers.py"):
        shutil.copy(f"{source}/{name}", folder / name)
    named = list(programs(outside))
    before = tree(outside)
    told = [vars(program) for _, program in named]
    script = (
        "import json, sys\nfrom jobs.sandbox import Program, many\n"
        "programs = [Program(**p) for p in json.load(sys.stdin)]\n"
        f"done = many(programs, workers=8, layers={MODES[2]}, **{LIMITS})\n"
        "print(json.dumps([[i, o.passed, o.reason, o.layers] for i, o in done]))"
    )
    result = subprocess.run(
        [python, "-B", "-c", script],
        input=json.dumps([*told, {"solution": RIGHT, "tests": TESTS, "entry_point": "add"}]),
        cwd=folder.parent,
        env={SECRET: SECRET},
        user=65534,
        group=65534,
        extra_groups=[],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    ends = {i: (passed, reason) for i, passed, reason, _ in json.loads(result.stdout)}
    assert [named[i][0] for i in range(len(named)) if ends[i][0]] == []
    assert ends[len(named)] == (True, "")
    assert tree(outside) == before


def _serves(python):
    probe = [python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
    try:
        return subprocess.run(probe, user=65534, cwd="/", stderr=subprocess.DEVNULL).returncode == 0
    except OSError:
        return False


@pytest.mark.parametrize("layers", MODES, ids="+".join)
def test_honest_programs_pass(layers):
    written = """
        import collections, math, os, random, re, tempfile, threading
        import numpy
        def work(x):
            print("what is printed goes nowhere" * 100)
            with open("scratch.txt", "w") as f: f.write(str(x))
            with tempfile.TemporaryFile(dir=".") as f: f.write(b"x")
            with open(os.devnull, "w") as f: f.write("nowhere")
            assert open(os.devnull).read() == "" and len(open("/dev/urandom", "rb").read(8)) == 8
            done = []
            t = threading.Thread(target=done.append, args=(1,)); t.start(); t.join()
            assert done
            return numpy.float64(open("scratch.txt").read())
        """
    values = "def same(x): return x"
    tests = """
        for x in (None, True, 0, -(1 << 200), 1.5, float("inf"), "ä\\ud800\\0", b"\\xff", 2j, [1, (2, [3])],
                  {1: {2: "x"}}, {(1, 2): None}, {1, 2}, frozenset("ab"), [], "", [["int", "0x1"]]):
            assert same(x) == x and type(same(x)) is type(x), x
        assert same(float("nan")) != same(float("nan"))
        """
    raising = "def fail(x): raise ValueError(x)"
    raises = """
        try: fail("why")
        except ValueError as error: assert str(error) == "why"
        else: assert False
        """
    helper = "import math\ndef twice(x):\n    return 2 * x\ndef add(a, b):\n    '''Sum.'''\n"
    honest = [
        Program(RIGHT, TESTS, "add"),
        Program(textwrap.dedent(written), "assert abs(work(2) - 2.0) < 1e-6", "work"),
        Program(values, textwrap.dedent(tests), "same"),
        Program(raising, textwrap.dedent(raises), "fail"),
        Program(RIGHT, "assert twice(add(1, 2)) == math.floor(6.5)", "add", preamble=helper),
    ]
    outcomes = dict(many(honest, workers=2, seconds=20.0, layers=layers))
    assert [outcomes[i].reason for i in range(len(honest))] == [""] * len(honest)
    assert all(outcome.passed for outcome in outcomes.values())


def test_a_program_does_not_read_what_its_tests_print():
    spy = "import os\ndef add(a, b): return os.pread(1, 99, 0)"
    tests = "print('the answer is 3', flush=True)\nassert add(1, 2) == b''"
    assert run(Program(spy, tests, "add"), seconds=20.0).reason == ""


def test_a_reason_is_text_that_files_take():
    outcome = run(Program("raise ValueError('\\ud800')", TESTS, "add"), seconds=20.0)
    assert outcome.reason == "ValueError: ?"


def test_it_refuses_where_nothing_confines():
    program = Program(RIGHT, TESTS, "add")
    for layers in ((), ("seccomp",), ("landlock",)):
        with pytest.raises(SandboxError, match="cannot be kept from files and network"):
            run(program, layers=layers)
    outcome = run(program, layers=(), unconfined=True, seconds=20.0)
    assert outcome.passed
    assert outcome.layers == ()
    assert not run(Program("while True: pass", TESTS, "add"), layers=(), unconfined=True, seconds=0.3).passed


def test_answers_of_humaneval_pass():
    """The canonical solutions, and none of them with `return None` in front."""
    places = [os.environ.get("INGOT_TEST_DATA", ""), str(pathlib.Path(__file__).parents[3] / "shared" / "data")]
    files = [f for place in places for f in pathlib.Path(place or "/none").glob("**/HumanEval.jsonl.gz")]
    if not files:
        pytest.skip("no HumanEval.jsonl.gz below $INGOT_TEST_DATA")
    tasks = [json.loads(line) for line in gzip.decompress(files[0].read_bytes()).splitlines()]
    assert len(tasks) == 164

    def program(task, body):
        tests = f"{task['test']}\ncheck({task['entry_point']})"
        return Program(task["prompt"] + body, tests, task["entry_point"], task["prompt"])

    right = [program(task, task["canonical_solution"]) for task in tasks]
    tasks, right = tasks[::3], right[::3]  # all pass; these take seconds
    outcomes = dict(many(right, workers=2, seconds=20.0))
    assert {tasks[i]["task_id"]: o.reason for i, o in outcomes.items() if not o.passed} == {}
    wrong = [program(task, "    return None\n" + task["canonical_solution"]) for task in tasks[::6]]
    assert not any(outcome.passed for _, outcome in many(wrong, workers=2, seconds=20.0))
