"""A model as the user names it: a folder, or a repository of the Hugging Face hub at one commit."""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

from moekern import files
from moekern.checkpoint.folder import CONFIG, open_checkpoint
from moekern.checkpoint.strict_json import read_json
from moekern.errors import InputError, first_line

HUB_ID, NAME = re.compile(r"[\w.-]+/[\w.-]+"), re.compile(r"[\w.-]+")
COMMIT = re.compile(r"[0-9a-f]{40}")
LISTING = ".json"
SIGN_IN = "`hf auth login` or set HF_TOKEN"

Tell = Callable[[str], None]
Step = Callable[[int, int], None]  # (done, total)
Progress = Callable[[str, str], AbstractContextManager[Step]]  # (what, unit)


@dataclass(frozen=True)
class Repository:
    """A repository at one commit: its files by their path in it, with their sizes in bytes."""

    id: str
    commit: str
    sizes: Mapping[str, int]

    def __str__(self) -> str:
        return f"{self.id} (commit {self.commit[:12]})"

    @property
    def folder(self) -> Path:
        """Where what was read of it without a download is kept."""
        return _kept(self.id) / self.commit

    def beside(self, suffix: str) -> Path:
        """A file of our own about it."""
        return self.folder.with_name(self.commit + suffix)

    @cached_property
    def snapshot(self) -> Path | None:
        """The folder of what was downloaded of it."""
        return _snapshot(self.id, self.commit)


def find_model(name: str, revision: str | None, tell: Tell) -> Path | Repository:
    """The folder of that name; else the repository, of which nothing but the list of its files was asked for.

    Where the hub does not answer, what earlier commands have left is told and taken. Raises InputError, one line that
    says what to do, for a name that is neither, a revision that is not there, and a hub that says no.
    """
    folder = folder_named(name, revision)
    if folder is not None:
        return folder
    from huggingface_hub.errors import RevisionNotFoundError

    repository = None if revision is None else _listing(name, revision)
    if repository is None:
        try:
            repository = _asked(name, revision)
        except RevisionNotFoundError as error:
            raise _refusal(name, revision, error) from error
        except _answers() as error:
            found = _left(name, revision)
            if found is None:
                raise _refusal(name, revision, error) from error
            commit = found.name if isinstance(found, Path) else found.commit
            tell(f"{name}: the hub does not answer ({first_line(error)}); commit {commit[:12]} is taken from the cache")
            return found
        _keep(repository, revision)
    return repository


def folder_named(name: str, revision: str | None = None) -> Path | None:
    """The folder of that name; None for a hub id. Nothing is asked for, and nothing but the name is looked at.

    Raises InputError for a name that is neither.
    """
    folder = Path(name)
    if folder.exists():
        if not folder.is_dir():
            raise InputError(f"{name}: is a file; give the checkpoint's folder")
        if revision is not None:
            raise InputError(f"--revision {revision}: {name} is a folder; only a hub id has revisions")
        return folder
    if not HUB_ID.fullmatch(name) or name.startswith("."):
        raise InputError(f"{name}: no such folder{_hint(name)}")
    return None


def _asked(name: str, revision: str | None) -> Repository:
    """The commit of a revision and the list of its files, by one request."""
    from huggingface_hub import HfApi

    info = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=30)
    sizes, commit = {each.rfilename: each.size or 0 for each in info.siblings or ()}, str(info.sha)
    if not COMMIT.fullmatch(commit) or not _are_sizes(sizes):
        raise ValueError(f"commit {commit:.80}, {len(sizes)} files")
    return Repository(name, commit, sizes)


def _are_sizes(sizes: Any) -> bool:
    return isinstance(sizes, dict) and all(type(n) is int and n >= 0 for n in sizes.values())


def _answers() -> tuple[type[Exception], ...]:
    """What asking the hub raises: refusals, a network that is not there, answers that are not understood."""
    from huggingface_hub.errors import HTTPError

    return (HTTPError, OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError)


@contextmanager
def asking(name: str, revision: str | None) -> Iterator[None]:
    """What the hub answers, or the network, becomes one line. Raises InputError."""
    try:
        yield
    except InputError:
        raise
    except _answers() as error:
        raise _refusal(name, revision, error) from error


def broken_off(error: BaseException | None) -> bool:
    """Whether the connection failed and not the request: the same may be asked again."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    return isinstance(error, (HTTPError, RuntimeError)) and not isinstance(error, HfHubHTTPError)


def _refusal(name: str, revision: str | None, error: Exception) -> InputError:
    """One line for what the hub has answered, with what to do about it."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(f"--revision {revision or 'main'}: {name} has no such branch, tag or commit on the hub")
    if isinstance(error, errors.GatedRepoError):
        what = f"is gated: accept its terms at https://huggingface.co/{name}, then {SIGN_IN}"
    elif isinstance(error, errors.RepositoryNotFoundError):
        what = f"no such folder, and on the hub no such repository, or a private one: check the name, or {SIGN_IN}"
        what += _hint(name.partition("/")[2])
    elif status == 401:
        what = f"the hub does not take the token: {SIGN_IN} anew"
    elif status is not None:
        what = f"the hub answers {status} ({first_line(error)}); try again later"
    elif isinstance(error, errors.OfflineModeIsEnabled):
        what = "no such folder, and not in the hub's cache; HF_HUB_OFFLINE is set: unset it to ask the hub"
    elif isinstance(error, errors.HFValidationError):
        what = f"no such folder, and no name of the hub ({first_line(error)})"
    elif isinstance(error, (ValueError, TypeError, KeyError, AttributeError)):
        what = f"the hub's answer is not understood ({first_line(error)}); check HF_ENDPOINT and proxies"
    elif isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
        what = f"cannot be kept in the hub's cache ({first_line(error)})"
    else:
        what = f"not to be had from the hub ({first_line(error)}); check the network, HF_ENDPOINT and proxies"
    return InputError(f"{name}: {what}")


def _hint(name: str) -> str:
    """The ids on the hub that a name without its owner may mean; the form of an id where the hub does not say."""
    if not NAME.fullmatch(name) or name.startswith("."):
        return ""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session

    query: Any = {"search": name, "sort": "downloads", "direction": -1, "limit": 20}
    try:
        answer = get_session().get(
            f"{constants.ENDPOINT}/api/models", params=query, headers=build_hf_headers(), timeout=10
        )
        found = [str(each["id"]) for each in answer.json()]
    except _answers():
        found = []
    same = [each for each in found if each.rpartition("/")[2].lower() == name.lower()] or found
    return f"; did you mean {' or '.join(same[:2])}?" if same else "; a model of the hub is named OWNER/NAME"


def _kept(name: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "moekern" / f"models--{name.replace('/', '--')}"


def _keep(repository: Repository, revision: str | None) -> None:
    """Keep a repository's list of files, by its commit, and the commit of the revision, for a hub that is away."""
    listing, ref = repository.beside(LISTING), _ref(repository.id, revision)
    with alone_with(repository):
        if not listing.exists():
            files.write_bytes(listing, json.dumps({"sizes": dict(repository.sizes)}).encode())
        files.write_bytes(ref, repository.commit.encode())


@contextmanager
def alone_with(repository: Repository) -> Iterator[None]:
    """No other process keeps anything of the repository meanwhile: the parts of one command begin at once."""
    path = repository.beside(".lock")
    files.make_parents(path)
    handle = files.open_plain(path, os.O_RDWR | os.O_CREAT)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _ref(name: str, revision: str | None) -> Path:
    return _kept(name) / "refs" / quote(revision or "main", safe="")


def _listing(name: str, commit: str) -> Repository | None:
    """The repository at a commit whose list of files an earlier command has kept."""
    path = _kept(name) / f"{commit}{LISTING}"
    if not COMMIT.fullmatch(commit) or not path.is_file():
        return None
    sizes: Any = None
    with suppress(InputError):
        sizes = read_json(path).get("sizes")
    if not _are_sizes(sizes):
        raise InputError(f"{path}: not a list of files with their sizes; remove it")
    return Repository(name, commit, sizes)


def _left(name: str, revision: str | None) -> Path | Repository | None:
    """What earlier commands have left of a revision: a download, whole if it can be; or what was read of its files."""
    from huggingface_hub.utils import HFValidationError

    ref = _ref(name, revision)
    kept = _listing(name, ref.read_text() if ref.is_file() else revision or "")
    try:
        snapshot = _snapshot(name, revision)
    except HFValidationError:
        return None
    return snapshot if snapshot is not None and (kept is None or _whole(snapshot)) else kept


def _whole(snapshot: Path) -> bool:
    try:
        open_checkpoint(snapshot)
    except InputError:
        return False
    return True


def _snapshot(name: str, revision: str | None) -> Path | None:
    """The folder in the hub's cache that holds a revision's files, as far as they were downloaded."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, CONFIG, revision=revision)
    return Path(found).parent if isinstance(found, str) else None
