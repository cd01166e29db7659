"""Puts ``ulbq.pth`` beside the package, for which pyproject.toml has no word: every Python then imports ``ulbq``.

That import waits for transformers, and tells it of our artifacts. ``ULBQ_AUTOLOAD=0`` switches it off.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

LINE = 'import os; os.environ.get("ULBQ_AUTOLOAD") == "0" or __import__("ulbq")\n'


class BuildWithAutoload(build_py):
    """Adds the file to what is installed; an editable install, which installs nothing, goes without."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            self._autoload.write_text(LINE, encoding="utf-8")

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), *([] if self.editable_mode else [str(self._autoload)])]

    @property
    def _autoload(self) -> Path:
        return Path(self.build_lib, "ulbq.pth")


setup(cmdclass={"build_py": BuildWithAutoload})
