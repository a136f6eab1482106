"""Pictures of an experiment in its run folder."""

from matplotlib.figure import Figure

from in2core_jax.report.plots import figure_bytes
from in2core_jax.runs import run_folder


def write_figure(run_dir: run_folder.RunDir, name: str, figure: Figure) -> None:
  """Writes plots/NAME.svg, for papers, and plots/NAME.png."""
  for kind in ("svg", "png"):
    run_dir.write_bytes(f"plots/{name}.{kind}", figure_bytes(figure, kind))
