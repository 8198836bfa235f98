"""Jobs beside sampling and training, each run as `python -m tools.NAME`."""
