"""How fast everything is, beside other implementations: `python -m bench SUITE`. This folder
imports the project; nothing imports it but `experiments/compare.py`, which measures seconds and
memory with `bench.timing`."""
