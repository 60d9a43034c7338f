"""What is slow to import, imported once: by the server that ranks and commands of tests are forked from.

`multiprocessing` passes over a preload that fails with an ImportError; every process forked after that would import
all of this for itself. So `LOADED_BY` says which process did it, and test_warm.py looks.
"""

from __future__ import annotations

import gc
import importlib
import os

from pretrain.runtime import lean_imports

lean_imports.install()  # before torch, as commands do

import torch  # noqa: E402
from PIL import Image  # noqa: E402

NEEDED = (
    # the tests' own side
    "pytest", "hypothesis", "psutil", "tests.ranks", "tests.runs", "tests.commands", "tests.toy", "tests.shards",
    # a run, as `pretrain train` and torchrun begin it
    "pretrain.__main__", "pretrain.run", "torch.distributed.run", "torch.utils.tensorboard",
    # and what it loads on the way: an engine, its evaluations
    "deepspeed.runtime.zero.muon.original_muon", "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.module_inject.auto_ep_layer", "deepspeed.module_inject.auto_ep_presets.registry",
    "deepspeed.comm.mori", "deepspeed.ops.op_builder.all_ops", "distutils.unixccompiler",
    "distutils.sysconfig", "torch.fx.experimental.symbolic_shapes",
    "pretrain.evals.knn.protocol", "pretrain.evals.sources.load",
    # the other commands
    "launch.cli", "launch.ranks.rank", "launch.ranks.launcher", "launch.demo", "launch.doctor.doctor",
    "launch.chains.run", "launch.jobs.submit", "launch.jobs.status", "launch.commands.data", "launch.commands.eval",
    "launch.suites.run", "launch.commands.report",
    "pretrain.evals.linear.protocol", "pretrain.reports.report", "matplotlib.backends.backend_agg",
)  # fmt: skip

for name in NEEDED:
    importlib.import_module(name)
Image.init()  # its plugins
# The first step of any optimizer of torch imports more.
torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.0).step()
gc.collect()
gc.freeze()  # or the collector of each forked process would copy all of this by looking at it

LOADED_BY = os.getpid()
