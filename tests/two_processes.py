"""Two processes against one: `python tests/two_processes.py`.

The same small run by one process, and by two that `torchrun` starts and that share its batches: with AdamW the losses of 100 steps must agree
to 1e-6, or to a millionth of the loss where that is above 1. (`--optimizer muon` is reported, but not judged: it lifts directions in which there is nothing but rounding. The VAE learns with 5e-4: with the preset's 2e-3 rounding grows to 1e-5 and more. How much it grows where one process adds with two threads
instead of one is measured beside it.) Then one of two processes is killed in the middle: the other must say so in one line; and one
process must be able to go on where the two stopped, with the same losses. With `--device cuda` they talk through NCCL, which wants a GPU for each
process of a host: where there is but one GPU, each process says that it is on another host.
"""
import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

for library in ("GLOO", "NCCL"):
    os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import torch

import tinydiff.train
from small import QUICK, SMALL
from tinydiff.sample import one_line_errors
from tinydiff.train import Guard, TrainConfig, read_config, read_metrics, train


def configuration(folder: Path, stage: str, name: str, steps: int) -> TrainConfig:
    parts = dict(vae=str(folder / "parts"), text_encoder=str(folder / "parts")) if stage == "diffusion" else {}
    return TrainConfig(**QUICK | dict(stage=stage, optimizer=os.environ["OPTIMIZER"], vae_lr=5e-4, out=str(folder / f"{stage}-{name}"), steps=steps, vae_steps=steps, clip_steps=steps, batch_size=6,
                                      vae_batch_size=6, clip_batch_size=6, flip=True, checkpoint_every=10, sample_every=1000) | parts)


@one_line_errors
def child():
    "One process of a run: stages, folder, name and steps; `die` kills rank 1 in step 15."
    _, _, stages, folder, name, steps, die, device = sys.argv
    tinydiff.train.ARCHITECTURES["tiny"] = SMALL
    QUICK.update(device=device, tf32=False)
    see = Guard.see

    def see_and_die(guard, step, *numbers):
        if die == "die" and step == 14 and guard.run.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        see(guard, step, *numbers)

    Guard.see = see_and_die
    for stage in stages.split(","):
        if stage == "resume":
            train(read_config(["--resume", "--out", str(Path(folder) / name)]))
        elif stage == "all":
            train(TrainConfig(stage="all", out=str(Path(folder) / "parts"), **QUICK))
        else:
            train(configuration(Path(folder), stage, name, int(steps)))


def launch(processes: int, *args, threads: int = 1) -> subprocess.CompletedProcess:
    "As a user would, by `torchrun`, or alone; or as hosts of one process each."
    command, environment = [__file__, "--child", *map(str, args)], os.environ | {"OMP_NUM_THREADS": str(threads)}
    if processes > 1 and args[-1] == "cuda" and torch.cuda.device_count() < processes:
        return as_hosts(processes, [sys.executable, *command], environment)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return subprocess.run([sys.executable, *torchrun, *command], capture_output=True, text=True, env=environment)


def as_hosts(processes: int, command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess:
    "What `torchrun` tells the processes of several hosts, said to processes of this one; they share its GPU."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(processes), "LOCAL_RANK": "0"}
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment | meeting | {"RANK": str(rank), "NCCL_HOSTID": f"host{rank}"})
               for rank in range(processes)]
    said = [process.communicate(timeout=600) for process in started]
    return subprocess.CompletedProcess(command, max(abs(process.returncode) for process in started), *map("".join, zip(*said)))


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run)]


def largest(one: list[float], other: list[float]) -> float:
    "The largest difference; of losses above 1 as a share, since float32 knows one of 3 to no more than 2.4e-7."
    return max(abs(a - b) / max(1, abs(a)) for a, b in zip(one, other)) if len(one) == len(other) else float("inf")


def report(folder: Path, steps: int, device: str, optimizer: str) -> bool:
    "Print what came out; was all as it should be?"
    os.environ["OPTIMIZER"] = optimizer  # its processes hear it
    allowed = 1e-6 if optimizer == "adamw" else float("inf")
    def must(done):
        return done if done.returncode == 0 else sys.exit(done.stderr[-3000:])

    must(launch(1, "all,vae,clip,diffusion", folder, "one", steps, "live", device))
    for stage in ("vae", "clip", "diffusion"):
        must(launch(2, stage, folder, "two", steps, "live", device))
    must(launch(1, "vae", folder, "threads", steps, "live", device, threads=2))
    good = True
    for stage in ("vae", "clip", "diffusion"):
        one, two = (losses(folder / f"{stage}-{name}") for name in ("one", "two"))
        difference, moved = largest(one, two), one[0] - one[-1]
        good &= difference <= allowed and len(two) == steps
        print(f"{stage:9}: {steps} steps with {optimizer} by one process and by two, losses from {one[0]:.4f} to {one[-1]:.4f}; largest difference {difference:.1e}; "
              f"{len(two)} records, one process wrote", flush=True)
    difference = largest(losses(folder / "vae-one"), losses(folder / "vae-threads"))
    print(f"vae      : {steps} steps by one process with one thread and with two; largest difference {difference:.1e}", flush=True)
    killed = launch(2, "diffusion", folder, "killed", steps, "die", device)
    said = [line for line in killed.stderr.splitlines() if line.startswith("error: ")]
    good &= killed.returncode != 0 and len(said) == 1 and "has lost another one" in said[0] and losses(folder / "diffusion-killed")[9:] != []
    print(f"rank 1 killed in step 15: exit status {killed.returncode}; rank 0 says\n    {said[0] if said else killed.stderr[-1500:]}")
    must(launch(1, "resume", folder, "diffusion-killed", steps, "live", device))
    difference = largest(losses(folder / "diffusion-one"), losses(folder / "diffusion-killed"))
    good &= difference <= allowed
    print(f"resumed by one process: largest difference {difference:.1e}")
    return good


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child()
        sys.exit()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    with tempfile.TemporaryDirectory() as scratch:
        sys.exit(not report(Path(scratch), **vars(parser.parse_args())))
