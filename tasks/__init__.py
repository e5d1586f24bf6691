"""Questions that a model answers. `eval.py` imports this folder when --multiple-choice or --tasks asks for it, and so
does `experiments/`."""
