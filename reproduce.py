"""The README's table, made again: plans and seeds in pairs (same data order, same evaluation), at the default size.

    python reproduce.py                            # 4 plans x 3 seeds, one thread each: about an hour on 2 cores
    python report.py results/laptop/*.jsonl        # the table, from the committed records

Runs that are finished are not run again; killed ones go on. Each run's records, but for its training steps, are copied
to results/PRESET/PLAN-SEED.jsonl.
Not here: the papers' other claims.
"""
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import report
import sweep
from common import UserError, parse, run


@dataclass(frozen=True)
class Reproduce:
    plans: str = "scratch,naive,idea,idea-kd"   # rows of schedule.PLANS
    seeds: int = 3                              # 0, 1, ...
    preset: str = "laptop"                      # see train.py
    steps: int | None = None                    # default: train.py's
    lr: float | None = None                     # peak learning rate; default: the preset's
    cuts: int | None = None                     # of the prune stage; default: train.py's (adapt: 1 is its control)
    jobs: int = os.cpu_count() or 1             # runs side by side
    runs: str = "runs"                          # where the run folders go


def main(config):
    if config.jobs < 1 or config.seeds < 1:
        raise UserError(f"--jobs {config.jobs} and --seeds {config.seeds} must be at least 1")
    chosen = {k: v for k, v in (("steps", config.steps), ("lr", config.lr), ("cuts", config.cuts)) if v is not None}
    mark, results, todo = "".join(f"-{k}{v:g}" for k, v in chosen.items()), [], []
    for seed in range(config.seeds):
        for plan in config.plans.split(","):
            folder = Path(config.runs) / f"{plan}{mark}-{config.preset}-{seed}"
            results.append((Path("results") / config.preset / f"{plan}{mark}-{seed}.jsonl", folder))
            todo.append((folder, dict(plan=plan, seed=seed, preset=config.preset, **chosen)))
    if sweep.side_by_side(sweep.one, todo, config.jobs) < len(todo):
        raise UserError("stopped before all runs were finished; the same command goes on")
    for path, folder in results:
        sweep.keep_records(folder, path)
        if path.stem.endswith("-0") and (folder / "run.png").exists():
            shutil.copy(folder / "run.png", path.with_suffix(".png"))
    print(report.table([path for path, _ in results]))


if __name__ == "__main__":
    run(lambda: main(parse(Reproduce)))
