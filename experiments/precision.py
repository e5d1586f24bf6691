"""What bfloat16 does to the loss: paired runs in float32 and under bfloat16 autocast.

    python -m experiments.precision --jobs 2       # 8 seeds, 16 runs of 300 steps
    python -m experiments.precision --seeds 20     # twelve more of each

A pair shares its seed, so both runs begin with the same weights and read the same data in the same
order. Both are judged on the same hold-out, in float32 (train.py evaluates outside of autocast).
The interval is Student's, of the mean difference over seeds. Nothing is compiled. Every run has one
thread, and a finished one is not run again. Not here: how fast the two are (bench/dtypes.py).
"""
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import report
from common import check_positive, parse, run
from experiments import sweep
from experiments.claims_statistics import LEVEL, effect
from train import PresetName

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Precision:
    out: str = "results/precision.jsonl"     # file of records
    runs: str = "runs/precision"             # folder of the runs
    seeds: int = 8                           # pairs of runs
    preset: PresetName = "4x256"             # size of the model
    steps: int = 300                         # optimizer steps of a run
    batch_tokens: int = 1024                 # tokens per step
    block_size: int = 128                    # tokens of context
    eval_windows: int = 256                  # windows of the hold-out
    jobs: int = 1                            # runs side by side, with one thread each
    minutes: float | None = None             # then the runs are saved; the same command goes on


def settings_of(config, dtype, seed):
    """The settings of train.py for a run. The peak learning rate is the preset's."""
    # Evaluated at the beginning and at the end only, as evaluations take float32's time in both.
    return dict(plan="scratch", preset=config.preset, seed=seed, steps=config.steps,
                batch_tokens=config.batch_tokens, block_size=config.block_size,
                micro_batch=config.batch_tokens // config.block_size, dtype=dtype,
                eval_every=config.steps, eval_windows=config.eval_windows)


def make(config, name, settings):
    """Train one model and keep its records."""
    folder = f"{config.runs}/{name}"
    sweep.run_plan(folder, settings)
    sweep.put_runs(config.out, {name: sweep.without_steps(folder)})


def losses(config):
    """What is recorded of the runs: {(dtype, seed): final loss, or None without records}. Raises
    UserError if a run has records of other settings."""
    runs = report.read_runs(config.out) if Path(config.out).exists() else {}
    recorded = {}
    for seed in range(config.seeds):
        for dtype in DTYPES:
            name = name_of(dtype, seed)
            settings = settings_of(config, dtype, seed)
            finished = sweep.is_finished(f"{name} in {config.out}", runs.get(name), settings, "--out")
            recorded[dtype, seed] = runs[name]["summary"][0]["val_loss"] if finished else None
    return recorded


def name_of(dtype, seed):
    return f"{dtype}-s{seed}"


def table(recorded, seeds):
    """The losses and their differences as Markdown, and what they say in a sentence."""
    in_float32 = [recorded["float32", seed] for seed in range(seeds)]
    in_bfloat16 = [recorded["bfloat16", seed] for seed in range(seeds)]
    differences = [b - a for a, b in zip(in_float32, in_bfloat16)]
    measured = effect(differences)
    rows = []
    for seed in range(seeds):
        rows.append([seed, f"{in_float32[seed]:.4f}", f"{in_bfloat16[seed]:.4f}", f"{differences[seed]:+.4f}"])
    rows.append(["mean", f"{statistics.mean(in_float32):.4f}", f"{statistics.mean(in_bfloat16):.4f}",
                 f"{measured.mean:+.4f}"])
    if seeds > 1:
        rows.append(["standard deviation", f"{statistics.stdev(in_float32):.4f}",
                     f"{statistics.stdev(in_bfloat16):.4f}", f"{measured.sd:.4f}"])
    head = ("seed", "float32", "bfloat16", "bfloat16 − float32 (nats per token)")
    return f"{report.markdown(head, rows)}\n\n{sentence(measured)}"


def sentence(measured):
    """What an Effect says of bfloat16, and no more."""
    if measured.seeds < 2:
        return "One pair has no interval and says nothing."
    if measured.low > 0:
        verdict = "training in bfloat16 ends with a higher loss"
    elif measured.high < 0:
        verdict = "training in bfloat16 ends with a lower loss"
    else:
        verdict = "no difference is shown, and none within the interval is excluded"
    return (f"Over {measured.seeds} pairs bfloat16 minus float32 is {measured.mean:+.4f} nats per token, "
            f"with a {LEVEL:.0%} interval from {measured.low:+.4f} to {measured.high:+.4f}: {verdict}.")


def main(config):
    check_positive(config, ("seeds", "steps", "batch_tokens", "block_size", "eval_windows", "jobs", "minutes"))
    until = None if config.minutes is None else time.time() + 60 * config.minutes
    missing = []
    for (dtype, seed), loss in losses(config).items():
        if loss is None:
            missing.append((config, name_of(dtype, seed), settings_of(config, dtype, seed)))
    done = sweep.side_by_side(make, missing, config.jobs, until)
    if done < len(missing):
        print(f"{len(missing) - done} runs are left; the same command goes on")
        return
    print(table(losses(config), config.seeds))


if __name__ == "__main__":
    run(lambda: main(parse(Precision)))
