"""Entry points: one short file a stage, run as `python -m experiments.STAGE --flagfile=...`."""

import os

# transformers serves tokenizers only: its advice to install PyTorch would mislead. And nothing is fetched at run time.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
