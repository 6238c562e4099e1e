"""Figures of data, models, training and traces.

Each function takes data and returns a matplotlib figure. Greys and hatches survive printing, and
files have no dates: the same data gives the same file.
"""

from moekit.analysis.plots.data import plot_packing as plot_packing, plot_rates as plot_rates
from moekit.analysis.plots.layers import (
    plot_routing as plot_routing,
    plot_sharding as plot_sharding,
)
from moekit.analysis.plots.live import LivePlot as LivePlot
from moekit.analysis.plots.plans import plot_plan as plot_plan
from moekit.analysis.plots.results import (
    plot_bars as plot_bars,
    plot_learning_curves as plot_learning_curves,
    plot_scores as plot_scores,
    plot_seeds as plot_seeds,
)
from moekit.analysis.plots.style import save_figure as save_figure, show as show
from moekit.analysis.plots.traces import (
    plot_coactivation as plot_coactivation,
    plot_domain_distance as plot_domain_distance,
    plot_domain_specialization as plot_domain_specialization,
    plot_expert_load as plot_expert_load,
    plot_load as plot_load,
    plot_specialization as plot_specialization,
    plot_task_specialization as plot_task_specialization,
    plot_token_specialization as plot_token_specialization,
)
