"""The stages as commands: `python -m experiments.NAME --flagfile=...`, or `./run.sh NAME --flagfile=...`."""
