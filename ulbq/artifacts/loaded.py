"""Which files of a model's folder are read when the model is loaded, by whatever library."""

from pathlib import Path, PurePosixPath

_LOADED_FOLDERS = ("adapter", "additional_chat_templates")
_LOADED_NAMES = frozenset({"merges.txt", "vocab.txt"})
_LOADED_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf"),
    *(".json", ".jinja", ".model", ".tiktoken", ".py"),
)


def is_loaded(name: str) -> bool:
    """Whether a file, by its name relative to a model's folder, is one that somebody reads when the model is loaded."""
    parts = PurePosixPath(name).parts
    if any(part.startswith(".") for part in parts):
        return False
    return (len(parts) == 1 or parts[0] in _LOADED_FOLDERS) and (
        parts[-1].endswith(_LOADED_SUFFIXES) or parts[-1] in _LOADED_NAMES
    )


def loaded_names(folder: Path) -> list[str]:
    """Names of all such files in a folder, relative to it."""
    found = [entry for entry in folder.iterdir() if entry.name not in _LOADED_FOLDERS]
    found += [entry for name in _LOADED_FOLDERS for entry in (folder / name).rglob("*")]
    names = (entry.relative_to(folder).as_posix() for entry in found if not entry.is_dir())
    return sorted(name for name in names if is_loaded(name))
