"""moekit figures: the figures of recorded results."""

from pathlib import Path

from moekit.commands.output import AsJson, print_result


def figures(
    results: Path = Path("assets/results"),
    out: Path = Path("assets/figures"),
    json: AsJson = False,
) -> int:
    """Redraw the figures of recorded studies and evaluations.

    Args:
      results: Folder of the recorded JSON files.
      out: Folder for the figures.
    """
    from moekit.analysis.recorded import figures as draw_figures

    paths = [str(path) for path in draw_figures(results, out)]
    print_result(paths, "\n".join(paths), json)
    return 0


COMMAND = figures
