"""Names of the files and folders in the folder of a run."""

CHECKPOINTS = "checkpoints"  # the folder of all checkpoints; each one is a folder named by its step
METADATA = "meta"  # the JSON item of a checkpoint
METADATA_FILE = "metadata"  # the file of that item, as orbax names it


def is_step(name: str) -> bool:
    """Whether a file is named like a checkpoint."""
    return name.isascii() and name.isdecimal() and str(int(name)) == name
