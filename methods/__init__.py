"""Other published ways to cut a model, one paper or family a file. `prune.py` and `train.py` import a file from here
only when a flag asks for what it does; `experiments/` compares all of them."""
