"""Files of data sets on the Hugging Face hub, as memory-mapped tables; copies come first."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moekit.data.paths import require_file

log = logging.getLogger("moekit")
CONVERTED = "refs/convert/parquet"  # the branch where the hub keeps data sets as parquet files
TIMEOUT = 10  # seconds that the hub has to answer


@dataclass(frozen=True)
class HubFiles:
    """The parquet files of one split in a repository of the hub."""

    repository: str
    revision: str
    pattern: str

    def copies(self, root: Path | None) -> list[Path]:
        """These files in a data folder's hub/."""
        return sorted((root / "hub" / self.repository).glob(self.pattern)) if root else []

    def __str__(self) -> str:
        return f"{self.repository}/{self.pattern}"


def repository_info(repository: str, revision: str = "main") -> Any:
    """The hub's description of a data set, with its files and their sizes.

    Raises:
      ConnectionError: no network, or no such data set; the message says which.
    """
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(
            repository, revision=revision, timeout=TIMEOUT, files_metadata=True
        )
    except Exception as error:  # the client raises many types for one cause
        raise unavailable(repository, revision, error) from None


def unavailable(
    repository: str, revision: str, error: Exception, pattern: str = ""
) -> ConnectionError:
    """An error that says what was missing: network, repository, branch or files."""
    name = type(error).__name__
    where = f"{repository!r} on the Hugging Face hub"
    if name in ("RepositoryNotFoundError", "DatasetNotFoundError", "GatedRepoError"):
        problem = f"there is no public repository {where}"
    elif name == "RevisionNotFoundError":
        problem = f"{where} has no branch {revision!r}"
    elif name in ("EntryNotFoundError", "RemoteEntryNotFoundError", "DataFilesNotFoundError"):
        problem = f"{where} has no files {pattern} on branch {revision!r}"
    elif "OfflineModeIsEnabled" in f"{name} {error}":
        problem = f"could not load {where}: the network is switched off by HF_HUB_OFFLINE"
    else:
        problem = f"could not load {where}: no network ({name})"
    return ConnectionError(
        f"{problem}; fetch it where there is a network (moekit data fetch) and set MOEKIT_DATA to "
        'that folder, or use the data folder\'s own files or the builtin data ("builtin")'
    )


def open_copies(paths: Sequence[Path], split: str = "train", limit: int = 0) -> Any:
    """Parquet files as one memory-mapped table; with a limit its first rows.

    Raises:
      ValueError: files that are not parquet.
    """
    import datasets

    names = [str(path) for path in paths]
    for path in paths:
        require_file(path)
    try:
        found = datasets.load_dataset(
            "parquet", data_files={split: names}, split=split, streaming=bool(limit)
        )
        return _first_rows(found, limit) if limit else found
    except Exception as error:
        folder = Path(names[0]).parent
        raise ValueError(f"{folder}: not readable as parquet files ({error})") from None


def download(files: HubFiles, limit: int = 0) -> Any:
    """Files of the hub as one memory-mapped table; with a limit its first rows, streamed.

    Raises:
      ConnectionError: they cannot be loaded; the message says what was missing.
    """
    import datasets

    config, problem = None, None
    if not datasets.config.HF_HUB_OFFLINE:
        try:
            repository_info(files.repository, files.revision)
        except ConnectionError as error:  # perhaps it was downloaded before
            config, problem = datasets.DownloadConfig(local_files_only=True), error
    try:
        found = datasets.load_dataset(
            files.repository,
            revision=files.revision,
            data_files={"train": [files.pattern]},
            split="train",
            streaming=bool(limit),
            download_config=config,
        )
        return _first_rows(found, limit) if limit else found
    except Exception as error:
        missing = unavailable(files.repository, files.revision, error, files.pattern)
        raise problem or missing from None


def _first_rows(stream: Any, limit: int) -> Any:
    import datasets

    return datasets.Dataset.from_list(list(stream.take(limit)))
