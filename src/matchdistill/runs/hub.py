"""Students on the Hugging Face Hub: an export is uploaded, and a student is fetched."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matchdistill.messages import cause
from matchdistill.tasks.task import CONFIG

README = "README.md"  # what the Hub shows
STUDENT = "model.safetensors"
FETCHED = (CONFIG, STUDENT)
LOGIN = "log in by hf auth login, or set HF_TOKEN, with a token that may write there"


@dataclass(frozen=True)
class Upload:
    """Where an exported student goes.

    Attributes:
        name: of the repository, USER/NAME; it is made if it is not there.
        private: whether the repository must be private; one that is made is then private.
        revision: the branch; it is made if it is not there. None: the main one.
        message: of the commit.

    Raises:
        ValueError: the name is none of a repository, or the package is missing.
    """

    name: str
    private: bool = False
    revision: str | None = None
    message: str = "Upload a student"

    def __post_init__(self) -> None:
        check_name(self.name)

    def __str__(self) -> str:
        branch = "" if self.revision is None else f", branch {self.revision}"
        return f"{self.name}{' (private)' if self.private else ''}{branch}, {self.message!r}"


def check_name(name: str) -> None:
    """Raise a ValueError unless a name is a repository's, USER/NAME, and the package of the Hub is here."""
    try:
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
    except ImportError as error:
        raise ValueError(f"the Hugging Face Hub needs {error.name}: pip install 'matchdistill[hub]'") from error
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(
            f"{name!r} is not the name of a repository on the Hub: expected USER/NAME: {cause(error)}"
        ) from error
    if "/" not in name:
        raise ValueError(f"{name!r} is not the name of a repository on the Hub: expected USER/NAME, with its owner")


def check_login() -> None:
    """Raise a ValueError if there is no token to upload with."""
    from huggingface_hub import get_token

    if get_token() is None:
        raise ValueError(f"there is no token of the Hugging Face Hub: {LOGIN}")


def check_export(path: Path, kind: str) -> None:
    """Raise a ValueError unless an exported file has the format and the name by which the Hub's loaders find weights."""
    if (path.name, kind) != (STUDENT, "safetensors"):
        raise ValueError(
            f"--push uploads {STUDENT}, but this writes {path.name} as {kind}: leave out --format, and let --out end in "
            f"{STUDENT}"
        )


def push(files: Sequence[Path], upload: Upload) -> str:
    """Upload files in one commit; returns its address.

    Args:
        files: they keep their names, and lie at the top of the repository.
        upload: where they go.

    Raises:
        ValueError: in one line, why the Hub does not take them. It has all of them or none.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(library_name="matchdistill")
    with _told(f"{upload.name} cannot be uploaded"):
        api.create_repo(upload.name, private=upload.private, exist_ok=True)
        # A repository that was there before keeps what it is.
        is_public = upload.private and not api.repo_info(upload.name).private
    if is_public:
        raise ValueError(
            f"{upload.name} is there already and is public: leave out --private, name another, or make it private on the "
            "Hub first; nothing is uploaded"
        )
    with _told(f"{upload.name} cannot be uploaded"):
        if upload.revision is not None:
            api.create_branch(upload.name, branch=upload.revision, exist_ok=True)
        commit = api.create_commit(
            upload.name,
            [CommitOperationAdd(path.name, path) for path in files],
            commit_message=upload.message,
            revision=upload.revision,
        )
    return str(commit.commit_url)


def fetch(name: str, revision: str | None = None) -> Path:
    """The folder of a student of the Hub, which is downloaded unless it has been before.

    Args:
        name: of the repository, USER/NAME.
        revision: a branch, a tag or a commit; None: the newest of the main branch.

    Raises:
        ValueError: no such name, no network and no copy, or no student of ours is there.
    """
    check_name(name)
    from huggingface_hub import snapshot_download

    with _told(f"{name}{'' if revision is None else f' at {revision}'} cannot be fetched from the Hub"):
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(FETCHED)))
    if missing := [each for each in FETCHED if not (folder / each).is_file()]:
        raise ValueError(f"{name} holds no student, it has no {' and no '.join(missing)}")
    return folder


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Tell in one line what goes wrong."""
    try:
        yield
    except Exception as error:  # of the Hub, of its client, and of the network
        raise ValueError(f"{what} ({cause(error)}): {_hint(error)}") from error


def _hint(error: Exception) -> str:
    """What helps against an error of the Hub."""
    status: Any = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403, 404):  # a private repository is answered as one that is not there
        return f"see that the name is right, and {LOGIN}"
    return "check the network connection" if status is None else "try again later"
