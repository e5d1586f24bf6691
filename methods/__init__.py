"""Other published ways to cut, mend or sparsify a model, one paper or family a file. `prune.py` and
`train.py` import from here only what a flag of theirs asks for; `experiments/` compares all of
them.
"""
