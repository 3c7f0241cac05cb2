"""The training loop on a GPU, beside the CPU: `python tests/gpu_report.py`.

With the tiny networks: the same losses as on the CPU in every stage; no step that waits for the GPU; a resumed run beside an uninterrupted one;
what bfloat16, compilation, parts and recomputation change in the loss, in memory and in pace; the lines that a full GPU and a broken loss
end with; and the same picture from the same seed.
"""
import dataclasses
import io
import shutil
import sys
import tempfile
import time
import warnings
from contextlib import redirect_stderr
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]

import numpy as np
import torch

import tinydiff.train
from tinydiff.sample import TextToImage, one_line_errors
from tinydiff.train import TrainConfig, read_metrics

STAGES = ("vae", "clip", "diffusion")


def configuration(folder: Path, name: str, steps: int = 20, **others) -> TrainConfig:
    "A short run on the GPU, in float32 throughout."
    default = dict(precision="fp32", tf32=False, batch_size=8, vae_batch_size=8, clip_batch_size=16, subset_size=256, num_workers=0, warmup=5, log_every=1, sample_every=1000,
                   checkpoint_every=1000, device="cuda")
    return TrainConfig(**default | dict(out=str(folder / name), steps=steps, vae_steps=steps, clip_steps=steps) | others)


def train(config: TrainConfig) -> Path:
    "Without its bars."
    with redirect_stderr(io.StringIO()):
        return tinydiff.train.train(config)


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run)]


def apart(one: list[float], other: list[float]) -> float:
    "The largest relative difference."
    return max(abs(a / b - 1) for a, b in zip(one, other, strict=True))


def same_losses(folder: Path) -> bool:
    "Every stage and both optimizers, on both devices."
    good = True
    for stage in STAGES:
        for optimizer in ("adamw", "muon"):
            cpu, gpu = (losses(train(configuration(folder, f"{stage}-{optimizer}-{device}", 5, stage=stage, optimizer=optimizer, device=device))) for device in ("cpu", "cuda"))
            good &= apart(cpu, gpu) < 1e-3
            print(f"{stage:9} {optimizer:5}: losses on CPU and GPU differ by {apart(cpu, gpu):.0e} in 5 steps (from {cpu[0]:.4f} to {cpu[-1]:.4f})", flush=True)
    return good


def waits(config: TrainConfig) -> int:
    "How often a run waits for the GPU."
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        train(config)
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in said)


def never_waits(folder: Path) -> bool:
    "Ten more steps, with as many reports, do not wait ten times more: it is the report, the pictures and the checkpoint that wait."
    good = True
    for stage in STAGES:
        for optimizer in ("adamw", "muon"):
            few, many = (waits(configuration(folder, f"waits-{stage}-{optimizer}-{steps}", steps, stage=stage, optimizer=optimizer, precision="auto", log_every=1000)) for steps in (10, 20))
            good &= many - few < 10
            print(f"{stage:9} {optimizer:5}: waits for the GPU in 10 steps and one report {few} times, in 20 steps and one report {many}", flush=True)
    return good


def resumes(folder: Path) -> bool:
    "The second half again, from the checkpoint in the middle."
    run = train(configuration(folder, "whole", checkpoint_every=10, keep=9))
    whole = losses(run)
    shutil.rmtree(run / "checkpoints/diffusion/0000020")
    train(dataclasses.replace(configuration(folder, "whole", checkpoint_every=10, keep=9), resume=True))
    print(f"resumed after step 10 of 20: losses differ by {apart(whole, losses(run)):.0e}", flush=True)
    return apart(whole, losses(run)) < 1e-3


def choices(folder: Path) -> bool:
    "Each way to compute the same step."
    good, first = True, None
    for name, others in {"float32": {}, "TF32": {"tf32": True}, "in 4 parts": {"grad_accum": 4}, "recomputing": {"grad_checkpoint": True}, "bfloat16": {"precision": "bf16"},
                         "bfloat16, CUDA graphs": {"precision": "bf16", "cuda_graphs": True}, "bfloat16, compiled": {"precision": "bf16", "compile": True}}.items():
        torch.cuda.reset_peak_memory_stats()
        config = configuration(folder, name.replace(" ", "-"), 60, batch_size=256, log_every=10, **others)
        run = train(config)
        found, pace = losses(run), [record["images_per_s"] for record in read_metrics(run)][-1]
        first = first or found
        good &= abs(found[-1] / first[-1] - 1) < 0.05
        print(f"{name:21}: loss {found[0]:.4f}, then {found[-1]:.4f}; {torch.cuda.max_memory_allocated() / 1e6:5.0f} MB at the peak; {pace:6.0f} pictures/s in the last 10 steps", flush=True)
    return good


def says(config: TrainConfig, words: str) -> bool:
    "Does the run end with a line that holds these words?"
    try:
        train(config)
    except ValueError as error:
        print(f"    {error}", flush=True)
        return words in str(error)
    print(f"    nothing, where it should say {words!r}")
    return False


def last_lines(folder: Path) -> bool:
    "A GPU that is too small, and learning rates that are too large."
    print("what it says where a batch is too large, and where the loss breaks:")
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.5e9 / torch.cuda.get_device_properties(0).total_memory)
    good = says(configuration(folder, "full", batch_size=1024, subset_size=1024), "needs more memory")
    torch.cuda.set_per_process_memory_fraction(1.0)
    for optimizer in ("adamw", "muon"):
        good &= says(configuration(folder, f"broken-{optimizer}", 60, optimizer=optimizer, lr=1e9, warmup=1, log_every=60), "is not finite")
    return good


def pictures() -> bool:
    "One seed, both devices."
    prompts = ["a red boat at night", "two yellow stars", "a watercolor landscape", "a blue fish under the sea"]
    cpu, gpu = (np.stack([np.asarray(image, dtype=np.float32) for image in TextToImage.from_pretrained("tiny", device)(prompts, seed=0)]) for device in ("cpu", "cuda"))
    print(f"the same four pictures on CPU and GPU: {np.abs(cpu - gpu).mean():.2f} of 255 apart on average, {np.abs(cpu - gpu).max():.0f} at most", flush=True)
    return np.abs(cpu - gpu).mean() < 1


@one_line_errors
def main():
    if not torch.cuda.is_available():
        raise ValueError("gpu_report needs an NVIDIA or AMD GPU that torch can use; there is none")
    print(f"{torch.cuda.get_device_name(0)}, PyTorch {torch.__version__}")
    good = pictures()
    with tempfile.TemporaryDirectory() as scratch:
        for check in (globals()[name] for name in sys.argv[1:]) if sys.argv[1:] else (same_losses, never_waits, resumes, choices, last_lines):
            began, done = time.perf_counter(), False
            try:
                done = check(Path(scratch))
            finally:
                print(f"-> {check.__name__}: {'good' if done else 'NOT GOOD'}, {time.perf_counter() - began:.0f} s", flush=True)
            good &= done
    sys.exit(not good)


if __name__ == "__main__":
    main()
