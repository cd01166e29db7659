"""``push``: an artifact with its model card to the Hugging Face Hub."""

import json
import re
import warnings
from collections.abc import Mapping
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.errors import HTTPError as NetworkError  # type: ignore[attr-defined]
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ulbq.artifacts.manifest import (
    MANIFEST_NAME,
    AnyManifest,
    ConvertedManifest,
    QuantizedManifest,
    read_manifest,
    sealed,
)
from ulbq.artifacts.names import local_path
from ulbq.artifacts.records import FileEntry, Record
from ulbq.artifacts.whole import check_small_files, verify
from ulbq.config.push import PushRequest
from ulbq.data.hub import offline_by_environment
from ulbq.errors import InputError, ResourceError, UsageError
from ulbq.progress import Progress, Silent

_CARD, _ADAPTER = "README.md", "adapter_config.json"
_WEIGHTS = ("*.safetensors", "*.gguf")
_FILE = re.compile(r"\.(jsonl?|txt|parquet|safetensors|ya?ml|gguf|csv)$")
_QUOTED_PATH = re.compile(r"'[^']*/([^'/]+)/?'")


class PushPlan(Record):
    """What an upload would send.

    Attributes:
        files: bytes by the name that they have in the repository.
    """

    repo: str
    revision: str
    files: dict[str, int]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())


def plan(request: PushRequest) -> PushPlan:
    """Check an artifact and list its files; nothing is sent, and the network is not touched.

    Raises:
        UsageError: ``repo`` is no name of a repository.
        InputError: no artifact of a model, an unfinished or a damaged one.
    """
    try:
        validate_repo_id(request.repo)
    except HFValidationError as error:
        raise UsageError(f"'{request.repo}' is no name of a repository.", hint="As in owner/name.") from error
    if "/" not in request.repo:
        raise UsageError(f"'{request.repo}' names no owner.", hint=f"As in owner/{request.repo}.")
    path = local_path(request.source)
    manifest: AnyManifest = read_manifest(path)
    if not isinstance(manifest, QuantizedManifest | ConvertedManifest):
        raise InputError(f"'{request.source}' holds scores, and no model.", hint="Push the model itself.")
    if _CARD not in manifest.files:
        raise InputError(f"'{request.source}' has no model card.", hint="Make the artifact again.")
    check_small_files(path, manifest)
    sizes = {name: entry.size for name, entry in sorted(manifest.files.items())}
    files = sizes | {name: len(data) for name, data in published(path, manifest, request.repo).items()}
    return PushPlan(repo=request.repo, revision=request.revision or "main", files=files)


def push(request: PushRequest, progress: Progress | None = None) -> str:
    """Upload an artifact in one commit, so that the repository holds its weights and no others.

    Args:
        request: what to do.
        progress: told how it goes.

    Returns:
        The repository's address.

    Raises:
        UsageError, InputError: as :func:`plan`; also where a file is not what was written.
        ResourceError: no token is there, or the Hub cannot be reached or refuses.
    """
    progress, planned = progress or Silent(), plan(request)
    if offline_by_environment():
        raise ResourceError("HF_HUB_OFFLINE forbids to reach the Hub.", hint="Unset it.")
    if get_token() is None:
        raise ResourceError(
            "There is no token of the Hugging Face Hub on this machine.", hint="Run 'hf auth login', or set HF_TOKEN."
        )
    path = local_path(request.source)
    verify(path, progress)
    with progress.phase(f"Uploading {len(planned.files)} files to {planned.repo}"):
        return _upload(path, planned, private=request.private)


def published(path: Path, manifest: AnyManifest, repo: str) -> dict[str, bytes]:
    """The files that go out otherwise than they lie here: of paths of this machine they have the last names alone.

    Args:
        path: the artifact.
        manifest: its own.
        repo: what an adapter's base is called there.

    Returns:
        Their content by name, the manifest's among them, which knows the others as they go out.
    """
    hub = {parent.path for parent in manifest.parents if parent.kind == "hub"}
    places: dict[str, str] = {}
    request = _named(manifest.request, hub, places)
    for one in manifest.parents:
        places |= {place: one.name for place in (one.path, one.absolute) if "/" in place and one.path not in hub}
    changed: dict[str, Any] = {"request": request}
    if isinstance(manifest, QuantizedManifest) and manifest.finetune is not None:
        data = _named(manifest.finetune.data, hub, places)
        changed["finetune"] = manifest.finetune.model_copy(update={"data": data})
    found = {name: _without(path / name, places, repo) for name in manifest.files if _is_text(name)}
    found = {name: data for name, data in found.items() if data != (path / name).read_bytes()}
    entries = {name: FileEntry(size=len(data), sha256=sha256(data).hexdigest()) for name, data in found.items()}
    changed["files"] = manifest.files | entries
    changed["parents"] = tuple(
        one if one.path in hub else one.model_copy(update={"path": one.name, "absolute": "", "relative": ""})
        for one in manifest.parents
    )
    changed["warnings"] = tuple(_QUOTED_PATH.sub(r"'\1'", _named_in(one, places)) for one in manifest.warnings)
    return found | {MANIFEST_NAME: sealed(manifest.model_copy(update=changed))}


def _is_text(name: str) -> bool:
    return name == _CARD or name.endswith((".html", _ADAPTER))


def _without(file: Path, places: Mapping[str, str], repo: str) -> bytes:
    """A file's content, with names for places of this machine."""
    text = file.read_text(encoding="utf-8")
    if file.name == _ADAPTER:
        told = json.loads(text)
        return json.dumps({**told, "base_model_name_or_path": repo}, indent=2, sort_keys=True).encode()
    return _named_in(text, places).encode()


def _named_in(text: str, places: Mapping[str, str]) -> str:
    """A text with names for places; what only begins or ends like one, as an address does, stays."""
    for place in sorted(places, key=len, reverse=True):
        if places[place]:
            name = places[place].replace("\\", r"\\")
            text = re.sub(rf"(?<![\w/.<-]){re.escape(place)}(?![\w-])", name, text)
    return text


def _named(value: Any, hub: set[str], places: dict[str, str]) -> Any:
    """A value without folders of this machine; adds those that it had to ``places``, with the names they get."""
    if isinstance(value, dict):
        return {key: _named(one, hub, places) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_named(one, hub, places) for one in value]
    if not isinstance(value, str) or value in hub:
        return value
    # Several sources may stand in one text, each with its weight.
    here = {part: part.rstrip("/").rpartition("/")[2] for part in value.split(",") if _is_here(part)}
    places |= here
    return ",".join(here.get(part, part) for part in value.split(","))


def _is_here(text: str) -> bool:
    """Whether a text names a place on this machine."""
    path = re.sub(r":[\d.]+$", "", text)
    return path.startswith(("/", "~", "./", "../")) or (
        "/" in path and (Path(path).exists() or bool(_FILE.search(path)))
    )


def _upload(path: Path, planned: PushPlan, *, private: bool) -> str:
    api = HfApi()
    try:
        with warnings.catch_warnings(action="ignore"):
            address = api.create_repo(planned.repo, private=private, exist_ok=True)
            if planned.revision != "main":
                api.create_branch(planned.repo, branch=planned.revision, exist_ok=True)
            content: dict[str, Path | bytes] = {name: path / name for name in planned.files}
            content |= published(path, read_manifest(path), planned.repo)
            # What an earlier artifact left would be loaded with this one.
            before = api.list_repo_files(planned.repo, revision=planned.revision)
            stale = [name for name in before if any(fnmatch(name, one) for one in _WEIGHTS) and name not in content]
            api.create_commit(
                planned.repo,
                [
                    *(CommitOperationDelete(name) for name in stale),
                    *(CommitOperationAdd(name, file) for name, file in content.items()),
                ],
                revision=planned.revision,
                commit_message=f"Upload {path.resolve().name} by ulbq",
            )
    except HfHubHTTPError as error:
        said = error.server_message or str(error).splitlines()[0]
        raise ResourceError(
            f"The Hub refuses '{planned.repo}': {said}.", hint="Check the name, and that the token may write there."
        ) from error
    except (NetworkError, OSError) as error:
        raise ResourceError(
            f"The Hub cannot be reached: {error}.", hint="Check the network, and run the same command again."
        ) from error
    except ValueError as error:  # a card's front matter that the Hub does not take
        raise InputError(f"The Hub does not take the artifact: {error}", hint=f"Mend its {_CARD}.") from error
    return str(address)
