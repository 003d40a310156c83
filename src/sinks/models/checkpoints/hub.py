"""A model from the Hugging Face Hub as a local folder: safetensors and what goes with them, nothing else."""

from pathlib import Path
from typing import NoReturn

import huggingface_hub
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from sinks.errors import AssetError, FetchError, SinksError, UnknownName
from sinks.models.checkpoints.folder import WEIGHTS, WEIGHTS_INDEX, is_pickle, missing_weights, read_json, refuse_pickle

_BESIDE_WEIGHTS = (".json", ".model", ".txt", ".jinja", ".tiktoken")
_OTHER_WEIGHTS = ("consolidated", "adapter_")


def snapshot(repository: str, trust_remote_code: bool) -> Path:
    """The folder of a Hub model's snapshot, named by its commit; downloaded only when it is not in the Hub's cache.

    A complete snapshot in the cache is used as it is, without asking whether there is a newer one.

    Raises:
        UnknownName: there is no such repository.
        UnsafeCheckpoint: it holds pickles only.
        FetchError: the Hub cannot be reached, or says no.
        AssetError: it holds no safetensors under the usual names.
    """
    if found := _cached(repository, trust_remote_code):
        return found
    try:
        # Not `list_repo_files`, which retries for half a minute without a network and logs each try.
        files = [file.rfilename for file in huggingface_hub.model_info(repository).siblings or ()]
        wanted = _choose(repository, files, trust_remote_code)
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=wanted))
    except SinksError:
        raise
    except Exception as error:  # the client lets through whatever its HTTP library raises, and that library changes
        _explain(repository, error)


def _cached(repository: str, trust_remote_code: bool) -> Path | None:
    try:
        folder = Path(huggingface_hub.snapshot_download(repository, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    if not (folder / "config.json").is_file() or missing_weights(folder):
        return None
    # A snapshot downloaded before code was asked for has none.
    code_missing = (
        trust_remote_code and "auto_map" in read_json(folder / "config.json") and not any(folder.glob("*.py"))
    )
    return None if code_missing else folder


def _choose(repository: str, files: list[str], trust_remote_code: bool) -> list[str]:
    """Which of the repository's files to download. Subfolders hold other formats and are left alone."""
    top = [name for name in files if "/" not in name]
    weights = [WEIGHTS] if WEIGHTS in top else []
    if WEIGHTS_INDEX in top:
        # Some repositories hold every weight twice, once more under the name that the original code gave it.
        weights = [name for name in top if name.endswith(".safetensors") and not name.startswith(_OTHER_WEIGHTS)]
    if not weights and (pickles := [name for name in top if is_pickle(name)]):
        refuse_pickle(repository, pickles)
    if not weights:
        raise AssetError(
            f"{repository} on the Hub holds no {WEIGHTS}: choose a repository that does, "
            f"or download a GGUF file and give its path"
        )
    beside = (*_BESIDE_WEIGHTS, ".py") if trust_remote_code else _BESIDE_WEIGHTS
    return [*weights, *(name for name in top if name.endswith(beside) or name == "README.md")]


def _explain(repository: str, error: Exception) -> NoReturn:
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if isinstance(error, GatedRepoError):  # before its base class, which means something else
        raise FetchError(
            f"{repository} is gated: ask for access on its Hub page, log in with `hf auth login`, and run again"
        ) from error
    if isinstance(error, RepositoryNotFoundError):
        raise UnknownName(
            f"the Hub has no model {repository!r}, or it is private: check the name, or log in with `hf auth login`"
        ) from error
    raise FetchError(
        f"could not fetch {repository} from the Hub ({reason}): check the network and HF_HUB_OFFLINE and run again, "
        f"or give the path of a local folder"
    ) from error
