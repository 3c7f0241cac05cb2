"""kill -9 at random moments, resume, compare: `python tests/kill_report.py --kills 100`.

Every trial trains a small network, is killed once, at a moment drawn evenly from the time that the whole run takes, goes on with
--resume, and must end with weights, average, optimizer, metrics and finished networks equal, bit for bit, to those of a run that nobody
touched: three stages, alone and in a row, both schedulers, with 0 and 2 loader workers, in the middle of epochs, also while a checkpoint
is being written.
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
CASES = {f"{stage}{'-' + scheduler if scheduler else ''}, {workers} workers": (stage, scheduler, workers)
         for stage, schedulers in (("vae", [None]), ("clip", [None]), ("diffusion", ["flow", "ddpm"]), ("all", ["flow"])) for scheduler in schedulers for workers in (0, 2)}


def configuration(stage: str, scheduler: str | None, workers: int, parts: Path) -> TrainConfig:
    more = dict(scheduler=scheduler) if scheduler else {}
    more |= dict(vae=str(parts), text_encoder=str(parts)) if stage == "diffusion" else {}
    settings = QUICK | dict(steps=STEPS, vae_steps=STEPS, clip_steps=STEPS, checkpoint_every=EVERY, num_workers=workers, sample_every=1000)
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


def trial(config: TrainConfig, out: Path, seconds: float, rng: random.Random) -> str | None:
    "Kill one run and finish it; returns where it was hit, None where it was over before."
    child = start(tinydiff.train.dataclasses.replace(config, out=str(out)))
    time.sleep(rng.uniform(0, seconds))
    os.kill(child, signal.SIGKILL)  # its loader's workers notice by themselves
    if end_of(child) == 0:
        return None
    if not (out / "run.json").exists():
        return "before its folder was there"
    half = list(out.glob("checkpoints/*/.*.tmp")) or list(out.glob(".*.tmp"))
    hit = "while writing a checkpoint" if half else f"{'after a checkpoint' if list(out.glob('checkpoints/*/0*')) else 'before the first checkpoint'}"
    if end_of(start(read_config(["--resume", "--out", str(out)]))):
        sys.exit(f"{out}: the resumed run failed")
    return hit


def report(kills: int, seed: int, folder: Path) -> bool:
    "Print a line for each case, and N of N."
    tinydiff.train.ARCHITECTURES["tiny"] = SMALL
    torch.set_num_threads(1)
    parts, rng, hits, good, done = folder / "parts", random.Random(seed), Counter(), 0, 0
    whole(TrainConfig(stage="all", **QUICK), parts)
    configs = {name: configuration(*case, parts) for name, case in CASES.items()}
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
        print(f"{done:4} {name:30} killed {hit:30} {'equal' if not different else 'DIFFERENT: ' + ', '.join(different[:3])}", flush=True)
    print(f"seed {seed}: killed {', '.join(f'{n} {hit}' for hit, n in sorted(hits.items()))}")
    print(f"{good} of {done} resumed runs equal the undisturbed one, bit for bit")
    return good == done


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "little"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(not report(args.kills, args.seed, Path(folder)))
