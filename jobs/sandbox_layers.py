"""What Linux offers to confine a process: namespaces, Landlock, seccomp and resource limits, called through ctypes.

Imports nothing but the standard library: it runs in processes that see no more than the Python installation.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import stat
import struct
import sys
from collections.abc import Iterable

_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None

# Devices that programs may open, by their numbers: what is written to them is gone.
DEVICES = {"/dev/null": (1, 3), "/dev/urandom": (1, 9)}

# Names and numbers of the system calls that a program may make: x86_64, aarch64; None where there is no such call.
# What is not here fails with EPERM. Above all there is no socket, execve, kill, ptrace, process_vm_readv, mount, chmod,
# io_uring, memfd_create or shmget; clone makes threads only.
_CALLS = {
    "read": (0, 63), "write": (1, 64), "open": (2, None), "close": (3, 57), "stat": (4, None), "fstat": (5, 80),
    "lstat": (6, None), "poll": (7, None), "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226),
    "munmap": (11, 215), "brk": (12, 214), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "ioctl": (16, 29), "pread64": (17, 67), "pwrite64": (18, 68), "readv": (19, 65),
    "writev": (20, 66), "access": (21, None), "pipe": (22, None), "select": (23, None), "sched_yield": (24, 124),
    "mremap": (25, 216), "madvise": (28, 233), "dup": (32, 23), "dup2": (33, None), "pause": (34, None),
    "nanosleep": (35, 101), "getitimer": (36, 102), "alarm": (37, None), "setitimer": (38, 103), "getpid": (39, 172),
    "clone": (56, 220), "exit": (60, 93), "uname": (63, 160), "fcntl": (72, 25), "flock": (73, 32),
    "fsync": (74, 82), "fdatasync": (75, 83), "ftruncate": (77, 46), "getcwd": (79, 17), "chdir": (80, 49),
    "fchdir": (81, 50), "rename": (82, None), "creat": (85, None), "unlink": (87, None), "readlink": (89, None),
    "umask": (95, 166), "gettimeofday": (96, 169), "getrlimit": (97, 163), "getrusage": (98, 165),
    "sysinfo": (99, 179), "times": (100, 153), "getuid": (102, 174), "getgid": (104, 176), "geteuid": (107, 175),
    "getegid": (108, 177), "getppid": (110, 173), "getpgrp": (111, None), "getgroups": (115, 158),
    "getresuid": (118, 148), "getresgid": (120, 150), "getpgid": (121, 155), "getsid": (124, 156),
    "rt_sigpending": (127, 136), "rt_sigtimedwait": (128, 137), "rt_sigsuspend": (130, 133),
    "sigaltstack": (131, 132), "statfs": (137, 43), "fstatfs": (138, 44), "getpriority": (140, 141),
    "sched_getparam": (143, 121), "sched_getscheduler": (145, 120), "sched_get_priority_max": (146, 125),
    "sched_get_priority_min": (147, 126), "prctl": (157, 167), "arch_prctl": (158, None), "gettid": (186, 178),
    "time": (201, None), "futex": (202, 98), "sched_getaffinity": (204, 123), "epoll_create": (213, None),
    "getdents64": (217, 61), "set_tid_address": (218, 96), "restart_syscall": (219, 128), "fadvise64": (221, 223),
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "exit_group": (231, 94),
    "epoll_wait": (232, None), "epoll_ctl": (233, 21), "tgkill": (234, 131), "openat": (257, 56),
    "newfstatat": (262, 79), "unlinkat": (263, 35), "renameat": (264, 38), "readlinkat": (267, 78),
    "faccessat": (269, 48), "pselect6": (270, 72), "ppoll": (271, 73), "set_robust_list": (273, 99),
    "epoll_pwait": (281, 22), "eventfd2": (290, 19), "epoll_create1": (291, 20), "dup3": (292, 24),
    "pipe2": (293, 59), "preadv": (295, 69), "pwritev": (296, 70), "prlimit64": (302, 261), "getcpu": (309, 168),
    "renameat2": (316, 276), "getrandom": (318, 278), "membarrier": (324, 283), "statx": (332, 291),
    "rseq": (334, 293), "clone3": (435, 435), "close_range": (436, 436), "openat2": (437, 437),
    "faccessat2": (439, 439),
}  # fmt: skip
_CHANGES_FILES = {"ftruncate", "rename", "creat", "unlink", "unlinkat", "renameat", "renameat2"}
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH_*
_PIVOT_ROOT, _CAPSET, _MOUNT_SETATTR = {"x86_64": (155, 126, 442), "aarch64": (41, 91, 442)}.get(
    platform.machine(), (None, None, None)
)

_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_JMP|JSET|K, BPF_RET|K
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _EROFS, _ENOSYS = 1, 30, 38


def _call(number: int, *arguments: object) -> int:
    result = _libc.syscall(number, *[ctypes.c_long(a) if isinstance(a, int) else a for a in arguments])
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _checked(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def die_with_parent() -> None:
    """Have this process killed when the one that started it ends."""
    if _libc is not None:
        _checked(_libc.prctl(1, 9, 0, 0, 0))  # PR_SET_PDEATHSIG


def limit(*, seconds: float, memory: int, disk: int, child_processes: bool) -> None:
    """Resource limits of this process: CPU seconds, bytes of address space, bytes of a file, open files.

    Args:
        seconds: of wall time that are given; the CPU time is cut a second later.
        memory: bytes.
        disk: bytes.
        child_processes: whether nothing else keeps this process from starting others.
    """
    bounds = {"RLIMIT_AS": memory, "RLIMIT_CPU": int(seconds) + 2, "RLIMIT_FSIZE": disk, "RLIMIT_NOFILE": 64}
    bounds |= {"RLIMIT_CORE": 0, "RLIMIT_MEMLOCK": 0, "RLIMIT_MSGQUEUE": 0}
    if child_processes:
        bounds["RLIMIT_NPROC"] = 256  # counts the user's other processes too, and not at all for root
    for name, value in bounds.items():
        if hasattr(resource, name):
            _, hard = resource.getrlimit(getattr(resource, name))
            bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
            try:
                resource.setrlimit(getattr(resource, name), (bound, bound))
            except (ValueError, OSError):
                if name != "RLIMIT_AS":  # macOS does not limit the address space
                    raise


def enter_namespaces(root: str, readable: Iterable[str], *, disk: int, files: int) -> None:
    """Give this process a network without interfaces and a tree of its own, in which only ``/scratch`` is writable.

    The tree holds what ``readable`` names, read-only and under the same paths, and no /proc or /sys. Devices cannot be
    opened, but for those of ``DEVICES``.

    Args:
        root: an empty folder; it is unchanged outside.
        readable: files and folders; those that do not exist are left out.
        disk: bytes that ``/scratch`` holds, in memory.
        files: how many.

    Raises:
        OSError: the kernel or its administrator does not allow it.
    """
    new_user, new_mount, new_ipc, new_uts, new_net = 0x10000000, 0x00020000, 0x08000000, 0x04000000, 0x40000000
    others = new_mount | new_ipc | new_uts | new_net
    uid, gid = os.getuid(), os.getgid()
    if _libc.unshare(new_user | others) == 0:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    else:  # root where user namespaces are switched off
        _checked(_libc.unshare(others))
    _mount(None, "/", None, 16384 | 1 << 18)  # MS_REC, MS_PRIVATE: nothing of this is seen outside
    _mount("tmpfs", root, "tmpfs", 2 | 4, "size=1m,mode=755")  # MS_NOSUID, MS_NODEV
    try:
        _build_tree(root, readable, disk=disk, files=files)
    except OSError:
        os.chdir("/")
        _libc.umount2(os.fsencode(root), 2)
        raise
    _checked(_libc.umount2(b".", 2))  # MNT_DETACH: the tree of before, which lies over the new one
    os.chdir("/scratch")


def _build_tree(root: str, readable: Iterable[str], *, disk: int, files: int) -> None:
    """Fill the tree below ``root`` and make it this process's."""
    read_only, no_suid, no_dev, no_exec, bind, recursive = 1, 2, 4, 8, 4096, 16384
    bound: list[str] = []
    for path in sorted({os.path.abspath(p) for p in readable if os.path.exists(p)}, key=len):
        if any(path == b or path.startswith(f"{b}/") for b in bound):
            continue
        target = root + path
        os.makedirs(target if os.path.isdir(path) else os.path.dirname(target), exist_ok=True)
        if not os.path.isdir(path):
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
        _mount(os.path.realpath(path), target, None, bind | recursive)
        _make_read_only(target, device=is_harmless_device(path))
        bound.append(path)
    os.makedirs(f"{root}/scratch", exist_ok=True)
    _mount("tmpfs", f"{root}/scratch", "tmpfs", no_suid | no_dev | no_exec, f"size={disk},nr_inodes={files},mode=700")
    _mount(None, root, None, 32 | read_only | no_suid | no_dev)  # MS_REMOUNT
    os.chdir(root)
    _call(_PIVOT_ROOT, ctypes.c_char_p(b"."), ctypes.c_char_p(b"."))


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    words = [None if text is None else os.fsencode(text) for text in (source, target, kind, options)]
    _checked(_libc.mount(words[0], words[1], words[2], ctypes.c_ulong(flags), words[3]))


def is_harmless_device(path: str) -> bool:
    """Whether it is one of ``DEVICES``, and not something else by its name."""
    status = os.stat(path)
    number = os.major(status.st_rdev), os.minor(status.st_rdev)
    return stat.S_ISCHR(status.st_mode) and DEVICES.get(path) == number


def _make_read_only(target: str, *, device: bool = False) -> None:
    """Also what is mounted below it, on Linux 5.12 and newer; a device can still be opened, and written to."""
    attributes = struct.pack("=QQQQ", 1 | 2 | (0 if device else 4), 0, 0, 0)  # RDONLY, NOSUID, NODEV
    path = ctypes.c_char_p(os.fsencode(target))
    try:
        _call(_MOUNT_SETATTR, -100, path, 0x8000, ctypes.c_char_p(attributes), len(attributes))  # AT_RECURSIVE
    except OSError:
        kept = os.statvfs(target).f_flag & (2 | 4 | 8 | 1024)  # an inherited nosuid, nodev, noexec cannot be dropped
        _mount(None, target, None, 4096 | 32 | 1 | (kept & 14) | (1 << 10 if kept & 1024 else 0))


def landlock_version() -> int:
    """The kernel's version of Landlock's interface; 0 without it."""
    try:
        return _call(444, None, 0, 1) if _CAPSET else 0
    except OSError:
        return 0


def enter_landlock(readable: Iterable[str], scratch: str | None) -> None:
    """Let this process read only what ``readable`` names, and write, flat, into ``scratch``; for good.

    ``/dev/null`` can be written to. Also, where the kernel's version has them: no TCP, and no abstract sockets or
    signals to what is outside.

    Raises:
        OSError: there is no Landlock.
    """
    version = landlock_version()
    execute, write, read, list_folder, remove_file, make_file, truncate = 1, 2, 4, 8, 32, 256, 1 << 14
    known = (1 << (13 if version < 2 else 14 if version < 3 else 15 if version < 5 else 16)) - 1
    attributes = struct.pack("=QQQ", known, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    rules = _call(444, ctypes.c_char_p(attributes), size, 0)
    rights = dict.fromkeys(readable, execute | read | list_folder)
    if "/dev/null" in rights and is_harmless_device("/dev/null"):
        rights["/dev/null"] = read | write
    if scratch is not None:
        rights[scratch] = (write | read | list_folder | remove_file | make_file | truncate) & known
    for path, allowed in rights.items():
        if os.path.exists(path):
            at = os.open(path, os.O_PATH | os.O_CLOEXEC)
            of_files = -1 if os.path.isdir(path) else execute | read | write
            _call(445, rules, 1, ctypes.c_char_p(struct.pack("=Qi", allowed & of_files, at)), 0)
            os.close(at)
    _no_new_privileges()
    _call(446, rules, 0)
    os.close(rules)


def _no_new_privileges() -> None:
    _checked(_libc.prctl(38, 1, 0, 0, 0))


def can_filter() -> bool:
    """Whether the numbers of this machine's system calls are known here."""
    return _libc is not None and platform.machine() in _MACHINES and struct.calcsize("P") == 8


def drop_capabilities() -> None:
    """All of them, of root in a container or of the user namespace."""
    header = struct.pack("=Ii", 0x20080522, 0)
    _call(_CAPSET, ctypes.c_char_p(header), ctypes.c_char_p(bytes(24)))


def filter_system_calls(*, writing: bool) -> None:
    """Refuse every system call but those listed above, to this process and its threads, for good.

    Args:
        writing: files may be opened for writing, where the layers below say which.

    Raises:
        OSError: the kernel has no seccomp.
    """
    column, architecture = _MACHINES[platform.machine()]
    numbers = {name: pair[column] for name, pair in _CALLS.items() if pair[column] is not None}
    special = _special_rules(os.getpid(), writing)
    program = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    for name, number in numbers.items():
        if not writing and name in _CHANGES_FILES:
            continue
        rule = special.get(name, [(_RETURN, 0, 0, _ALLOW)])
        program += [(_EQUAL, 0, len(rule), number), *rule]
    program.append((_RETURN, 0, 0, _ERROR | _EPERM))
    code = b"".join(struct.pack("=HBBI", *line) for line in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("@HP", len(program), ctypes.addressof(buffer))
    _no_new_privileges()
    _checked(_libc.prctl(22, 2, ctypes.c_char_p(header), 0, 0))  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def _special_rules(pid: int, writing: bool) -> dict[str, list[tuple[int, int, int, int]]]:
    """Calls that depend on their arguments, of which `argument` loads the lower half."""

    def argument(index: int, upper: int = 0) -> tuple[int, int, int, int]:
        return (_LOAD, 0, 0, 16 + 8 * index + 4 * upper)

    allow, refuse = (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _ERROR | _EPERM)

    def one_of(index: int, values: Iterable[int]) -> list[tuple[int, int, int, int]]:
        tests = [line for value in values for line in ((_EQUAL, 0, 1, value), allow)]
        return [argument(index), *tests, refuse]

    threads, namespaces = 0x00010000, 0x7E020000  # CLONE_THREAD, all CLONE_NEW*
    missing = [(_RETURN, 0, 0, _ERROR | _ENOSYS)]  # the C library falls back to the older call
    rules = {
        "clone": [argument(0), (_ANY_BIT, 2, 0, namespaces), (_ANY_BIT, 0, 1, threads), allow, refuse],
        "clone3": missing,
        "openat2": missing,
        "tgkill": one_of(0, [pid]),  # raise() and abort()
        "prctl": one_of(0, [15, 16]),  # the thread's name
        "ioctl": one_of(1, [0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451]),  # isatty, window, FIONREAD, FIO[N]CLEX …
        # not F_SETOWN and F_SETSIG, by which the kernel would send SIGKILL for us
        "fcntl": one_of(1, [0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1032]),
        # limits can be read, not set
        "prlimit64": [argument(2), (_EQUAL, 0, 3, 0), argument(2, 1), (_EQUAL, 0, 1, 0), allow, refuse],
    }
    if not writing:  # O_ACCMODE, O_CREAT, O_TRUNC
        for name, index in (("open", 1), ("openat", 2)):
            rules[name] = [
                argument(index),
                (_ANY_BIT, 1, 0, 0x3 | 0x40 | 0x200),
                allow,
                (_RETURN, 0, 0, _ERROR | _EROFS),
            ]
    return rules
