"""moekit figures: the figures of recorded results."""

from pathlib import Path

from moekit.commands.output import AsJson, print_result


def figures(
    results: Path = Path("assets/results"),
    out: Path = Path("assets/figures"),
    designs: Path = Path("assets/studies"),
    json: AsJson = False,
) -> int:
    """Redraw the figures of recorded studies and evaluations.

    Args:
      results: Folder of the recorded JSON files; the cells of a study are in a folder of their own.
      out: Folder for the figures.
      designs: Folder of the files that describe studies.
    """
    from moekit.analysis.recorded import figures as draw_figures
    from moekit.experiment.report import draw_studies

    drawn = draw_studies(designs, results, out)
    if not drawn or any(results.glob("*.json")):
        drawn = draw_figures(results, out) + drawn
    paths = [str(path) for path in drawn]
    print_result(paths, "\n".join(paths), json)
    return 0


COMMAND = figures
