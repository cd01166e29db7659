"""What pip would install of this tree, without pip."""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILT_FROM = ("ulbq", "commands", "pyproject.toml", "README.md", "LICENSE", "setup.py")
_BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"


def unpack_wheel(site: Path) -> Path:
    """Build a wheel and put its files into a site folder, which is returned."""
    with tempfile.TemporaryDirectory() as scratch:
        tree, made = Path(scratch, "tree"), Path(scratch, "made")
        tree.mkdir()
        made.mkdir()
        for name in BUILT_FROM:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, tree / name)
        subprocess.run([sys.executable, "-c", _BUILD, made], cwd=tree, check=True, capture_output=True)
        (wheel,) = made.glob("*.whl")
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(site)
    return site
