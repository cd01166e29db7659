"""What ``push`` is asked to do."""

from typing import Annotated

from ulbq.config.options import Option, Settings


class PushRequest(Settings):
    """An upload to the Hugging Face Hub.

    Attributes:
        source: path of the artifact.
        repo: ``owner/name``.
    """

    source: str
    repo: str
    private: Annotated[
        bool, Option("Make the repository private where it is a new one.", primary=True, flag="--private")
    ] = False
    revision: Annotated[str | None, Option("Branch that takes the files.", metavar="NAME", default="main")] = None
