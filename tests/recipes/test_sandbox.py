"""Programs that attack the machine, and programs that attack the verdict.

Skipped only where the machine has no namespaces for this user; that such a machine is refused is
tested everywhere.
"""

import math
import os
import secrets
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from deepzoo.recipes.parts import sandbox
from deepzoo.recipes.parts.sandbox import Limits, SandboxFailure, SandboxUnavailable


def available() -> str:
    try:
        sandbox.check()
    except SandboxUnavailable as error:
        return str(error)
    return ""


why = available()
needs_namespaces = pytest.mark.skipif(bool(why), reason=why or "there are namespaces")
QUICK = Limits(cpu=1, wall=30.0, processes=6)  # the machine may be busy


def program(source: str) -> str:
    return textwrap.dedent(source)


def namespaces() -> set[str]:
    found = set()
    for path in Path("/proc").glob("[0-9]*/ns/pid"):
        try:
            found.add(os.readlink(path))
        except OSError:
            continue
    return found


@pytest.fixture
def nothing_left():
    """No process of a sandbox outlives it."""
    before = namespaces()
    yield
    until = time.monotonic() + 10
    while namespaces() - before and time.monotonic() < until:
        time.sleep(0.05)
    assert not namespaces() - before


def run(source: str, given: str = "", limits: Limits = QUICK) -> sandbox.Result:
    return sandbox.execute(program(source), given, limits)


def say_if_it_works(action: str) -> str:
    body = textwrap.indent(program(action), "    ")
    return (
        f"import ctypes, os, signal, socket, sys\ntry:\n{body}\nexcept BaseException as error:\n"
        "    print('refused:', type(error).__name__, error)\nelse:\n    print('WORKS')\n"
    )


@needs_namespaces
@pytest.mark.usefixtures("nothing_left")
class TestTheMachine:
    def refused(self, action: str, given: str = "") -> str:
        out = run(say_if_it_works(action), given).stdout.decode()
        assert out.startswith("refused:"), out
        return out

    def test_an_honest_program_runs(self):
        result = run("print(sum(map(int, input().split())))", "2 3")
        assert (result.end, result.status, result.stdout) == ("exit", 0, b"5\n")
        result = run("import json, math, re, collections, itertools; print(math.comb(6, 3))")
        assert result.stdout == b"20\n"

    def test_no_network(self):
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(0.2)
            port = server.getsockname()[1]
            self.refused(f"socket.create_connection(('127.0.0.1', {port}), 1)")
            with pytest.raises(TimeoutError):
                server.accept()

    def test_no_abstract_socket_of_the_machine(self):
        name = f"\\0deepzoo-{secrets.token_hex(4)}"
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(name.replace("\\0", "\0"))
            server.listen()
            self.refused(f"socket.socket(socket.AF_UNIX).connect('{name}')")

    @pytest.mark.parametrize(
        "path", ["~/x", "/etc/passwd", "/proc/1/environ", "/proc/self/environ", "/sys/kernel"]
    )
    def test_nothing_to_read(self, path, tmp_path):
        (tmp_path / "x").write_text("secret")
        path = path.replace("~", str(tmp_path))
        assert os.path.exists(path)
        assert "No such file" in self.refused(f"os.stat({path!r})")
        assert "No such file" in self.refused(f"os.stat({str(Path(__file__).parent)!r})")

    def test_the_environment_is_three_names(self, monkeypatch):
        monkeypatch.setenv("API_KEY", "secret")
        out = run("import os; print(sorted(os.environ))").stdout.decode()
        assert out.strip() == "['HOME', 'LANG', 'PATH']"
        # Nor does process 1 hold it, were it readable.
        self.refused(
            "libc = ctypes.CDLL(None, use_errno=True)\n"
            "if libc.ptrace(16, 1, 0, 0) < 0: raise OSError(ctypes.get_errno(), 'ptrace')"
        )

    def test_no_process_of_the_machine_can_be_reached(self):
        self.refused(f"os.kill({os.getpid()}, 0)")
        out = run(
            """
            import os, signal
            seen = []
            for pid in range(3, 5000):
                try: os.kill(pid, 0); seen.append(pid)
                except OSError: pass
            print(os.getpid(), os.getppid(), seen)
            """
        ).stdout.decode()
        assert out.strip() == "2 1 []"

    def test_process_one_survives_its_program(self):
        result = run(
            "import os\ntry:\n    os.kill(1, 9)\nexcept OSError as error:\n    print(error)\n"
            "import time; time.sleep(0.2); print('here')"
        )
        assert result.stdout.decode().endswith("here\n")

    @pytest.mark.parametrize(
        "folder", ["/", "/usr", "/usr/lib", "/dev", "/dev/shm", "/var/tmp", "/etc", sys.base_prefix]
    )
    def test_nothing_can_be_written_but_in_tmp(self, folder):
        name = f"{folder}/deepzoo-{secrets.token_hex(4)}"
        self.refused(f"open({name!r}, 'w')")
        assert not os.path.exists(name)

    def test_tmp_is_its_own_and_small(self):
        name = f"/tmp/deepzoo-{secrets.token_hex(4)}"
        assert run(f"open({name!r}, 'w').write('x'); print(1)").stdout == b"1\n"
        assert not os.path.exists(name)
        self.refused(
            "for i in range(100): open(f'/tmp/{i}', 'wb').write(bytes(1 << 20))"
        )  # 32 MiB are there
        result = run("f = open('/tmp/x', 'wb')\nfor _ in range(300): f.write(bytes(1 << 20))")
        assert result.end == "signal" or result.status == 1

    def test_the_tree_stays_read_only(self):
        self.refused(
            "libc = ctypes.CDLL(None, use_errno=True)\n"
            "if libc.mount(b'none', b'/usr', None, 0x20 | 0x1000, None) < 0:"
            " raise OSError(ctypes.get_errno(), 'mount')"
        )

    def test_no_rights_and_no_way_to_them(self):
        self.refused("os.unshare(os.CLONE_NEWUSER)")
        self.refused("os.setuid(0)")
        self.refused("os.chroot('/tmp')")
        out = run(
            """
            import ctypes
            libc = ctypes.CDLL(None)
            class Header(ctypes.Structure):
                _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]
            data = (ctypes.c_uint32 * 6)()
            libc.capget(ctypes.byref(Header(0x20080522, 0)), data)
            bound = [c for c in range(64) if libc.prctl(23, c, 0, 0, 0) == 1]
            print(list(data), bound, libc.prctl(39, 0, 0, 0, 0))
            """
        ).stdout.decode()
        assert out.strip() == "[0, 0, 0, 0, 0, 0] [] 1"

    def test_memory_is_limited(self):
        assert "MemoryError" in self.refused("bytearray(1 << 30)")

    def test_processes_are_limited(self):
        source = """
            import os, time
            made = 0
            try:
                for _ in range(300):
                    if os.fork() == 0:
                        time.sleep(60)
                    made += 1
            except OSError:
                pass
            print(made)
            """
        made = int(run(source).stdout)
        assert made < QUICK.processes

    def test_time_is_limited(self):
        result = run("while True: pass", limits=Limits(cpu=1, wall=120.0))
        assert (result.end, result.status) in [("signal", signal.SIGKILL), ("signal", 24)]
        result = run("import time; time.sleep(600)", limits=Limits(wall=0.5))
        assert result.end == "wall"

    def test_output_is_limited(self):
        begin = time.monotonic()
        result = run("import os\nwhile True: os.write(1, b'x' * 65536)")
        assert result.end == "output"
        assert len(result.stdout) == sandbox.OUTPUT
        assert time.monotonic() - begin < 20
        result = run("import os\nwhile True: os.write(2, b'x' * 65536)")
        assert result.end == "output"

    def test_no_descriptor_of_the_parent_is_open(self, tmp_path):
        with (tmp_path / "x").open("w") as file:
            os.set_inheritable(file.fileno(), True)
            out = run(
                """
                import os
                found = []
                for number in range(64):
                    try: os.fstat(number); found.append(number)
                    except OSError: pass
                print(found)
                """
            ).stdout.decode()
        # Not even the one that messages go through.
        assert out.strip() == "[0, 1, 2, 3]" or out.strip() == "[0, 1, 2]"

    def test_a_child_that_holds_the_pipe_ends_with_the_program(self):
        begin = time.monotonic()
        result = run("import os, time\nif os.fork() == 0:\n    time.sleep(600)\nprint(1)")
        assert (result.end, result.stdout) == ("exit", b"1\n")
        assert time.monotonic() - begin < 20

    @pytest.mark.parametrize("text", [b"\xff\xfe\0\x1b[2J", b"x" * 60000 + b"\n"])
    def test_any_bytes_come_back_as_they_are(self, text):
        assert run(f"import os; os.write(1, {text!r})").stdout == text

    def test_it_ends_with_the_process_that_asked(self):
        source = (
            "from deepzoo.recipes.parts import sandbox\nprint('on', flush=True)\n"
            "sandbox.execute('import time; time.sleep(600)', limits=sandbox.Limits(wall=600))"
        )
        before = namespaces()
        with subprocess.Popen(
            [sys.executable, "-c", source], stdout=subprocess.PIPE, text=True
        ) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "on\n"
            until = time.monotonic() + 20
            while not namespaces() - before and time.monotonic() < until:
                time.sleep(0.02)
            assert namespaces() - before
            child.kill()  # the fixture sees that nothing is left


SUM = [("2 3\n", "5\n"), ("10 20\n", "30\n")]


@needs_namespaces
class TestTheVerdict:
    @pytest.mark.parametrize(
        "source",
        [
            "print(sum(map(int, input().split())))",
            "a, b = map(int, input().split())\nprint(a + b, end='')",
            "import sys\na, b = map(int, sys.stdin.read().split())\nprint(f'{a + b}  \\n\\n')",
        ],
    )
    def test_right_programs(self, source):
        assert sandbox.solves(source, SUM, QUICK) == (1.0, "")

    @pytest.mark.parametrize(
        ("source", "reason"),
        [
            ("", "test 1: another output"),
            ("print(5)", "test 2: another output"),
            ("import sys; sys.exit(0)", "test 1: another output"),
            ("import os; os._exit(0)", "test 1: another output"),
            ("print('ALL TESTS PASSED'); import sys; sys.exit(0)", "test 1: another output"),
            ("print(5); print('5')", "test 1: another output"),
            ("print(5); raise SystemExit(3)", "test 1: status 3"),
            ("this is no program", "test 1: status 1"),
            ("import sys\nprint(sys.argv, end='')", "test 1: another output"),
            ("import builtins\nbuiltins.print = lambda *a: None\nprint(5)", "test 1: another"),
            (
                "class A(int):\n    def __eq__(self, other): return True\n"
                "    def __str__(self): return '6'\nprint(A(5))",
                "test 1: another output",
            ),
            ("open('/tmp/program.py', 'w').write('x')", "test 1: status 1"),
            ("import os\nos.write(1, b'5\\n' * 40000)", "test 1: output"),
            ("while True: pass", "test 1: signal"),
            ("import os; os.kill(os.getpid(), 9)", "test 1: signal"),
            (
                "import json\nfor n in range(3, 64):\n    try:\n        f = open(n, 'w')\n"
                "        f.write(json.dumps({'what': 'ended', 'status': 0}) + '\\n')\n"
                "    except OSError: pass\nprint('no')",
                "test 1: ",
            ),
        ],
    )
    def test_tricks_are_worth_nothing(self, source, reason):
        reward, told = sandbox.solves(source, SUM, QUICK)
        assert reward == 0.0
        assert told.startswith(reason)

    def test_no_tests_are_no_pass(self):
        with pytest.raises(ValueError, match="no tests"):
            sandbox.solves("print(5)", [])

    def test_a_sandbox_that_fails_gives_no_verdict(self, monkeypatch):
        monkeypatch.setattr(sandbox, "_VISIBLE", ())  # Python cannot start in there
        reward, told = sandbox.solves("print(5)", [("", "5")], QUICK)
        assert math.isnan(reward)
        assert told.startswith("sandbox:")

    def test_nor_does_one_that_cannot_be_started(self, monkeypatch):
        def fails(*args, **options):
            raise BlockingIOError(11, "Resource temporarily unavailable")

        monkeypatch.setattr(subprocess, "Popen", fails)
        before = len(os.listdir("/proc/self/fd"))
        reward, told = sandbox.solves("print(5)", [("", "5")], QUICK)
        assert math.isnan(reward)
        assert "temporarily unavailable" in told
        assert len(os.listdir("/proc/self/fd")) == before


class TestWithoutIsolation:
    def test_nothing_runs_where_a_namespace_is_refused(self, monkeypatch, tmp_path):
        init = Path(sandbox.__file__).with_name("sandbox_init.py").read_text()
        weak = tmp_path / "weak.py"
        weak.write_text(
            init.replace("import sys\n", "import sys\n\ndef no(flags): raise OSError(1, 'no')\n\n"
            "os.unshare = no\n", 1)
        )  # fmt: skip
        monkeypatch.setattr(sandbox, "_INIT", weak)
        with pytest.raises(SandboxFailure, match="no"):
            sandbox.execute(f"open('{tmp_path}/ran', 'w')")
        assert not (tmp_path / "ran").exists()
        with pytest.raises(SandboxUnavailable, match="allow user namespaces"):
            sandbox.check()

    def test_other_systems_are_refused(self, monkeypatch):
        monkeypatch.setattr(sys, "platform", "darwin")
        with pytest.raises(SandboxUnavailable, match="on Linux alone"):
            sandbox.check()

    @needs_namespaces
    @pytest.mark.parametrize(
        ("line", "instead", "fault"),
        [
            ('os.chroot("/root")', "pass", "programs cannot"),
            ('order["environment"]', 'os.environ | {"A": "b"}', "has the environment"),
            ("NEWNS | NEWPID |", "NEWNS |", "sees other processes"),
        ],
    )
    def test_a_sandbox_with_a_hole_is_noticed(self, monkeypatch, tmp_path, line, instead, fault):
        init = Path(sandbox.__file__).with_name("sandbox_init.py").read_text()
        assert line in init
        weak = tmp_path / "weak.py"
        weak.write_text(init.replace(line, instead))
        monkeypatch.setattr(sandbox, "_INIT", weak)
        with pytest.raises(SandboxUnavailable, match=fault):
            sandbox.check()

    @needs_namespaces
    def test_a_folder_too_many_is_noticed(self, monkeypatch):
        monkeypatch.setattr(sandbox, "_VISIBLE", (*sandbox._VISIBLE, "/etc/passwd"))
        with pytest.raises(SandboxUnavailable, match="sees the system"):
            sandbox.check()


@needs_namespaces
def test_it_works_for_a_user_without_rights():
    if os.geteuid():
        pytest.skip("that is who this test runs as")
    source = (
        f"import sys; sys.path[:0] = {sys.path!r}\n"
        "from deepzoo.recipes.parts import sandbox\nsandbox.check()\n"
        "print(sandbox.solves('print(input())', [('a', 'a')]))\n"
        "made = sandbox.execute('import os\\nn = 0\\ntry:\\n  while n < 300:\\n"
        "    if not os.fork(): os.read(9, 1)\\n    n += 1\\nexcept OSError: print(n)')\n"
        "print(int(made.stdout or b'999') < 8)"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", source], user=12345, group=12345, extra_groups=[],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    except PermissionError:
        pytest.skip("Python itself lies where only root may read")
    assert done.stdout.split("\n")[:2] == ["(1.0, '')", "True"], done.stderr
