"""Other published ways to cut, grow, sparsify and mend a model, one paper or family a file. `prune.py` and
`train.py` import what their flags ask for. `grow`, `sheared`, `lora` and `self_text` are commands, as in
`python -m methods.grow`. docs/methods.md has them all.
"""
