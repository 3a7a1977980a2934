"""Fetching one repository of the hub at one commit: only the files that a load reads.

Nothing here runs unless the caller said `download=True`. A branch or tag is first resolved to the
commit that it names now; every file is then asked for by that commit, so that a push in the middle
cannot mix two versions. Files go to the hub's own cache, which the next load finds again.
"""

import hashlib
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from deepzoo.zoo import files
from deepzoo.zoo.errors import WeightError
from deepzoo.zoo.files import INDEX_NAME, SINGLE_NAME
from deepzoo.zoo.progress import Progress, track

COMPANIONS = (
    "config.json",
    "generation_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


class Fetched(NamedTuple):
    """Where the files of a repository lie, and which commit they are."""

    directory: Path
    commit: str


class _Remote(NamedTuple):
    """One file of the repository; the sha256 is known for large ones only."""

    size: int | None
    sha256: str | None


def download(repo: str, *, revision: str | None = None, progress: Progress = None) -> Fetched:
    """Fetches what `load` needs of `repo` into the hub's cache; files that are there are kept.

    That is config.json, generation_config.json, the tokenizer's files, chat_template.jinja, the
    weight index and the safetensors files it names. No code, no pickles, no subfolders. Large files
    that were fetched now are compared with the hash that the hub has for them.

    Args:
        repo: "organisation/name".
        revision: a branch or tag, "main" by default, or a commit hash, which pins the files: if it
            is in the cache already, no network is needed.
        progress: see `progress.Progress`. With a bar, the commit is written to stderr, too.

    Raises:
        WeightError: no such repository or revision, it holds no safetensors, the hub cannot be
            reached, the disk is too small, or a file is not what the hub says.
    """
    if not _NAME.fullmatch(repo):
        raise WeightError(f"{repo!r} is no hub id; expected organisation/name")
    if revision is not None and _COMMIT.fullmatch(revision) and (held := _cached(repo, revision)):
        return Fetched(held, revision)
    commit, remote = _list(repo, revision)
    names = _wanted(repo, commit, remote)
    _check_space(repo, commit, names, remote)
    if progress is True or (progress is None and sys.stderr.isatty()):
        print(f"{repo}: commit {commit}", file=sys.stderr)
    directory = _fetch(repo, commit, names, remote, progress)
    return Fetched(directory, commit)


def wanted_names(names: Iterable[str]) -> list[str]:
    """Of the files of a repository, those that a load reads, but for the choice of weight files."""
    return sorted(
        name
        for name in names
        if name in COMPANIONS or (name.startswith("tokenizer") and files.bare_name(name, ".json"))
    )


def _list(repo: str, revision: str | None) -> tuple[str, dict[str, _Remote]]:
    """The commit that `revision` means, and the files of the repository there."""
    from huggingface_hub import HfApi

    with _hub_errors(repo, revision):
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    if info.sha is None or not _COMMIT.fullmatch(info.sha):
        raise WeightError(f"{repo}: the hub answers with no commit hash; nothing is fetched")
    if revision is not None and _COMMIT.fullmatch(revision) and info.sha != revision:
        raise WeightError(f"{repo}: asked for commit {revision}, the hub answers with {info.sha}")
    found = {}
    for file in info.siblings or ():
        lfs: Any = file.lfs
        sha256 = None if lfs is None else lfs["sha256"]
        found[file.rfilename] = _Remote(file.size, sha256)
    return info.sha, found


def _wanted(repo: str, commit: str, remote: dict[str, _Remote]) -> list[str]:
    names = wanted_names(remote)
    if "config.json" not in names:
        raise WeightError(f"{repo}: no config.json at commit {commit[:12]}; not a model")
    if INDEX_NAME in remote:
        index = files.read_json(_fetch(repo, commit, [INDEX_NAME], remote, False), INDEX_NAME)
        shards = sorted(set(files.weight_map(index, f"{repo}/{INDEX_NAME}").values()))
        if missing := set(shards) - remote.keys():
            raise WeightError(
                f"{repo}: {INDEX_NAME} names {files.some(missing)}, which the repository lacks"
            )
        return [*names, INDEX_NAME, *shards]
    if SINGLE_NAME in remote:
        return [*names, SINGLE_NAME]
    held = files.some(n for n in remote if "/" not in n)
    raise WeightError(
        f"{repo}: holds neither {SINGLE_NAME} nor {INDEX_NAME} at commit {commit[:12]}, and other"
        f" formats are not read; it has {held}"
    )


def _check_space(repo: str, commit: str, names: list[str], remote: dict[str, _Remote]) -> None:
    lacking = [n for n in names if _in_cache(repo, commit, n) is None]
    needed = sum(remote[n].size or 0 for n in lacking)
    cache = _cache_directory()
    free = shutil.disk_usage(next(p for p in (cache, *cache.parents) if p.exists())).free
    if needed > free:
        raise WeightError(
            f"{repo}: {needed:,} bytes to fetch, but {free:,} are free in {cache}; set HF_HOME to a"
            " larger disk"
        )


def _fetch(
    repo: str, commit: str, names: list[str], remote: dict[str, _Remote], progress: Progress
) -> Path:
    """Fetches `names` and returns the directory of the commit."""
    from huggingface_hub import hf_hub_download

    directory = None
    total = sum(remote[n].size or 0 for n in names)
    with track(f"fetching {repo}", total, progress) as advance:
        for name in names:
            path = _in_cache(repo, commit, name)
            if path is None:
                with _hub_errors(repo, commit):
                    quiet = _silent_bar(advance)
                    path = Path(hf_hub_download(repo, name, revision=commit, tqdm_class=quiet))
                _verify(repo, path, name, remote[name])
            else:
                advance(remote[name].size or 0)
            directory = path.parent
    assert directory is not None
    return directory


def _verify(repo: str, path: Path, name: str, remote: _Remote) -> None:
    """Compares a fetched file with what the hub said about it; a wrong one does not stay."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while data := file.read(16 << 20):
            size += len(data)
            if remote.sha256 is not None:
                digest.update(data)
    wrong = remote.size is not None and size != remote.size
    if wrong or (remote.sha256 is not None and digest.hexdigest() != remote.sha256):
        path.resolve().unlink()
        path.unlink()
        raise WeightError(
            f"{repo}: {name} arrived damaged ({size} bytes, its hash or size is not the hub's); it"
            " is removed, fetch it again"
        )


def _silent_bar(advance: Any) -> type:
    """The bar class that the hub library asks for, reporting to our own progress instead."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any):
            kwargs["disable"] = True
            super().__init__(*args, **kwargs)
            if initial := kwargs.get("initial"):
                advance(int(initial))

        def update(self, n: float | None = 1) -> bool | None:
            advance(int(n or 0))
            return super().update(n)

    return Bar


def _cached(repo: str, commit: str) -> Path | None:
    """The cached directory of a commit if all that a load needs is in it."""
    if (config := _in_cache(repo, commit, "config.json")) is None:
        return None
    if (index := _in_cache(repo, commit, INDEX_NAME)) is not None:
        found = files.read_json(index.parent, INDEX_NAME)
        needed = set(files.weight_map(found, str(index)).values())
    else:
        needed = {SINGLE_NAME}
    complete = all(_in_cache(repo, commit, name) is not None for name in needed)
    return config.parent if complete else None


def _in_cache(repo: str, commit: str, name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, name, revision=commit)
    return Path(found) if isinstance(found, str) else None


def _cache_directory() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _cached_commits(repo: str) -> list[str]:
    snapshots = _cache_directory() / f"models--{repo.replace('/', '--')}" / "snapshots"
    held = sorted(p.name for p in snapshots.glob("*") if _COMMIT.fullmatch(p.name))
    return [commit for commit in held if _cached(repo, commit) is not None]


@contextmanager
def _hub_errors(repo: str, revision: str | None) -> Iterator[None]:
    """Turns what the hub library throws, of several libraries below it, into one line."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise WeightError(
            f"{repo}: its licence must be accepted on the hub first; then log in (`hf auth login`)"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise WeightError(
            f"{repo}: no such repository on the hub, or it is private (`hf auth login`)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise WeightError(f"{repo}: the hub has no revision {revision!r} of it") from error
    except Exception as error:  # timeouts, refused connections, offline mode, proxies
        raise WeightError(_unreachable(repo, error)) from error


def _unreachable(repo: str, error: Exception) -> str:
    from huggingface_hub.constants import ENDPOINT

    reason = (str(error).splitlines() or [""])[0][:200]
    held = _cached_commits(repo)
    hint = "fetch it where there is a network, and pass the directory"
    if held:
        hint = f"the cache holds commit {', '.join(held)}: pass it as revision= (--revision)"
    return (
        f"{repo}: cannot be fetched from {ENDPOINT} ({type(error).__name__}: {reason}); check the"
        f" connection, or {hint}"
    )
