"The benchmark: twins do the same work, memory is seen, every row is there. No test looks at a time."
import copy
import dataclasses
import json
from typing import get_args

import pytest
import torch
from small import SMALL, run_command

from tinydiff.benchmark import (
    COLUMNS, RUNGS, TASKS, BenchmarkConfig, Case, Task, benchmark, clip_loss, climbed, draw, flops, flow_scheduler, in_turns, ladder_cases, main, peak_flops,
    peak_memory, table, training, twins, unet_inputs, unet_loss, vae_loss, why_not,
)
from tinydiff.models.clip import CLIP
from tinydiff.models.unet import UNet
from tinydiff.models.vae import AutoencoderKL, Upsample
from tinydiff.train import ARCHITECTURES, has_bf16

CPU = torch.device("cpu")
QUICK = dict(image_size=16, batch_size=3, num_images=2, steps=2, repeats=2, device="cpu", precision="fp32")


@pytest.fixture(autouse=True)
def small_networks(monkeypatch, seed):
    monkeypatch.setitem(ARCHITECTURES, "tiny", SMALL)
    torch.manual_seed(seed)


@pytest.fixture
def config():
    return BenchmarkConfig(**QUICK)


NETWORKS = {
    "unet": (lambda c: UNet(c.networks.unet), unet_loss), "vae": (lambda c: AutoencoderKL(c.networks.vae), vae_loss),
    "clip": (lambda c: CLIP(c.networks.text, c.networks.vision), clip_loss),
}


def pair_and_loss(network, config):
    "Both twins, and the loss of one of them, in float64."
    make, loss = NETWORKS[network]
    models = [model.double() for model in twins(make(config), CPU).values()]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return models, loss(config, CPU)
    finally:
        torch.set_default_dtype(before)


def repeat_and_convolve(self, x):
    "What `Upsample` computes, word for word, as diffusers does."
    return self.conv(x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))


@pytest.mark.parametrize("network", NETWORKS)
def test_twins_are_one_network(network, config, monkeypatch):
    "The same loss, the same gradient in every weight (by its size: names differ), the same number of operations but for upsampling."
    models, loss = pair_and_loss(network, config)
    assert len(models) == 2
    values, norms = [], []
    for model in models:
        values.append(loss(model))
        values[-1].backward()
        norms.append(torch.stack([p.grad.norm() for p in model.parameters()]).sort().values)
    torch.testing.assert_close(*values, rtol=1e-6, atol=0)  # predictions go through float32
    torch.testing.assert_close(*norms, rtol=1e-4, atol=1e-9)
    assert all((norm > 0).sum() > 0.9 * len(norm) for norm in norms)
    ours, theirs = (flops(lambda: loss(model).backward()) for model in models)
    assert ours == theirs if network == "clip" else ours < theirs
    monkeypatch.setattr(Upsample, "forward", repeat_and_convolve)
    assert flops(lambda: loss(models[0]).backward()) == theirs  # the upsampling was all the difference


def test_twins_draw_the_same_pictures(config):
    nets, (latents, _, context) = config.networks, unet_inputs(config, CPU)
    context = torch.cat([torch.zeros_like(context), context])
    unets, vaes = twins(UNet(nets.unet), CPU), twins(AutoencoderKL(nets.vae), CPU)
    with torch.no_grad():
        ours, theirs = (draw(unets[name], vaes[name], flow_scheduler(name, 5), latents, context) for name in unets)
        unguided = draw(unets["tinydiff"], vaes["tinydiff"], flow_scheduler("tinydiff", 5), latents, context, guidance_scale=1.0)
    assert ours.shape == (3, 3, 16, 16)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert (ours - unguided).abs().max() > 1e-3


def test_training_step_trains(config):
    "AdamW's step, here and in a plain loop."
    (mine, _), loss = pair_and_loss("vae", config)
    plain = copy.deepcopy(mine)
    step, optimizer = training(mine, loss, config.open()), torch.optim.AdamW(plain.parameters(), lr=1e-4)
    for _ in range(2):
        before = loss(plain)
        before.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(step(), before.detach(), rtol=1e-6, atol=0)
    for one, other in zip(mine.parameters(), plain.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_rungs_train_alike(config):
    "All rungs that a device has report the same losses; each that it has not says why."
    found = ladder_cases(config, config.open())
    assert tuple(found) == RUNGS
    steps = {name: case for name, case in found.items() if isinstance(case, Case)}
    assert {"eager float32", "channels_last", "fused AdamW"} <= steps.keys()
    assert found["CUDA graphs"] == "not on this device" and found["compile"] == "not measured: add --compile"
    assert (found["bfloat16"] == "not on this device") != has_bf16(CPU) and ("SDPA" in steps) != has_bf16(CPU)
    values = {name: torch.stack([case.call() for _ in range(3)]) for name, case in steps.items()}
    for name, case in steps.items():
        torch.testing.assert_close(values[name], values["eager float32"], rtol=0.05 if case.bf16 else 1e-4, atol=0)
    for bf16 in (False, True): assert len({case.flop for case in steps.values() if case.bf16 == bf16}) <= 1


def test_rungs_are_what_they_say(config, monkeypatch):
    "Layout, attention and optimizer of a step, seen from inside."
    seen = []
    def loss(model):
        seen.append((model.conv_in.weight.is_contiguous(), torch.backends.cuda.flash_sdp_enabled(), torch.is_autocast_enabled("cpu")))
        return model.conv_in.weight.square().sum()
    made = []
    real = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, **kwargs: made.append(kwargs["fused"]) or real(*args, **kwargs))
    for rungs in (set(), {"channels_last"}, {"channels_last", "bfloat16"}, {"channels_last", "SDPA"}, {"fused AdamW"}):
        climbed(UNet(config.networks.unet), loss, config.open(), rungs)()
    assert seen == [(True, False, False), (False, False, False), (False, False, True), (False, True, False), (True, False, False)]
    assert made == [None, None, None, None, True]
    assert why_not("compile", config, CPU) and why_not("compile", dataclasses.replace(config, compile=True), CPU) == ""


def test_compiled_steps_are_steps(config, monkeypatch):
    "What is compiled starts from the same loss and counts the same operations as what is not (compiling itself is left out: it takes minutes)."
    chosen = []
    monkeypatch.setattr(torch, "compile", lambda model, mode=None: chosen.append(mode) or model)
    config = dataclasses.replace(config, compile=True)
    ours, theirs = TASKS["compiled"](config, config.open()).values()
    assert ours.flop == flops(ours.call) < theirs.flop == flops(theirs.call) and chosen == [None, None]
    assert isinstance(TASKS["ladder"](config, config.open())["compile"], Case) and chosen == 3 * [None]
    climbed(UNet(config.networks.unet), lambda model: model.conv_in.weight.sum(), config.open(), {"compile", "CUDA graphs"})()
    assert chosen[3:] == ["reduce-overhead"]


def test_known_memory_is_seen():
    once = lambda: torch.ones(16_000_000).sum()
    twice = lambda: [torch.ones(16_000_000) for _ in range(2)]
    small, large = (peak_memory(call, CPU) for call in (once, twice))
    if small is None:
        pytest.skip("this system does not say")
    assert 60e6 < small < 80e6 and 124e6 < large < 144e6
    peak_memory(twice, CPU)
    assert 60e6 < peak_memory(once, CPU) < 80e6  # what was freed is not there for the next one


def test_in_turns_drops_the_warm_up():
    order = []
    quartiles = in_turns({name: lambda name=name: order.append(name) for name in "abc"}, 4, CPU, warmup=2)
    assert "".join(order) == 6 * "abc" and all(low <= middle <= high for low, middle, high in quartiles.values())


@pytest.mark.parametrize("name,bf16,tera", [
    ("NVIDIA H100 80GB HBM3", True, 989), ("NVIDIA H100 PCIe", True, 756), ("NVIDIA H200", False, 67), ("NVIDIA A100-SXM4-40GB", True, 312), ("NVIDIA L40S", True, 362),
    ("NVIDIA L4", True, 121), ("Tesla T4", False, 8.1), ("Tesla T4", True, None), ("NVIDIA A10", True, None), ("NVIDIA GeForce RTX 4090 Laptop GPU", True, None), ("NVIDIA GeForce RTX 4090 D", True, None),
    ("NVIDIA GeForce RTX 3090 Ti", True, None), ("NVIDIA GeForce RTX 3090", True, 71), ("NVIDIA H200 NVL", True, None), ("NVIDIA H100 NVL", True, 835), ("AMD EPYC", False, None),
])
def test_peaks(name, bf16, tera):
    assert peak_flops(name, bf16) == (tera and tera * 1e12)


def test_every_row_is_there(config):
    rows = [row for part in benchmark(config, config.open()) for row in part]
    pairs = [(task, name) for task in ("unet", "compiled", "prediction", "vae") for name in ("tinydiff", "diffusers")]
    pairs += [("clip", "tinydiff"), ("clip", "transformers"), ("sampling", "tinydiff"), ("sampling", "diffusers")]
    pairs += [("loading", name) for name in ("scenes", "photos", "vae step", "clip step")]
    pairs += [("caching", "tinydiff"), ("caching", "diffusers")] + [("ladder", rung) for rung in RUNGS]
    assert [(row["task"], row["name"]) for row in rows] == pairs
    assert tuple(TASKS) == get_args(Task) == tuple(dict.fromkeys(task for task, _ in pairs))
    for row in rows:
        assert "note" in row or 0 < row["low"] <= row["seconds"] <= row["high"]
        assert "note" in row or row["images_per_s"] == row["images"] / row["seconds"] and row["mfu"] is None
    by_name = {(row["task"], row["name"]): row for row in rows}
    for task, other in (("unet", "diffusers"), ("prediction", "diffusers"), ("vae", "diffusers"), ("clip", "transformers"), ("sampling", "diffusers"), ("caching", "diffusers")):
        ours, theirs = by_name[task, "tinydiff"], by_name[task, other]
        upsampling = task not in ("clip", "caching")
        assert 0 < ours["gflop"] < theirs["gflop"] if upsampling else 0 < ours["gflop"] == theirs["gflop"]
        assert ours["gain"] == ours["images_per_s"] / theirs["images_per_s"] and "gain" not in theirs
    *loaders, vae, clip = (by_name["loading", name] for name in ("scenes", "photos", "vae step", "clip step"))
    assert all(row["gain"] == row["images_per_s"] / max(vae["images_per_s"], clip["images_per_s"]) for row in loaders) and "gain" not in vae
    assert by_name["ladder", "channels_last"]["gain"] == by_name["ladder", "channels_last"]["images_per_s"] / by_name["ladder", "eager float32"]["images_per_s"]
    lines = table(rows).splitlines()
    assert len(lines) == len(rows) + 1 and all(head in lines[0] for head, _ in COLUMNS.values())
    assert any("CUDA graphs" in line and "not on this device" in line for line in lines)


def test_mfu_is_of_the_data_sheet(config, monkeypatch):
    import tinydiff.benchmark as module
    monkeypatch.setattr(module, "card", lambda device: "NVIDIA A100-SXM4-80GB")
    row = next(benchmark(dataclasses.replace(config, tasks=("prediction",)), config.open()))[0]
    assert row["mfu"] == pytest.approx(row["gflop"] * 1e9 / row["seconds"] / 19.5e12)


def test_command(monkeypatch, capsys, tmp_path):
    code, out, _ = run_command(monkeypatch, capsys, main, "--tasks", "caching", "ladder", "--image_size", 16, "--batch_size", 2, "--repeats", 2, "--device", "cpu",
                               "--json", tmp_path / "a.json")
    stored = json.loads((tmp_path / "a.json").read_text())
    assert code == 0 and [row["task"] for row in stored["rows"]] == 2 * ["caching"] + len(RUNGS) * ["ladder"]
    assert stored["config"]["batch_size"] == 2 and stored["torch"] == torch.__version__ and stored["device"] in out
    assert all(rung in out for rung in RUNGS)


def test_command_without_the_others(monkeypatch, capsys):
    import tinydiff.benchmark as module
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    code, out, _ = run_command(monkeypatch, capsys, main, "--tasks", "caching", "--image_size", 16, "--batch_size", 2, "--repeats", 2, "--device", "cpu")
    assert code == 0 and "diffusers is not installed: no twin" in out and out.count("\n") == 3


BAD_FLAGS = {
    "task": (["--tasks", "unets"], "tasks"), "no tasks": (["--tasks"], "tasks"), "batch": (["--batch_size", "0"], "batch_size"), "word": (["--batch_size", "many"], "batch_size"),
    "one repeat": (["--repeats", "1"], "at least 2"), "size": (["--image_size", "50"], "multiple of 8"), "device": (["--device", "abacus"], "abacus"),
    "folder": (["--json", "no/such/a.json"], "no folder"), "arch": (["--arch", "huge"], "arch"), "flag": (["--color", "red"], "--color"),
}


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_bad_flags(name, monkeypatch, capsys):
    "One clear line, exit status 2, nothing measured."
    flags, words = BAD_FLAGS[name]
    code, out, err = run_command(monkeypatch, capsys, main, *flags)
    assert code == 2 and not out
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err and len(err) < 400, err


def test_help(monkeypatch, capsys):
    code, out, _ = run_command(monkeypatch, capsys, main, "--help")
    assert code == 0 and all(f"--{field.name}" in out for field in dataclasses.fields(BenchmarkConfig)) and "rounds that count" in out
