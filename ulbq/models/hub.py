"""Fetches a model's files from the Hugging Face Hub into the local cache."""

import errno
import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    XetDownloadError,
)

# The HTTP library under the Hub client has changed its name before; its error is always to be had here.
from huggingface_hub.errors import HTTPError as NetworkError  # type: ignore[attr-defined]

from ulbq.errors import InputError, ResourceError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*"]
# Subfolders hold other formats of the same weights, and so does Mistral's consolidated file. Only further chat
# templates are wanted: the patterns are all that a folder can be called that does not begin like theirs.
_UNWANTED = ["?/*", "??/*", "[!a]*/*", "a[!d]*/*", "ad[!d]*/*", "consolidated*"]


def looks_like_hub_id(text: str) -> bool:
    """Whether ``text`` could name a repository: ``name`` or ``owner/name``, where no folder ``owner`` lies here."""
    if not _HUB_ID.fullmatch(text) or ".." in text or text.endswith((".gguf", ".safetensors", ".json")):
        return False
    return "/" not in text or not Path(text).parent.is_dir()


def download(repo_id: str, *, offline: bool) -> Path:
    """The folder of the model's newest snapshot; with ``offline``, of the one in the local cache.

    Raises:
        InputError: no such model, or one that asks for a log-in.
        ResourceError: the Hub cannot be reached and the cache does not hold the model.
    """
    try:
        return Path(
            snapshot_download(repo_id, allow_patterns=_WANTED, ignore_patterns=_UNWANTED, local_files_only=offline)
        )
    except GatedRepoError as error:
        raise InputError(
            f"The model '{repo_id}' is gated.",
            hint=f"Accept its terms at https://huggingface.co/{repo_id} and log in with `hf auth login`.",
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise InputError(
            f"'{repo_id}' is neither a file or folder here nor a model on the Hugging Face Hub.",
            hint="Check the spelling; a private model needs `hf auth login`.",
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        if offline:
            hint = "Run without `offline` once, or give a local folder or GGUF file."
        else:
            hint = "Check the network (and HF_HUB_OFFLINE), or give a local folder or GGUF file."
        raise ResourceError(
            f"'{repo_id}' is no file or folder here, the local Hub cache does not hold it, "
            + ("and `offline` forbids to fetch it." if offline else "and the Hub cannot be reached."),
            hint=hint,
        ) from error
    except (NetworkError, XetDownloadError, OSError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        raise ResourceError(
            f"Fetching '{repo_id}' from the Hugging Face Hub failed: {error}",
            hint="Run the same command again: finished files are kept.",
        ) from error
