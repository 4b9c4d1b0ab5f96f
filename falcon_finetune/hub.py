"""The Hugging Face hub: one quick question before anything is fetched, the files, and why something cannot be had.

Every failure becomes cause and cure within 10 s: offline, unreachable, gated, mistyped, no such revision, a cache that cannot be written.
Models and data sets take the same path.
"""

import contextlib
import difflib
import logging
import os
import queue
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_hf_file_metadata, get_token, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError, GatedRepoError, HFValidationError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled,
    RepositoryNotFoundError, RevisionNotFoundError,
)  # fmt: skip
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, validate_repo_id

from falcon_finetune.options import UserError

logger = logging.getLogger(__name__)

# A hub that does not answer is an error within 10 s: seconds for each phase of a request, and for all of it (names are resolved
# without a time-out of their own).
_PHASE_SECONDS = 4.0
_ANSWER_SECONDS = 8.0

# What a request raises. HTTPError is the base class of whichever HTTP library this huggingface_hub is built on: httpx in 1.x, httpx2 in 2.x.
HUB_FAILURES = (HTTPError, EntryNotFoundError, OSError)


@dataclass(frozen=True)
class HubRepo:
    """A model or a data set on the hub.

    Attributes:
        kind: "model" or "data set".
        revision: commit, branch or tag; None for the default branch.
        entry: the file that one of its kind must have, which is asked for first; None if any files will do.
    """

    name: str
    kind: str
    revision: str | None = None
    entry: str | None = None

    @property
    def page(self) -> str:
        """Its address in a browser."""
        return f"{constants.ENDPOINT}/{'datasets/' if self.kind == 'data set' else ''}{self.name}"

    @property
    def instead(self) -> str:
        """What needs no hub."""
        return "a local folder with -m" if self.kind == "model" else "a local file with -d"


# --- names -----------------------------------------------------------------------------------------------------------------------------


def is_hub_id(name: str) -> bool:
    """Whether a name can be that of a repository (`user/name`, or `name` for some old ones), as opposed to a path."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not name.startswith((".", "/", "~")) and "\\" not in name


def nearby(name: str, *, only_folders: bool = False) -> str:
    """`; near it: ...`, or nothing: files and folders here whose names resemble a name that was not found."""
    start, last = os.path.split(name.rstrip("/"))
    found: list[str] = []
    for parent in dict.fromkeys((start, ".")):
        folder = Path(parent or ".").expanduser()
        entries = [entry for entry in names_in(folder) if not entry.startswith(".") and ((folder / entry).is_dir() or not only_folders)]
        found += [os.path.join(parent or ".", entry) for entry in difflib.get_close_matches(last, entries, n=3, cutoff=0.6)]
    return f"; near it: {listed(dict.fromkeys(found), 3)}" if found else ""


def names_in(folder: Path) -> list[str]:
    """Sorted names of a folder's entries; none for what cannot be read."""
    try:
        return sorted(entry.name for entry in Path(folder).iterdir())
    except OSError:
        return []


def listed(names: Iterable[str], limit: int = 8) -> str:
    """Names for a message: the first `limit` and how many more."""
    names = list(names)
    more = [f"and {len(names) - limit} more"] if len(names) > limit else []
    return ", ".join(names[:limit] + more) or "nothing"


def last_line(error: BaseException) -> str:
    """What an error says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


# --- requests and files ------------------------------------------------------------------------------------------------------------------


def reach(repo: HubRepo) -> None:
    """Asks the hub once, without retries, whether the files of a repository can be had; writes nothing.

    The libraries' downloads repeat a failed request for half a minute; this can go when a release lets the caller limit that.

    Raises:
        one of HUB_FAILURES, for `explain`.
    """
    _answer_within(_ANSWER_SECONDS, lambda: _ask_for_file(repo))


def _ask_for_file(repo: HubRepo) -> None:
    file, kind = repo.entry, "model" if repo.kind == "model" else "dataset"
    if file is None:
        siblings = HfApi().repo_info(repo.name, repo_type=kind, revision=repo.revision, timeout=_PHASE_SECONDS).siblings
        if not siblings:
            return
        file = siblings[0].rfilename  # a gated repository tells its names to everybody and refuses its files
    get_hf_file_metadata(hf_hub_url(repo.name, file, repo_type=kind, revision=repo.revision), timeout=_PHASE_SECONDS)


def fetch_entry(repo: HubRepo) -> tuple[Path, str]:
    """Snapshot folder of a model with its entry file, and its commit; from the cache, with a warning, where the hub does not answer.

    Raises:
        UserError: a hub that cannot be used (nothing is written), or a repository that cannot be had.
    """
    is_commit = repo.revision is not None and re.fullmatch(r"[0-9a-f]{40}", repo.revision)
    cached = None
    try:
        cached = _cached_entry(repo)
        if cached is not None and (constants.HF_HUB_OFFLINE or is_commit):
            return cached
        reach(repo)
        with _no_progress_bars():
            path = Path(hf_hub_download(repo.name, repo.entry, revision=repo.revision, etag_timeout=_PHASE_SECONDS))
    except HUB_FAILURES as error:
        if cached is None or not is_outage(error):
            raise explain(error, repo) from error
        warn_of_cache(error, repo, f"the cached revision {cached[1]}")
        return cached
    return path.parent, path.parent.name  # the cache keeps a file as .../snapshots/COMMIT/config.json


def _cached_entry(repo: HubRepo) -> tuple[Path, str] | None:
    try:
        path = Path(hf_hub_download(repo.name, repo.entry, revision=repo.revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    return path.parent, path.parent.name


def names_on_hub(repo: HubRepo) -> list[str]:
    """The files of a model at its revision."""
    try:
        reach(repo)
        return HfApi().list_repo_files(repo.name, revision=repo.revision)
    except HUB_FAILURES as error:
        raise explain(error, repo) from error


def fetch(repo: HubRepo, names: list[str]) -> None:
    """Brings files of a model into its snapshot folder, with a progress bar for weights."""
    large = any(name.endswith((".safetensors", ".bin")) for name in names)
    try:
        with contextlib.nullcontext() if large else _no_progress_bars():
            snapshot_download(repo.name, revision=repo.revision, allow_patterns=names, etag_timeout=_PHASE_SECONDS)
    except HUB_FAILURES as error:
        raise explain(error, repo) from error


def _answer_within(seconds: float, ask: Callable[[], Any]) -> Any:
    """Calls `ask` and waits no longer than `seconds` for it; what it raises is raised here."""
    answers: queue.Queue = queue.Queue()

    def call() -> None:
        try:
            answers.put((ask(), None))
        except BaseException as error:
            answers.put((None, error))

    threading.Thread(target=call, daemon=True).start()
    try:
        answer, error = answers.get(timeout=seconds)
    except queue.Empty:
        error = TimeoutError(f"no answer within {seconds:g} s")
    if error is not None:
        raise error
    return answer


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """No bar for small files."""
    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


# --- failures ----------------------------------------------------------------------------------------------------------------------------


def _root_of(error: BaseException) -> BaseException:
    """What stopped a download: the library wraps it in "not found locally" errors."""
    while isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def is_outage(error: BaseException) -> bool:
    """Whether the hub did not answer or is out of order, as opposed to refusing this request."""
    status = _status(_root_of(error))
    return status is None or status >= 500 or status == 429


def warn_of_cache(error: BaseException, repo: HubRepo, what: str) -> None:
    """Says that something was not asked for but taken from the cache, and why."""
    logger.warning("%s; using %s of %s", explain(error, repo).cause, what, repo.name)


def explain(error: BaseException, repo: HubRepo) -> UserError:
    """Cause and cure of a request that failed."""
    error, name, hub = _root_of(error), repo.name, constants.ENDPOINT
    status, near = _status(error), nearby(name, only_folders=repo.kind == "model")
    if constants.HF_HUB_OFFLINE or isinstance(error, OfflineModeIsEnabled):
        variable = "HF_DATASETS_OFFLINE" if repo.kind == "data set" and not constants.HF_HUB_OFFLINE else "HF_HUB_OFFLINE"
        download = f"run 'hf download {name}' where there is a network" if repo.kind == "model" else f"give {repo.instead}"
        return UserError(f"{repo.kind} {name} is not (completely) in the cache, and {variable}=1 forbids to ask the hub",
                         f"unset {variable}, or {download}{near}")  # fmt: skip
    if isinstance(error, GatedRepoError):
        return UserError(f"{repo.kind} {name} is gated, and this machine may not read it (token found: {_token_found()})",
                         f"accept its terms at {repo.page}, then run 'hf auth login' or set HF_TOKEN")  # fmt: skip
    if isinstance(error, RevisionNotFoundError):
        return UserError(f"{name} on {hub} has no revision {repo.revision!r}", f"choose one of {repo.page}/tree/main, or drop --revision")
    if isinstance(error, EntryNotFoundError) and status is not None:
        return UserError(f"{name} on {hub} has no {repo.entry or 'such file'}", f"see {repo.page}/tree/main; give the id of a whole {repo.kind}")
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        return UserError(f"{hub} has no {repo.kind} {name!r} that this machine may read (token found: {_token_found()})",
                         f"check the spelling; a private {repo.kind} needs 'hf auth login' or HF_TOKEN{near}")  # fmt: skip
    if status in (401, 403):
        return UserError(f"{hub} refuses {name} with HTTP {status} (token found: {_token_found()})",
                         f"open {repo.page} in a browser, accept its terms if it has any, then run 'hf auth login' or set HF_TOKEN")  # fmt: skip
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, (ConnectionError, TimeoutError)):
        return UserError(f"cannot use the hub's cache {constants.HF_HUB_CACHE}: {error.strerror or error}",
                         f"set HF_HOME to a folder that can be written and has room for the {repo.kind}")  # fmt: skip
    reason = f"HTTP {status}" if status is not None else f"{type(error).__name__}: {last_line(error)}"
    return UserError(f"the hub at {hub} cannot be reached for {name} ({reason})",
                     f"check the network, HF_ENDPOINT and proxy settings, or give {repo.instead}{near}")  # fmt: skip


def _token_found() -> str:
    if get_token() is None:
        return "none"
    return "HF_TOKEN" if os.environ.get("HF_TOKEN") else "yes"
