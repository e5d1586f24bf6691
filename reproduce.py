"""The README's table, made again: plans and seeds in pairs (same data order, same evaluation), at the default size.

    python reproduce.py                            # 4 plans x 3 seeds, one thread each: about an hour on 2 cores
    python report.py results/laptop/*.jsonl        # the table, from the committed records

Runs that are finished are not run again; killed ones go on. Each run's records, but for its training steps, are copied
to results/PRESET/PLAN-SEED.jsonl. Runs have one thread each, so that their sums do not depend on the machine's cores.
Not here: the papers' other claims.
"""
import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import report
from common import parse, read_records, run, write_atomic


@dataclass(frozen=True)
class Reproduce:
    plans: str = "scratch,naive,idea,idea-kd"   # rows of schedule.PLANS
    seeds: int = 3                              # 0, 1, ...
    preset: str = "laptop"                      # see train.py
    steps: int | None = None                    # default: train.py's
    lr: float | None = None                     # peak learning rate; default: the preset's
    jobs: int = os.cpu_count() or 1             # runs side by side
    runs: str = "runs"                          # where the run folders go


def one(folder, **settings):
    """Run one plan to its end, quietly, on one thread."""
    import torch

    import train
    torch.set_num_threads(1)
    train.main(train.Train(out=str(folder), device="cpu", **settings), bar=False)


def main(config):
    chosen = {k: v for k, v in (("steps", config.steps), ("lr", config.lr)) if v is not None}
    mark = "" if config.lr is None else f"-lr{config.lr:g}"
    results = {}
    with ProcessPoolExecutor(config.jobs, get_context("spawn")) as pool:
        for seed in range(config.seeds):
            for plan in config.plans.split(","):
                folder = Path(config.runs) / f"{plan}{mark}-{config.preset}-{seed}"
                results[Path("results") / config.preset / f"{plan}{mark}-{seed}.jsonl"] = folder, pool.submit(
                    one, folder, plan=plan, seed=seed, preset=config.preset, **chosen)
        for path, (folder, future) in results.items():
            future.result()
            kept = [json.dumps(r) + "\n" for r in read_records(folder / "metrics.jsonl") if r["tag"] != "step"]
            write_atomic(path, lambda file, kept=kept: file.write("".join(kept).encode()))
    print(report.table(results))


if __name__ == "__main__":
    run(lambda: main(parse(Reproduce)))
