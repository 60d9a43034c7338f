"""Commands of tests in processes forked from a warm one: each begins in a tenth of a second, where it imports for six.

All else is as in a process of its own: words, folder, environment, output, exit status, and a process group that can be
signalled. The Python modules that such a command starts (ranks, stages of a chain, the training of a demo) are forked
from it likewise. Tests whose point is the process itself (the console script, torchrun, what is imported) start one.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from tests.ranks import warm_context

SECONDS = 300.0  # for what takes a few on an idle machine


@dataclass(frozen=True)
class Done:
    """What a command that has ended said; a negative status is the signal that killed it."""

    status: int
    stdout: str
    stderr: str


class Command:
    """One at work. Its output goes to files, so that it never waits for a reader."""

    def __init__(self, function: Callable[[], object], folder: Path, environment: Mapping[str, str], said: Path):
        self._out, self._err = said / "out", said / "err"
        self._out.touch()
        self._err.touch()
        arguments = (function, folder, dict(environment), self._out, self._err)
        self.process = warm_context().Process(target=_begin, args=arguments)
        self.process.start()

    @property
    def pid(self) -> int:
        """Also the number of its process group."""
        return int(self.process.pid)

    def running(self) -> bool:
        return bool(self.process.is_alive())

    def said(self) -> str:
        return self._out.read_text() + self._err.read_text()

    def wait(self, seconds: float = SECONDS) -> Done:
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"it is still at work after {seconds} s\n{self.said()}"
        return Done(self.process.exitcode, self._out.read_text(), self._err.read_text())

    def end(self) -> None:
        """Kills it with all that it started in its process group."""
        if self.running():
            os.killpg(self.pid, signal.SIGKILL)
        self.process.join()


@contextmanager
def begun(
    function: Callable[[], object], folder: Path | None = None, environment: Mapping[str, str] | None = None
) -> Iterator[Command]:
    """`function()`, which must be importable, as a command at work; killed at the end.

    Args:
        folder: the current one of the command; None: of this process.
        environment: all of its variables; None: those of this process.
    """
    with tempfile.TemporaryDirectory() as said:
        command = Command(
            function, folder or Path.cwd(), os.environ if environment is None else environment, Path(said)
        )
        try:
            yield command
        finally:
            command.end()


def program(module: str, *words: object) -> Callable[[], None]:
    """`python -m MODULE WORDS`, to be begun."""
    return partial(_run_module, module, [str(word) for word in words])


def pretrain(
    *words: object, status: int = 0, folder: Path | None = None, environment: Mapping[str, str] | None = None
) -> Done:
    """`pretrain WORDS` to its end; an AssertionError with what it said where it ends with another status."""
    with begun(program("launch.cli", *words), folder, environment) as command:
        done = command.wait()
    assert done.status == status, f"pretrain {words}: {done.status}\n{done.stdout}{done.stderr}"
    return done


def _run_module(module: str, words: Sequence[str]) -> None:
    sys.argv = [module, *words]
    warnings.filterwarnings("ignore", "'.*' found in sys.modules", RuntimeWarning)  # by runpy: it was loaded before
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _begin(function: Callable[[], object], folder: Path, environment: dict[str, str], out: Path, err: Path) -> None:
    os.setpgid(0, 0)
    flags = os.O_WRONLY | os.O_APPEND
    for number, opened in enumerate((os.open(os.devnull, os.O_RDONLY), os.open(out, flags), os.open(err, flags))):
        os.dup2(opened, number)
        os.close(opened)
    subprocess.Popen._execute_child = _fork_or_execute  # type: ignore[attr-defined]
    _become(function, folder, environment)


def _become(function: Callable[[], object], folder: Path | str | None, environment: Mapping[str, str]) -> NoReturn:
    """`function()`, and the end of this forked process with the exit status that Python would give it.

    Streams 0 to 2 are its own already. Nothing is done at exit but to flush them.
    """
    status: object = 1
    try:
        os.environ.clear()
        os.environ.update(environment)
        if folder is not None:
            os.chdir(folder)
        tempfile.tempdir = None
        torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
        buffering = 1 if environment.get("PYTHONUNBUFFERED") else -1
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
        sys.stdout = open(1, "w", buffering, closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", 1, errors="backslashreplace", closefd=False)  # noqa: SIM115
        function()
        status = 0
    except SystemExit as end:
        status = 0 if end.code is None else end.code
        if not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status if isinstance(status, int) else 1)


_execute = subprocess.Popen._execute_child  # type: ignore[attr-defined]


def _fork_or_execute(
    self: Any, args: Any, executable: Any, preexec_fn: Any, close_fds: bool, pass_fds: Any, cwd: Any, env: Any,
    startupinfo: Any, creationflags: int, shell: bool, p2cread: int, p2cwrite: int, c2pread: int, c2pwrite: int,
    errread: int, errwrite: int, restore_signals: bool, gid: Any, gids: Any, uid: Any, umask: int,
    start_new_session: bool, process_group: int,
) -> None:  # fmt: skip
    """In place of Popen's own: a Python module is forked from this process, everything else is executed as ever."""
    ends = (p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)
    words = [] if isinstance(args, str | bytes) else [os.fspath(word) for word in args]
    module = words.index("-m") if "-m" in words[:3] else None
    ours = words[:1] in ([sys.executable], ["python"])  # as an environment that is activated has it
    flags = set(words[1:module]) if ours and module is not None else None
    if flags is None or module is None or flags - {"-u", "-P"} or pass_fds or preexec_fn:
        _execute(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell,
                 *ends, restore_signals, gid, gids, uid, umask, start_new_session, process_group)  # fmt: skip
        return
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    self.pid = os.fork()
    if self.pid:
        self._child_created = True
        self._close_pipe_fds(*ends)
        return
    try:
        if start_new_session:
            os.setsid()
        if process_group >= 0:
            os.setpgid(0, process_group)
        for number, given in enumerate((p2cread, c2pwrite, errwrite)):
            if given != -1:
                os.dup2(given, number)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # as an executed program has none of them
        for signum in signal.valid_signals():
            if callable(signal.getsignal(signum)):
                signal.signal(signum, signal.SIG_DFL if signum != signal.SIGINT else signal.default_int_handler)
        environment = dict(os.environ if env is None else env)
        if "-u" in flags:
            environment["PYTHONUNBUFFERED"] = "1"
        _become(program(words[module + 1], *words[module + 2 :]), cwd, environment)
    finally:
        os._exit(1)
