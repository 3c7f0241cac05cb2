"What several tests share: networks so small that a run takes a second or two, equal runs, a command called in this process."
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from tinydiff.models.clip import CLIPTextConfig, CLIPVisionConfig
from tinydiff.models.unet import UNetConfig
from tinydiff.models.vae import VAEConfig
from tinydiff.train import CHECKPOINT, Architecture, read_metrics

SMALL = Architecture(
    VAEConfig(block_out_channels=(8, 16), norm_num_groups=4),
    CLIPTextConfig(vocab_size=560, hidden_size=16, num_hidden_layers=1, intermediate_size=32, projection_dim=16),
    CLIPVisionConfig(patch_size=8, hidden_size=16, num_hidden_layers=1, intermediate_size=32),
    UNetConfig(block_out_channels=(8, 16), cross_attention=(False, True), num_heads=2, cross_attention_dim=16, norm_num_groups=4),
)
QUICK = dict(image_size=16, subset_size=24, num_workers=0, steps=2, vae_steps=2, clip_steps=2, batch_size=5, vae_batch_size=5, clip_batch_size=5,
             warmup=3, log_every=1, precision="fp32", device="cpu")


def differences(left: Path, right: Path, stage: str) -> list[str]:
    "What is not equal, bit for bit, in two runs' last checkpoints, in what their stages made, in pictures and metrics; neither the pace nor the figure of the steps since a resumption counts."
    found = []
    for each in ("vae", "clip", "diffusion") if stage == "all" else (stage,):
        a, b = (max((run / "checkpoints" / each).glob("[0-9]*")) for run in (left, right))
        for name in CHECKPOINT:
            one, two = (load_file(path / f"{name}.safetensors") for path in (a, b))
            found += [f"{name}: {key}" for key in one.keys() | two.keys() if key not in one or key not in two or not torch.equal(one[key], two[key])]
        found += ["step"] * (a.name != b.name)
    made = [{path.relative_to(run): path.read_bytes() for path in (*run.glob("*/*.safetensors"), *run.glob("samples/[!t]*"))} for run in (left, right)]
    found += [str(path) for path in made[0].keys() | made[1].keys() if made[0].get(path) != made[1].get(path)]
    timeless = [[{k: v for k, v in record.items() if k != "images_per_s"} for record in read_metrics(run)] for run in (left, right)]
    return found + ["metrics"] * (timeless[0] != timeless[1])


def run_command(monkeypatch, capsys, main: Callable, *args) -> tuple[int, str, str]:
    "Exit status, standard output and standard error of a command that is called in this process."
    monkeypatch.setattr(sys, "argv", ["command", *map(str, args)])
    capsys.readouterr()
    try:
        status = main() or 0
    except SystemExit as stop:
        status = stop.code or 0
    return status, *capsys.readouterr()
