"""Checkpoints on the Hugging Face hub, downloaded into its cache."""

import re
from pathlib import Path

TIMEOUT = 10  # seconds that the hub has to answer
SETTINGS = ["*.json", "spiece.model"]


def is_hub_id(name: str) -> bool:
    """Whether a name could be that of a repository, as google/flan-t5-small."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None


def download_model(repository: str) -> Path:
    """The folder of a model of the hub: configuration, tokenizer and one kind of weights.

    Raises:
      ConnectionError: there is no network, or no such model.
    """
    from huggingface_hub import HfApi, snapshot_download

    try:
        info = HfApi().model_info(repository, timeout=TIMEOUT)
        names = [file.rfilename for file in info.siblings]
        has_safetensors = any(name.endswith(".safetensors") for name in names)
        weights = "*.safetensors" if has_safetensors else "*.bin"
        return Path(snapshot_download(repository, allow_patterns=[*SETTINGS, weights]))
    except Exception as error:  # the client raises many types for one cause
        reason = type(error).__name__
    try:  # perhaps it was downloaded before
        return Path(snapshot_download(repository, local_files_only=True))
    except Exception:
        raise ConnectionError(
            f"{repository} is not a folder here and could not be loaded from the Hugging Face hub "
            f"({reason}): check the name; without a network, download the model elsewhere "
            f"(huggingface-cli download {repository} --local-dir FOLDER) and give that folder"
        ) from None
