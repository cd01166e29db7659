"""An artifact whose small files were changed on purpose, a chat template for one: its manifest says so from then on."""

from pathlib import Path

from ulbq.artifacts.disk import sha256_file, write_atomically, writing
from ulbq.artifacts.manifest import MANIFEST_NAME, AnyManifest, load_manifest, read_manifest, sealed
from ulbq.artifacts.records import FileEntry
from ulbq.errors import InputError
from ulbq.models.side_files import check_folder, check_link, side_files


def reseal(path: Path) -> tuple[AnyManifest, list[str]]:
    """Take an artifact's files as they are now into its manifest; side files that were added too.

    Its digest is another one then: what was made from it, or measured of it, is of the artifact as it was.

    Args:
        path: the artifact.

    Returns:
        The manifest, and the names of the files that were changed or added; nothing is written without any.

    Raises:
        InputError: no artifact; or weights have changed, which are no small files, or a listed file is missing.
        ResourceError: the folder cannot be written.
    """
    check_folder(path)
    manifest = load_manifest(path)
    added = {file.relative_to(path).as_posix() for file in side_files(path)} - manifest.files.keys()
    files = dict(manifest.files)
    changed = []
    for name in sorted({*manifest.files, *added}):
        entry = _entry(path, name)
        if entry == files.get(name):
            continue
        if name.endswith(".safetensors"):
            raise InputError(
                f"'{path / name}' was changed, and weights are not taken over.",
                hint="Restore the file from a copy, or make the artifact again.",
            )
        files[name] = entry
        changed.append(name)
    if changed:
        with writing(path):
            write_atomically(path / MANIFEST_NAME, sealed(manifest.model_copy(update={"files": files})))
    return read_manifest(path), changed


def _entry(path: Path, name: str) -> FileEntry:
    file = path / name
    check_link(file, path)
    if not file.is_file():
        raise InputError(f"'{file}' is missing from the artifact.", hint="Restore the file from a copy.")
    return FileEntry(size=file.stat().st_size, sha256=sha256_file(file))
