"""Eight virtual devices, checked shapes, no display, no network: set before any import."""

import os

os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["MPLBACKEND"] = "Agg"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"

from jaxtyping import install_import_hook

install_import_hook("moekit", "beartype.beartype")
