"""Figures of mixtures and packed batches."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from moekit.data.batch import Batch
from moekit.data.mixture import Mixture


def plot_rates(mixture: Mixture) -> Figure:
    """Share of every cluster in a mixture, with the number of its tasks."""
    rates_of_cluster: dict[str, list[float]] = {}
    for task in mixture.tasks:
        rates_of_cluster.setdefault(task.cluster, []).append(mixture.rates[task.name])
    shares = {cluster: sum(rates) for cluster, rates in rates_of_cluster.items()}
    clusters = sorted(shares, key=lambda cluster: shares[cluster])

    height = 0.8 + 0.28 * len(clusters)
    figure, axes = plt.subplots(figsize=(6.5, height), layout="constrained")
    lengths = [shares[cluster] for cluster in clusters]
    axes.barh(clusters, lengths, color="0.6", edgecolor="0.2")
    for place, cluster in enumerate(clusters):
        text = f" {len(rates_of_cluster[cluster])} tasks"
        axes.annotate(text, (shares[cluster], place), va="center", fontsize=8)
    axes.set_xlabel("share of all examples")
    axes.set_title(f"Clusters of {mixture.name}")
    axes.set_xlim(0, max(lengths) * 1.2)
    return figure


def plot_packing(batch: Batch) -> Figure:
    """The example of each position of a packed batch; white is padding."""
    figure, (inputs, targets) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    sides = (("inputs", inputs, batch.input_segments), ("targets", targets, batch.target_segments))
    for name, axes, side_segments in sides:
        segments = np.asarray(side_segments)
        used = (segments > 0).mean()
        shades = np.where(segments > 0, segments % 2 + 1, 0)  # neighbours differ
        axes.imshow(shades, cmap="Greys", vmin=0, vmax=3, aspect="auto", interpolation="nearest")
        axes.set_title(f"{name}: {used:.0%} of positions used")
        axes.set_xlabel("position (tokens)")
        axes.set_ylabel("row of the batch")
    return figure
