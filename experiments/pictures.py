"""Pictures of an experiment in its run folder."""

from matplotlib.figure import Figure

from in2core_jax import artifacts, report


def write_figure(run_dir: artifacts.RunDir, name: str, figure: Figure) -> None:
  """Writes plots/NAME.svg, for papers, and plots/NAME.png."""
  for kind in ("svg", "png"):
    run_dir.write_bytes(f"plots/{name}.{kind}", report.figure_bytes(figure, kind))
