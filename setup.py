"""All that pyproject.toml cannot say: the wheel holds a copy of `configs/`, as `pretrain/configs`."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """The usual step that gathers the files of the packages, with `configs/` as one of their folders."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # an editable install uses the checkout's folder
            target = Path(self.build_lib) / "pretrain" / "configs"
            shutil.rmtree(target, ignore_errors=True)  # left by an earlier build, perhaps with recipes that are gone
            shutil.copytree("configs", target)


setup(cmdclass={"build_py": BuildWithConfigs})
