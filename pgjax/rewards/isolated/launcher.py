"""Started by path in a fresh interpreter, to run a program under limits and to end with it.

    launcher.py become PARENT -- PROGRAM ...
    launcher.py supervise PARENT MEMORY CPU FILE -- PROGRAM ...

Both are killed when the process PARENT ends (0: whichever). The second runs the program as its
child, ends with its exit status, and leaves none of its descendants behind. Limits are bytes of
address space, seconds of CPU time and bytes of a file, 0 for none.
Imports the standard library alone, so that it starts in milliseconds.
"""

import ctypes
import os
import resource
import signal
import sys

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def control(option, value):
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def die_with(parent):
    control(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent and os.getppid() != parent:  # it ended before we asked
        os._exit(1)


def limit(memory, cpu, size):
    for kind, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_FSIZE, size),
    ):
        if most:
            resource.setrlimit(kind, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def children():
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return [int(word) for word in file.read().split()]


def supervise(program, limits):
    # Who loses its parent becomes our child.
    control(PR_SET_CHILD_SUBREAPER, 1)
    own = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            die_with(own)
            limit(*limits)
            os.execvp(program[0], program)
        finally:
            os._exit(127)
    status = None
    while status is None:
        ended, how = os.wait()
        if ended == pid:
            status = how
    try:
        while left := children():
            for child in left:
                os.kill(child, signal.SIGKILL)
            os.wait()
    except (OSError, ValueError):  # none are left, or this system cannot say
        pass
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


def main():
    mode, parent, *numbers = sys.argv[1 : sys.argv.index("--")]
    program = sys.argv[sys.argv.index("--") + 1 :]
    die_with(int(parent))
    if mode == "become":
        os.execvp(program[0], program)
    supervise(program, [int(number) for number in numbers])


if __name__ == "__main__":
    main()
