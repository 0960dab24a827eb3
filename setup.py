"""All metadata stands in setup.cfg. This keeps files of an earlier build out of the next wheel."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class CleanBuildPy(build_py):
    """setuptools copies what it finds below build_lib into the wheel, also modules that no longer exist."""

    def run(self) -> None:
        """Start from an empty folder."""
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib), ignore_errors=True)
        super().run()


setup(cmdclass={"build_py": CleanBuildPy})
