"""Every door that keeps a compiler from loading is still needed, and still closed; and compiling opens them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from pretrain.runtime.lean_imports import DOORS

ROOT = Path(__file__).resolve().parents[2]

# What a library loads for nothing, asked for in a process where it is not loaded, and refused: each module is executed
# once as it is and once behind its door, used as its library uses it, and the modules that it asked for are printed.
_ASK = """
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from types import SimpleNamespace

from pretrain.runtime import lean_imports

lean_imports.install()
import torch, torchvision, timm, timm.optim, timm.utils
import deepspeed.runtime.zero.muon.original_muon

HEAVY = {"torch._dynamo", "torch._inductor", "torch.distributed.tensor", "wandb"}
print("loaded", *sorted(HEAVY & sys.modules.keys()))

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name in HEAVY:
            asked.add(name)
            raise ImportError(name)

USE = {
    "torch._compile": lambda module: module._disable_dynamo(lambda: None)(),
    "torch.optim.optimizer": lambda module: module._use_grad_for_differentiable(lambda self: None)(
        SimpleNamespace(defaults={"differentiable": False})
    ),
    "timm.layers.typing": lambda module: module.disable_compiler(lambda: None),
    "deepspeed.runtime.compiler": lambda module: module.compile()(lambda: None),
}
sys.meta_path.insert(0, Refuse())
for name in lean_imports.DOORS:
    if name == lean_imports.DYNAMO:
        continue
    path = sys.modules[name.rpartition(".")[0]].__path__
    for finder, how in ((PathFinder, "open"), (lean_imports._Finder(), "closed")):
        asked = set()
        spec = finder.find_spec(name, path)
        module = module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
            USE.get(name, lambda module: None)(module)
        except ImportError as error:
            assert error.args[0] in HEAVY, error
        print(how, name, *sorted(asked))
"""

# The same steps before and after something was compiled, and a step that is itself compiled.
_COMPILE = """
import sys
from pretrain.runtime import lean_imports

lean_imports.install()
import torch, timm.optim

def trained(step):
    weight = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    step = step(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        weight.pow(2).sum().backward()
        step()
    assert torch.is_grad_enabled()
    return weight.detach()

before = trained(lambda optimizer: optimizer.step)
assert "torch._dynamo" not in sys.modules
doubled = torch.compile(lambda x: 2 * x, backend="eager")
assert doubled(torch.ones(())) == 2
assert type(sys.modules["torch._dynamo"]).__name__ == "module"
assert torch._dynamo.config.cache_size_limit == 1_000_000  # timm.optim.kron's, as if it had been there
assert torch.equal(before, trained(lambda optimizer: optimizer.step))
compiled = trained(lambda optimizer: torch.compile(optimizer.step, backend="eager"))
torch.testing.assert_close(compiled, before, rtol=1e-5, atol=1e-5)  # its operations are others
print("equal")
"""


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_each_door_is_needed_and_closed() -> None:
    lines = [line.split() for line in python(_ASK).splitlines()]
    asked = {(how, names[0]): names[1:] for how, *names in lines if how in ("open", "closed")}
    assert ["loaded"] in lines, "imported together, they load what they are kept from"
    assert [name for (how, name), heavy in asked.items() if how == "closed" and heavy] == []
    unneeded = [name for (how, name), heavy in asked.items() if how == "open" and not heavy]
    assert unneeded == [], "the library is mended: remove its door"
    assert {name for _, name in asked} == DOORS.keys() - {"torch._dynamo"}


def test_what_is_compiled_is_compiled_and_steps_are_the_same() -> None:
    assert python(_COMPILE).splitlines()[-1] == "equal"


@pytest.mark.parametrize("name", [name for name in DOORS if name not in ("torch._dynamo", "timm.layers.typing")])
def test_a_library_without_what_a_door_closes_is_left_as_it_is(name: str) -> None:
    module = ModuleType(name)
    known = dict(vars(module))
    with DOORS[name](module):
        pass
    assert vars(module) == known
    assert not [key for key, one in sys.modules.items() if type(one).__name__ == "_StandIn"]
