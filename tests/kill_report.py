"""kill -9 at random moments, resume, compare: `python tests/kill_report.py --kills 100`.

Every trial trains a small network, is killed at a moment drawn evenly from the time that the whole run takes, goes on with --resume,
every other time is killed again, and must end with weights, average, optimizer, metrics, pictures and finished networks equal, bit for
bit, to those of a run that nobody touched: three stages, alone and in a row, both schedulers, with 0 and 2 loader workers, in float32 and
bfloat16, in the middle of epochs, also while a checkpoint is being written.
"""
import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import tinydiff.train
from small import QUICK, SMALL, differences
from tinydiff.train import TrainConfig, read_config, read_metrics, train

STEPS, EVERY = 24, 3
CASES = {f"{stage}{'-' + scheduler if scheduler else ''}, {workers} workers": (stage, scheduler, workers, "fp32")
         for stage, schedulers in (("vae", [None]), ("clip", [None]), ("diffusion", ["flow", "ddpm"]), ("all", ["flow"])) for scheduler in schedulers for workers in (0, 2)}
CASES["all-flow, 2 workers, bf16"] = ("all", "flow", 2, "bf16")


def configuration(stage: str, scheduler: str | None, workers: int, precision: str, optimizer: str, parts: Path) -> TrainConfig:
    more = dict(scheduler=scheduler) if scheduler else {}
    more |= dict(vae=str(parts), text_encoder=str(parts)) if stage == "diffusion" else {}
    settings = QUICK | dict(steps=STEPS, vae_steps=STEPS, clip_steps=STEPS, checkpoint_every=EVERY, num_workers=workers, sample_every=8, precision=precision, optimizer=optimizer)
    return TrainConfig(stage=stage, flip=True, **settings | more)


def start(config: TrainConfig) -> int:
    "Train in a process of its own; returns its id."
    child = os.fork()
    if child == 0:
        os.setsid()
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1), os.dup2(silence, 2)
        status = 1
        try:
            train(config)
            status = 0
        finally:
            os._exit(status)
    return child


def end_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def whole(config: TrainConfig, out: Path) -> float:
    "Train without disturbance; returns the seconds."
    begun = time.monotonic()
    if end_of(start(tinydiff.train.dataclasses.replace(config, out=str(out)))):
        sys.exit(f"the undisturbed run in {out} failed")
    return time.monotonic() - begun


def killed(config: TrainConfig, seconds: float, rng: random.Random) -> bool:
    "Start a run and kill it; False where it was over before."
    child = start(config)
    time.sleep(rng.uniform(0, seconds))
    os.kill(child, signal.SIGKILL)  # its loader's workers notice by themselves
    return end_of(child) != 0


def trial(config: TrainConfig, out: Path, seconds: float, rng: random.Random) -> str | None:
    "Kill one run, perhaps again when it goes on, and finish it; returns where it was hit, None where it was over before."
    if not killed(tinydiff.train.dataclasses.replace(config, out=str(out)), seconds, rng):
        return None
    if not (out / "run.json").exists():
        return "before its folder was there"
    half = list(out.glob("checkpoints/*/.*.tmp")) or list(out.glob(".*.tmp"))
    hit = "while writing a checkpoint" if half else f"{'after a checkpoint' if list(out.glob('checkpoints/*/0*')) else 'before the first checkpoint'}"
    resumed = read_config(["--resume", "--out", str(out)])
    if rng.random() < 0.5 and killed(resumed, seconds, rng):
        hit += ", and again"
    if end_of(start(resumed)):
        sys.exit(f"{out}: the resumed run failed")
    return hit


def report(kills: int, seed: int, optimizer: str, only: str, folder: Path) -> bool:
    "Print a line for each trial, and N of N."
    tinydiff.train.ARCHITECTURES["tiny"] = SMALL
    torch.set_num_threads(1)
    parts, rng, hits, good, done = folder / "parts", random.Random(seed), Counter(), 0, 0
    whole(TrainConfig(stage="all", **QUICK), parts)
    configs = {name: configuration(*case, optimizer, parts) for name, case in CASES.items() if only in name} or sys.exit(f"no case has {only!r} in its name; there are {'; '.join(CASES)}")
    seconds = {name: whole(config, folder / f"{i}-whole") for i, (name, config) in enumerate(configs.items())}
    while done < kills:
        i, (name, config) = done % len(configs), list(configs.items())[done % len(configs)]
        out = folder / f"{i}-killed"
        shutil.rmtree(out, ignore_errors=True)
        hit = trial(config, out, seconds[name], rng)
        if hit is None or "folder" in hit:
            continue  # too late, or nothing to resume: draw again
        different = differences(folder / f"{i}-whole", out, config.stage)
        done, good = done + 1, good + (not different)
        hits[hit] += 1
        print(f"{done:4} {name:30} killed {hit:41} {'equal' if not different else 'DIFFERENT: ' + ', '.join(different[:3])}", flush=True)
    print(f"{optimizer}, seed {seed}: killed {', '.join(f'{n} {hit}' for hit, n in sorted(hits.items()))}")
    print(f"{good} of {done} resumed runs equal the undisturbed one, bit for bit")
    return good == done


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "little"))
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--only", default="", help="cases with this text in their name")
    with tempfile.TemporaryDirectory() as scratch:
        sys.exit(not report(**vars(parser.parse_args()), folder=Path(scratch)))
