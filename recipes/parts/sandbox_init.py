"""Runs one program in namespaces of its own; `sandbox.py` starts this file, nothing imports it.

Needs Linux 5.12 and Python's standard library alone. Fails closed: a step that does not succeed is
told and the program never starts.

    parent                                          sandbox.execute: keeps the tests, compares
      outer      new user, mount, pid, network, ipc, uts namespaces; waits
        init     pid 1: mounts a root of its own, waits; when it ends, the kernel ends all others
          program    no rights, limits, a root it cannot leave, an environment of three names

Argument: the number of a descriptor that holds the order as JSON; messages go, as lines of JSON,
to the descriptor it names.
"""

import ctypes
import json
import os
import resource
import signal
import sys

UNKNOWN = 65534  # a user and a group that own nothing
NEWUSER, NEWNS, NEWPID, NEWNET, NEWIPC, NEWUTS = (
    os.CLONE_NEWUSER, os.CLONE_NEWNS, os.CLONE_NEWPID,
    os.CLONE_NEWNET, os.CLONE_NEWIPC, os.CLONE_NEWUTS,
)  # fmt: skip
NOSUID, NODEV, NOEXEC, REC, BIND, PRIVATE = 2, 4, 8, 0x4000, 0x1000, 1 << 18
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV = 1, 2, 4
PDEATHSIG, DUMPABLE, NO_NEW_PRIVS, CAPBSET_DROP = 1, 4, 38, 24
# mount_setattr has one number everywhere; the other two are older than that custom.
NUMBERS = {
    "x86_64": {"pivot_root": 155, "keyctl": 250},
    "aarch64": {"pivot_root": 41, "keyctl": 219},
}
MOUNT_SETATTR, AT_RECURSIVE, AT_FDCWD, DETACH = 442, 0x8000, -100, 2

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


def checked(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    words = [None if w is None else os.fsencode(w) for w in (source, target, kind)]
    more = None if data is None else data.encode()
    checked(libc.mount(*words, ctypes.c_ulong(flags), more), f"mount on {target}")


def show(path: str, root: str) -> None:
    """Makes a folder or file of the host visible under the new root, read-only all the way down."""
    target = root + path
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    mount(path, target, None, BIND | REC)
    if path.startswith("/dev/"):
        return
    flags = ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV
    attributes = (ctypes.c_uint64 * 4)(flags, 0, 0, 0)
    result = libc.syscall(
        MOUNT_SETATTR, AT_FDCWD, os.fsencode(target), AT_RECURSIVE, attributes,
        ctypes.c_size_t(ctypes.sizeof(attributes)),
    )  # fmt: skip
    checked(result, f"read-only {path}")


def build_root(order: dict) -> None:
    """A root with the system's programs and libraries, Python, three devices, an empty /tmp."""
    mount("none", "/", None, PRIVATE | REC)
    new = "/tmp"  # any folder will do: the mount hides it for this namespace only
    mount("tmpfs", new, "tmpfs", NOSUID | NODEV, "size=1m,mode=755")
    root = f"{new}/root"
    os.mkdir(root)
    for path in order["visible"]:
        if os.path.islink(path):
            os.symlink(os.readlink(path), root + path)
        elif os.path.exists(path):
            show(path, root)
    scratch = f"{root}/tmp"
    os.mkdir(scratch)
    options = f"size={order['disk']},nr_inodes=4096,mode=777"
    mount("tmpfs", scratch, "tmpfs", NOSUID | NODEV, options)
    with open(f"{scratch}/program.py", "x", encoding="utf-8", errors="surrogateescape") as file:
        file.write(order["source"])
    os.chmod(f"{scratch}/program.py", 0o444)
    os.chdir(new)
    os.mkdir("old")
    number = NUMBERS[os.uname().machine]["pivot_root"]
    checked(libc.syscall(number, b".", b"old"), "pivot_root")
    os.chdir("/")
    checked(libc.umount2(b"/old", DETACH), "umount")
    os.rmdir("/old")
    # Read-only as well: nothing can be put beside the folders shown.
    mount("none", "/", None, 0x20 | BIND | 1 | NOSUID | NODEV)


def map_user() -> None:
    """The unknown user inside is whoever runs this outside; groups cannot be changed any more."""
    user, group = os.getuid(), os.getgid()
    os.unshare(NEWUSER | NEWNS | NEWPID | NEWNET | NEWIPC | NEWUTS)
    texts = {"setgroups": "deny", "uid_map": f"{UNKNOWN} {user} 1"}
    for name, text in (texts | {"gid_map": f"{UNKNOWN} {group} 1"}).items():
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def become_program(order: dict, was_root: bool, files: tuple[int, ...]) -> None:
    """Gives up every right and becomes the program."""
    if was_root:
        os.setgroups([])
        os.setresgid(UNKNOWN, UNKNOWN, UNKNOWN)
        os.setresuid(UNKNOWN, UNKNOWN, UNKNOWN)
        # Its own processes are then counted apart from those that this user has elsewhere.
        os.unshare(NEWUSER)
    # In a root that is not its namespace's own nobody may make user namespaces: no way to rights.
    os.chroot("/root")
    os.chdir("/tmp")
    os.setsid()
    join_session = 1
    libc.syscall(NUMBERS[os.uname().machine]["keyctl"], join_session, None)
    for name, value in order["limits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    checked(libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    capability = 0
    while libc.prctl(CAPBSET_DROP, capability, 0, 0, 0) == 0:
        capability += 1
    for number in files:
        os.set_inheritable(number, False)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.execve(order["argv"][0], order["argv"], order["environment"])


def init(order: dict, told: int, was_root: bool, ready: int, go: int) -> None:
    """Process 1 of the namespace."""
    checked(libc.prctl(PDEATHSIG, signal.SIGKILL, 0, 0, 0), "death signal")
    checked(libc.prctl(DUMPABLE, 0, 0, 0, 0), "dumpable")  # the program cannot trace it
    os.write(ready, b"1")
    if os.read(go, 1) != b"1":  # the outer process has died before the signal was set
        os._exit(1)
    build_root(order)
    if libc.sethostname(b"sandbox", 7) < 0:
        raise OSError("sethostname")
    failed, failing = os.pipe()
    program = os.fork()
    if not program:
        try:
            os.close(failed)
            become_program(order, was_root, (told, failing))
        except BaseException as error:
            os.write(failing, str(error).encode()[:500] or b"?")
        os._exit(127)
    os.close(failing)
    if text := os.read(failed, 500):
        raise OSError(text.decode(errors="replace"))
    say(told, order, "started")
    while True:
        pid, status = os.wait()
        if pid == program:
            code = os.waitstatus_to_exitcode(status)
            say(told, order, "ended", status=code)
            os._exit(0)


def say(told: int, order: dict, what: str, **more: object) -> None:
    line = json.dumps({"nonce": order["nonce"], "what": what, **more})
    os.write(told, f"{line}\n".encode())


def main() -> None:
    checked(libc.prctl(PDEATHSIG, signal.SIGKILL, 0, 0, 0), "death signal")
    with open(int(sys.argv[1]), encoding="utf-8", errors="surrogateescape") as file:
        order = json.load(file)
    told = order["told"]
    if os.getppid() != order["parent"]:
        os._exit(1)
    try:
        was_root = os.geteuid() == 0
        if was_root:
            os.unshare(NEWNS | NEWPID | NEWNET | NEWIPC | NEWUTS)
        else:
            map_user()
        (is_ready, ready), (go, going) = os.pipe(), os.pipe()
        child = os.fork()
        if not child:
            try:
                os.close(is_ready)
                os.close(going)
                init(order, told, was_root, ready, go)
            except BaseException as error:
                say(told, order, "failed", why=str(error)[:500])
            os._exit(1)
        os.close(ready)
        os.close(go)
        if os.read(is_ready, 1):
            os.write(going, b"1")
        os.close(0)
        os.close(1)
        os.close(2)
        os.waitpid(child, 0)
    except BaseException as error:
        say(told, order, "failed", why=str(error)[:500])
    os._exit(0)


if __name__ == "__main__":
    main()
