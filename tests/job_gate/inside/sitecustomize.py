"""On the path of a job that has a gate: every Python of it loads this at its start, and its ranks wait at the gate.

A gate is a folder. While it holds a file of a checkpoint's name (`step_00000040`), each rank that is about to write a
file of that checkpoint waits, and says so by a file of its own beside it. It waits in the middle of a save; the steps
after it go on until the next save is due. Nothing of the code under test is touched.
"""

import os
import re
import sys
import time
from pathlib import Path

GATE = Path(os.environ["PRETRAIN_TESTS_GATE"])
CHECKPOINT = re.compile(r"/checkpoints/(step_\d+)/")


def wait_at_the_gate(event: str, arguments: tuple[object, ...]) -> None:
    if event != "open":
        return
    path, _, flags = arguments
    if not (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR) and isinstance(path, str | os.PathLike)):
        return
    found = CHECKPOINT.search(os.fspath(path))
    if found is None or not (closed := GATE / found[1]).exists():
        return
    closed.with_suffix(f".{os.environ['RANK']}").touch()
    while closed.exists():
        time.sleep(0.01)


if "RANK" in os.environ:
    sys.addaudithook(wait_at_the_gate)
