"Training: every stage learns, stops and goes on as if it had never stopped; mistakes cost one line; what it writes can be sampled from."
import copy
import dataclasses
import errno
import json
import math
import multiprocessing
import os
import pathlib
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import tinydiff.evaluate
import tinydiff.sample
import tinydiff.train
from small import QUICK, SMALL, differences, run_command
from tinydiff.data import image_to_tensor
from tinydiff.models.clip import CLIP, CLIPTextEncoder
from tinydiff.models.unet import UNet
from tinydiff.sample import TextToImage
from tinydiff.stable_diffusion import load_text_encoder, load_vae
from tinydiff.train import (
    EMA, PRESETS, Denoiser, EncodedData, Guard, InBFloat16, Run, Sketch, StepSampler, TrainConfig, batch_indices, checkpoints_in, config_from_dict, explained,
    learning_rate, load_optimizer_tensors, load_parts, open_dataset, optimizer_tensors, plot_metrics, read_config, read_metrics, save_checkpoint, stored_config, train,
)

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(tinydiff.train.ARCHITECTURES, "tiny", SMALL)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "A folder with a VAE, a text encoder and a UNet that have seen two steps."
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tinydiff.train.ARCHITECTURES, "tiny", SMALL)
        return train(TrainConfig(stage="all", out=str(tmp_path_factory.mktemp("base") / "run"), **QUICK))


def on(base, **more):
    "A configuration of the diffusion stage on trained parts."
    return TrainConfig(**QUICK | dict(vae=str(base), text_encoder=str(base)) | more)


def interrupt(monkeypatch, after_step, number=signal.SIGTERM):
    "Let this process get a signal in the middle of a step."
    see = Guard.see

    def see_and_kill(guard, step, loss, norm):
        see(guard, step, loss, norm)
        if step + 1 == after_step:  # as a cluster or a terminal does: the loader's workers hear it, too
            for process in (*multiprocessing.active_children(), multiprocessing.current_process()):
                os.kill(process.pid, number)

    monkeypatch.setattr(Guard, "see", see_and_kill)


# --- resume

def assert_same_run(left, right, stage, step):
    "All weights, averages, optimizer states and log lines are equal, to the last bit."
    assert not differences(left, right, stage)
    assert len(read_metrics(left)) == step and (left / "checkpoints" / stage / f"{step:07}").is_dir()


@pytest.mark.parametrize("stage, options", [
    ("vae", dict(num_workers=2)),
    ("vae", dict(flip=True, grad_accum=2, vae_batch_size=6, batch_size=6)),
    ("clip", dict()),
    ("clip", dict(num_workers=2)),
    ("diffusion", dict(num_workers=2, flip=True)),
    ("diffusion", dict(scheduler="ddpm", prediction_type="v_prediction", snr_gamma=5.0)),
    *((stage, dict(precision="bf16")) for stage in ("vae", "clip", "diffusion")),
], ids=lambda value: value if isinstance(value, str) else "-".join(value))
def test_resumed_equals_uninterrupted(base, tmp_path, monkeypatch, stage, options):
    "20 steps, and 10 steps, SIGTERM, 10 steps: mid-epoch, for every stage and both schedulers, with and without workers."
    parts = dict(vae=str(base), text_encoder=str(base)) if stage == "diffusion" else {}
    config = TrainConfig(**QUICK | dict(stage=stage, steps=20, vae_steps=20, clip_steps=20) | parts | options)
    whole = train(dataclasses.replace(config, out=str(tmp_path / "whole")))
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        interrupt(patch, 10)
        train(dataclasses.replace(config, out=str(tmp_path / "parts")))
    assert stop.value.code == 0 and [p.name for p in (tmp_path / "parts/checkpoints" / stage).iterdir()] == ["0000010"]
    assert not multiprocessing.active_children(), "the loader's workers, who do not listen to signals, have ended"
    resumed = train(read_config(["--resume", "--out", str(tmp_path / "parts")]))
    assert_same_run(whole, resumed, stage, 20)


@pytest.mark.parametrize("stage, what", [("vae", "error"), ("diffusion", "error"), ("diffusion", "signal")])
def test_no_process_is_left_waiting_for_its_workers(base, tmp_path, stage, what):
    "A program ends although its workers do not hear signals: while it encodes, a signal ends it with a line, and an error in a worker with its message."
    parts = dict(vae=str(base), text_encoder=str(base)) if stage == "diffusion" else {}
    code = f"""if True:
        import contextlib, os, signal, sys, time, tinydiff.train as train
        from small import QUICK, SMALL
        from tinydiff.data import CaptionedImages
        from torch.utils.data import get_worker_info
        def read(data, index):
            if not get_worker_info(): return whole(data, index)
            if {what!r} == 'error': raise KeyError("odd")
            with contextlib.suppress(FileExistsError):
                os.mkdir({str(tmp_path / "sent")!r})
                os.kill(os.getppid(), signal.SIGTERM)
            time.sleep(0.2)
            return whole(data, index)
        whole, CaptionedImages.read, train.ARCHITECTURES["tiny"] = CaptionedImages.read, read, SMALL
        train.read_config = lambda args: train.TrainConfig(**QUICK | {dict(stage=stage, num_workers=2, out=str(tmp_path / "run")) | parts!r})
        train.main()"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHONPATH": "tests"})
    assert done.returncode == (1 if what == "error" else 0) and ("odd" if what == "error" else "stopped while encoding, which begins anew; go on with: tinydiff-train --resume") in done.stderr


def test_all_stages_resume(base, tmp_path, monkeypatch):
    "Stopped in the second of three stages, before its first checkpoint: the first stays, the others are as if nothing had been."
    config = TrainConfig(stage="all", out=str(tmp_path / "run"), **QUICK)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(tinydiff.train.CLIPStage, "loss", lambda *args: 1 / 0)
        train(config)
    assert not (tmp_path / "run/clip").exists() and not (tmp_path / "run/model_index.json").exists()
    train(read_config(["--resume", "--out", config.out]))
    for part in ("vae", "unet"):
        a, b = (load_file(folder / part / "diffusion_pytorch_model.safetensors") for folder in (base, tmp_path / "run"))
        assert all(torch.equal(a[key], b[key]) for key in a)


def same_parts(left, right, parts=("vae", "unet", "text_encoder")):
    "Whether the weights in two runs' folders are equal, bit for bit."
    pairs = [[load_file(next((folder / part).glob("*.safetensors"))) for folder in (left, right)] for part in parts]
    return all(a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in pairs)


def test_signal_in_the_last_step_of_a_stage(base, tmp_path, monkeypatch, capsys):
    "It ends the run between two stages, not after all of them."
    config = TrainConfig(stage="all", out=str(tmp_path / "run"), **QUICK)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        interrupt(patch, QUICK["vae_steps"])
        train(config)
    assert stop.value.code == 0 and "after step 2 of 2, stage vae" in capsys.readouterr().err
    assert (tmp_path / "run/vae").is_dir() and not (tmp_path / "run/checkpoints/clip").exists()
    assert same_parts(base, train(read_config(["--resume", "--out", config.out])))


def test_stages_one_by_one(base, tmp_path):
    "Each by a command of its own, in one folder, is `--stage all`: the last one builds on what the first two made there."
    run = train(TrainConfig(stage="vae", out=str(tmp_path / "run"), **QUICK))
    for stage in ("clip", "diffusion"):
        train(read_config(["--resume", "--stage", stage, "--out", str(run)]))
    assert same_parts(base, run)
    moved = run.rename(tmp_path / "moved")
    assert same_parts(base, train(read_config(["--resume", "--steps", "3", "--out", str(moved)])), ("vae",))


def test_a_run_keeps_its_vae_and_tokenizer(base, tmp_path, monkeypatch, capsys):
    "Resumed on others, it is refused; the folder stays as it was."
    other = train(TrainConfig(**QUICK | dict(stage="all", seed=5, out=str(tmp_path / "other"))))
    run = train(on(base, out=str(tmp_path / "run")))
    before = (run / "run.json").read_bytes()
    for flag in ("--vae", "--text_encoder"):
        status, _, said = run_command(monkeypatch, capsys, tinydiff.train.main, "--resume", "--steps", "3", "--out", run, flag, other)
        assert status == 2 and len(said.strip().splitlines()) == 1 and "began with another VAE or tokenizer" in said
    assert same_parts(run, base, ("vae",)) and not same_parts(run, other, ("vae",)) and (run / "run.json").read_bytes() == before


def test_stage_diffusion_begun_anew(base, tmp_path):
    "By itself, in its own folder, with the text encoder as stage clip left it, not as the first UNet did."
    run = tmp_path / "run"
    shutil.copytree(base, run)
    shutil.rmtree(run / "checkpoints/diffusion")
    assert same_parts(base, train(read_config(["--resume", "--stage", "diffusion", "--out", str(run)])))


def test_a_run_at_home(base, tmp_path, monkeypatch, capsys):
    "As it is written, and as it is resumed, where the shell leaves the ~ as it is."
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    train(on(base, out="~/run"))
    status, _, said = run_command(monkeypatch, capsys, tinydiff.train.main, "--resume", "--steps", "3", "--out=~/run")
    assert status == 0, said
    assert (tmp_path / "run/checkpoints/diffusion/0000003").is_dir() and not (tmp_path / "~").exists()


def test_parts_that_count_at_the_start_alone(base, tmp_path, monkeypatch, capsys):
    "A resumed run that is given another UNet says that it goes on with its own."
    run, twin = (train(on(base, out=str(tmp_path / name))) for name in ("run", "twin"))
    args = ("--resume", "--steps", "3", "--out")
    status, _, said = run_command(monkeypatch, capsys, tinydiff.train.main, *args, run, "--unet", base)
    assert status == 0 and "note: stage diffusion goes on with the weights of its checkpoint" in said
    status, _, said = run_command(monkeypatch, capsys, tinydiff.train.main, *args, twin)
    assert status == 0 and "note: stage diffusion" not in said and same_parts(run, twin)


def test_a_preset_mirrors_no_scenes():
    "Whose captions say left of; who asks for it gets it."
    assert read_config(["--preset", "gpu"]).flip and not any(read_config(["--preset", "gpu", "--dataset", name]).flip for name in ("scenes", "emoji"))
    assert read_config(["--preset", "gpu", "--dataset", "scenes", "--flip"]).flip


def test_a_folder_is_replaced_whole(tmp_path, monkeypatch):
    "Wherever the deleting of the old one is cut short, the new one or the old one is there with all its files."
    def write(text): return lambda folder: [(folder / name).write_text(text) for name in ("config", "weights")]
    def cut_short(folder, ignore_errors=False):
        if folder.exists():
            next(folder.iterdir()).unlink()
            raise KeyboardInterrupt
    tinydiff.train.write_atomically(tmp_path / "vae", write("old"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", cut_short)
        tinydiff.train.write_atomically(tmp_path / "vae", write("new"))
    assert [path.read_text() for path in (tmp_path / "vae").iterdir()] == ["new", "new"]
    tinydiff.train.write_atomically(tmp_path / "vae", write("newer"))
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]
    (tmp_path / "vae").rename(elsewhere := tmp_path.with_name(f"{tmp_path.name}-elsewhere"))
    for make in (lambda path: path.symlink_to(elsewhere), lambda path: path.write_text("a file")):
        tinydiff.train.remove(tmp_path / "vae")
        make(tmp_path / "vae")
        for text in ("once", "twice"): tinydiff.train.write_atomically(tmp_path / "vae", write(text))
        assert [path.name for path in tmp_path.iterdir()] == ["vae"] and (tmp_path / "vae/config").read_text() == "twice"
    assert (elsewhere / "config").read_text() == "newer"


@pytest.mark.parametrize("other, agree", [(7, True), (5, False), (9, False)])
def test_processes_go_on_from_the_same_step(other, agree, tmp_path, monkeypatch):
    def with_another(ends, op): ends.copy_(torch.maximum(ends, torch.tensor([other, -other])))
    monkeypatch.setattr(torch.distributed, "all_reduce", with_another)
    run = Run(TrainConfig(), tmp_path, torch.device("cpu"), False, rank=1, world=2)
    if agree: assert run.same_step(7) == 7
    else:
        with pytest.raises(ValueError, match="process 1 would go on from step 7 and another one not"): run.same_step(7)


@pytest.mark.parametrize("subset_size, note", [(2, "the first 2 of 4 pictures are used"), (0, ""), (4, "")])
def test_pictures_that_are_left_out_are_mentioned(subset_size, note, tmp_path, capsys):
    for i in range(4):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("a red boat")
    open_dataset(TrainConfig(dataset=str(tmp_path), image_size=16, subset_size=subset_size))
    said = capsys.readouterr().err
    assert note in said and bool(said) == bool(note)


def test_out_of_memory_while_a_checkpoint_is_loaded(base, tmp_path, monkeypatch):
    "The optimizer's moments come last: too little memory is no wrong checkpoint."
    run = train(on(base, out=str(tmp_path / "run")))
    def full(*args): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    monkeypatch.setattr(tinydiff.train, "load_optimizer_tensors", full)
    with pytest.raises(ValueError, match="needs more memory"): train(read_config(["--resume", "--steps", "3", "--out", str(run)]))


def test_the_tokenizer_stays(base, tmp_path):
    "Whatever pictures a run goes on with: the text encoder's weights belong to the merges that they began with."
    run = tmp_path / "run"
    shutil.copytree(base, run)
    shutil.rmtree(run / "checkpoints/diffusion")
    merges = (run / "tokenizer/merges.txt").read_bytes()
    train(read_config(["--resume", "--subset_size", "40", "--clip_steps", "3", "--out", str(run)]))
    assert (run / "tokenizer/merges.txt").read_bytes() == merges
    assert (train(TrainConfig(**QUICK | dict(stage="clip", subset_size=40, out=str(tmp_path / "anew")))) / "tokenizer/merges.txt").read_bytes() != merges


def test_changed_captions_are_encoded_anew(base, tmp_path, capsys):
    "The latents of a folder belong to its pictures and captions, not to its name."
    folder, settings = tmp_path / "mine", QUICK | dict(subset_size=0, batch_size=2, image_size=16, num_workers=0)
    folder.mkdir()
    for i in range(4):
        Image.new("RGB", (16, 16), (60 * i, 0, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a red boat")
    run = train(on(base, **settings | dict(dataset=str(folder), out=str(tmp_path / "run"))))
    before = load_file(run / "latents.safetensors")["ids"]
    for i in range(4): (folder / f"{i}.txt").write_text("two blue cars")
    train(read_config(["--resume", "--steps", "3", "--out", str(run)]))
    after = load_file(run / "latents.safetensors")["ids"]
    assert not torch.equal(before[0], after[0]) and "the pictures are not those" in capsys.readouterr().err


def test_what_comes_next_is_said(tmp_path, monkeypatch, capsys):
    "After a stage alone, the stage that follows; a stage that was not finished is named."
    run = tmp_path / "run"
    assert "--resume --stage clip --out" in run_command(monkeypatch, capsys, tinydiff.train.main, *flags(TrainConfig(**QUICK | dict(stage="vae"))), "--out", run)[1]
    assert "--resume --stage diffusion --out" in run_command(monkeypatch, capsys, tinydiff.train.main, "--resume", "--stage", "clip", "--out", run)[1]
    shutil.rmtree(run / "vae")
    status, _, said = run_command(monkeypatch, capsys, tinydiff.train.main, "--resume", "--stage", "diffusion", "--out", run)
    assert status == 2 and f"stage vae in {run} is not finished" in said
    monkeypatch.setenv("RANK", "1")
    assert not run_command(monkeypatch, capsys, tinydiff.train.main, "--resume", "--stage", "clip", "--out", run)[1]


@pytest.mark.parametrize("change", ["--arch base", "--image_size 32", "--seed 7", "--optimizer adamw", "--no_train_text_encoder", "--scheduler ddpm", "--sketch_weight 0"])
def test_what_a_resumed_run_cannot_change(base, tmp_path, monkeypatch, capsys, change):
    "One line, and the run can go on as it was."
    run = tmp_path / "run"
    shutil.copytree(base, run)
    status, _, said = run_command(monkeypatch, capsys, tinydiff.train.main, "--resume", "--out", run, *change.split())
    assert status == 2 and len(said.strip().splitlines()) == 1 and "it cannot go on with" in said
    assert (run / "run.json").read_bytes() == (base / "run.json").read_bytes()
    with pytest.raises(ValueError, match="--resume needs --out with the folder of a run"):
        train(TrainConfig(resume=True, **QUICK | dict(out=str(tmp_path / "typo"))))


@pytest.mark.parametrize("change, line", [
    ("--stage vae --vae_steps 4", "stands on 2 steps of stage vae"), ("--stage clip", "stands on 2 steps of stage clip"), ("--vae_steps 4", "stands on 2 steps of stage vae"),
    ("--steps 1", "stage diffusion in .* has made 2 steps already: 1 cannot be asked for"), ("--stage diffusion --steps 1", "has made 2 steps already")])
def test_what_a_unet_stands_on_is_not_trained_any_more(base, tmp_path, monkeypatch, capsys, change, line):
    shutil.copytree(base, run := tmp_path / "run")
    status, _, said = run_command(monkeypatch, capsys, tinydiff.train.main, "--resume", "--out", run, *change.split())
    assert status == 2 and len(said.strip().splitlines()) == 1 and re.search(line, said)
    assert not differences(run, base, "all")


def test_a_finished_run_that_goes_on_is_whole_all_the_while(base, tmp_path, monkeypatch):
    "Its parts stay what they were until new ones are done: whatever the data set and the text encoder have become since."
    shutil.copytree(base, run := tmp_path / "run")
    parts = lambda: {path: path.read_bytes() for path in run.glob("*/*") if path.parent.name in ("vae", "clip", "text_encoder", "tokenizer", "unet")}
    before, config = parts(), TrainConfig(stage="all", out=str(run), resume=True, **QUICK | dict(steps=5, subset_size=20))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupt(patch, 4)
        train(config)
    assert parts() == before and TextToImage.from_pretrained(run)
    train(config)
    assert {path.parent.name for path, content in parts().items() if content != before[path]} == {"unet", "text_encoder"}


@pytest.mark.parametrize("lost", ["vae", "tokenizer"])
def test_a_lost_part_is_made_again_from_its_checkpoint(lost, base, tmp_path):
    "As after a power cut between two renames."
    shutil.copytree(base, run := tmp_path / "run")
    shutil.rmtree(run / lost)
    train(TrainConfig(stage="all", out=str(run), resume=True, **QUICK))
    assert not differences(run, base, "all") and TextToImage.from_pretrained(run)


def test_other_parts_make_no_pipeline(base, tmp_path):
    "A finished run whose UNet is given up, and whose text encoder is trained on."
    shutil.copytree(base, run := tmp_path / "run")
    shutil.rmtree(run / "checkpoints/diffusion")
    train(TrainConfig(stage="clip", out=str(run), resume=True, **QUICK | dict(clip_steps=3)))
    assert (run / "unet").is_dir() and not (run / "model_index.json").exists()


def test_each_stage_goes_on_as_it_began(tmp_path):
    "Whatever another stage of the same run was given since."
    config = TrainConfig(stage="vae", out=str(tmp_path / "run"), **QUICK)
    train(config)
    train(dataclasses.replace(config, resume=True, stage="clip", optimizer="adamw", seed=5))
    with pytest.raises(ValueError, match="stage vae in .* began with --seed 0: it cannot go on with 5"):
        train(dataclasses.replace(config, resume=True, vae_steps=3, seed=5))
    train(dataclasses.replace(config, resume=True, vae_steps=3))
    train(dataclasses.replace(config, resume=True, vae_steps=3, stage="diffusion", seed=5))
    train(dataclasses.replace(config, resume=True, vae_steps=3, stage="all", seed=5, steps=3))  # the other stages are left as they are


def test_a_copy_beside_the_checkpoints_is_no_checkpoint(base, tmp_path):
    run = train(on(base, out=str(tmp_path / "run")))
    shutil.copytree(run / "checkpoints/diffusion/0000002", run / "checkpoints/diffusion/0000002-good")
    train(read_config(["--resume", "--steps", "4", "--keep", "1", "--checkpoint_every", "1", "--out", str(run)]))
    assert sorted(p.name for p in (run / "checkpoints/diffusion").iterdir()) == ["0000002-good", "0000004"]


def test_from_a_unet_for_another_size(base, tmp_path):
    "What was trained at 32 pixels draws at 32 pixels, though its UNet began at 16."
    pipe = TextToImage.from_pretrained(train(on(base, unet=str(base), image_size=32, steps=1, out=str(tmp_path / "run"))))
    assert pipe("a boat", num_inference_steps=1)[0].size == (32, 32)


def test_ctrl_c(base, tmp_path, monkeypatch, capsys):
    interrupt(monkeypatch, 2, signal.SIGINT)
    status, _, said = run_command(monkeypatch, capsys, tinydiff.train.main, *flags(on(base, steps=5)), "--out", tmp_path / "run")
    assert status == 130 and "saved after step 2 of 5" in said and "--resume --out" in said and "Traceback" not in said


def test_kill_in_the_middle_of_a_checkpoint(base, tmp_path, monkeypatch):
    "kill -9 while a checkpoint is being written: the one before loads, and the end is the same."
    config = on(base, steps=12, checkpoint_every=4)
    whole = train(dataclasses.replace(config, out=str(tmp_path / "whole")))
    child = os.fork()
    if child == 0:
        save, calls = tinydiff.train.save_file, []

        def save_and_die(tensors, path, **settings):
            save(tensors, path, **settings)
            if "0000008" in str(path) and str(path).endswith("ema.safetensors"):
                os.kill(os.getpid(), signal.SIGKILL)

        tinydiff.train.save_file = save_and_die
        train(dataclasses.replace(config, out=str(tmp_path / "killed")))
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    checkpoints = tmp_path / "killed/checkpoints/diffusion"
    assert sorted(p.name for p in checkpoints.iterdir()) == [".0000008.tmp", "0000004"] and len(read_metrics(tmp_path / "killed")) == 8
    with open(tmp_path / "killed/metrics.jsonl", "a") as file:
        file.write('{"stage": "diffusion", "st')  # a line cut short
    resumed = train(read_config(["--resume", "--out", str(tmp_path / "killed")]))
    assert_same_run(whole, resumed, "diffusion", 12)


def test_the_kill_report_runs():
    done = subprocess.run([sys.executable, "tests/kill_report.py", "--kills", "1", "--only", "ddpm, 2"], capture_output=True, text=True)
    assert done.returncode == 0 and "1 of 1 resumed runs equal the undisturbed one, bit for bit" in done.stdout, done.stderr


@pytest.mark.parametrize("name, damage", [*(("model.safetensors", how) for how in ("cut", "flip", "missing", "empty")), ("ema.safetensors", "flip"),
                                          ("optimizer.safetensors", "flip"), ("checksums.json", "cut"), ("checksums.json", "missing")])
def test_damaged_checkpoint(base, tmp_path, capsys, name, damage):
    "The newest checkpoint cannot be used: the one before is."
    config = on(base, steps=6, checkpoint_every=2, keep=3)
    whole = train(dataclasses.replace(config, out=str(tmp_path / "whole")))
    run = tmp_path / "damaged"
    shutil.copytree(whole, run)
    file = run / "checkpoints/diffusion/0000006" / name
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    {"cut": lambda: file.write_bytes(content[: len(content) // 2]), "flip": lambda: file.write_bytes(content), "missing": file.unlink,
     "empty": lambda: file.write_bytes(b"")}[damage]()
    resumed = train(read_config(["--resume", "--out", str(run)]))
    assert "0000006 cannot be read" in capsys.readouterr().err
    assert_same_run(whole, resumed, "diffusion", 6)


@pytest.mark.parametrize("error, advice", [(OSError(errno.ENOSPC, "No space left on device"), "Make room"), (OSError(errno.ENOENT, "No such file"), "Mend that")])
def test_advice_where_a_checkpoint_cannot_be_written(tmp_path, monkeypatch, error, advice):
    monkeypatch.setattr(tinydiff.train, "write_atomically", lambda *args: (_ for _ in ()).throw(error))
    model = nn.Linear(2, 2)
    with pytest.raises(OSError, match=f"none yet. {advice}, then go on with --resume --out {tmp_path}$"):
        save_checkpoint(tmp_path / "checkpoints/vae", 1, model, EMA(model, 0.9), torch.optim.AdamW(model.parameters()), 1)


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for step in ("9999500", "10000000", "0000500"): (tmp_path / step).mkdir()
    assert [path.name for path in checkpoints_in(tmp_path)] == ["0000500", "9999500", "10000000"]


@pytest.mark.parametrize("which", ["weights", "average"])
def test_weights_that_are_not_finite_are_not_saved(base, tmp_path, monkeypatch, which):
    "The last update before a checkpoint may be the one that goes wrong, with a loss and a gradient that were fine."
    run, update = train(on(base, out=str(tmp_path / "run"))), EMA.update

    def spoil(ema, model, step):
        update(ema, model, step)
        next((ema.model if which == "average" else model).parameters()).data.view(-1)[0] = math.inf

    monkeypatch.setattr(EMA, "update", spoil)
    with pytest.raises(ValueError, match="after step 3 weights are not finite, and are not saved: lower the learning rate; whole checkpoints in .*: 0000002"):
        train(dataclasses.replace(stored_config(run), steps=3, resume=True))
    assert [path.name for path in (run / "checkpoints/diffusion").iterdir()] == ["0000002"]


def test_one_program_in_a_folder(base, tmp_path):
    "While another one trains there, nothing is written; a killed one holds nothing, and a finished one neither."
    config = on(base, out=str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    (hears, tells), child = os.pipe(), os.fork()
    if child == 0:
        lock = tinydiff.train.lock_folder(tmp_path / "run")
        os.write(tells, b"!")
        time.sleep(60)
        os._exit(lock.fileno())
    try:
        os.read(hears, 1)
        with pytest.raises(ValueError, match="another program is training in .*run: wait for its end, stop it, or choose another --out"):
            train(config)
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    train(config)
    child = os.fork()
    if child == 0:
        tinydiff.train.lock_folder(tmp_path / "run")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer"])
def test_a_kill_between_two_renames(base, tmp_path, part):
    "What was moved aside for its successor comes back."
    run = shutil.copytree(base, tmp_path / "run")
    config = dataclasses.replace(stored_config(run), stage="diffusion", steps=3, out=str(run), resume=True)
    (run / part).rename(run / f".{part}.old")
    train(config)
    assert (run / part).is_dir() and not list(run.glob(".*.old"))


def test_a_run_goes_on_from_another_directory(base, tmp_path, monkeypatch):
    "Folders that were named from here are found from there."
    for place in ("here", "there"): (tmp_path / place).mkdir()
    picture_folder(tmp_path / "here/data"), picture_folder(tmp_path / "there/data", count=2)
    shutil.copytree(base, tmp_path / "here/parts")
    monkeypatch.chdir(tmp_path / "here")
    train(on("parts", dataset="./data", subset_size=0, out=str(tmp_path / "run")))
    monkeypatch.chdir(tmp_path / "there")
    train(dataclasses.replace(stored_config(tmp_path / "run"), steps=3, resume=True))
    after = stored_config(tmp_path / "run")
    assert (after.dataset, after.vae, after.text_encoder) == tuple(str(tmp_path / "here" / name) for name in ("data", "parts", "parts"))


def test_captions_that_are_cut_are_counted(base, tmp_path, capsys):
    folder = picture_folder(tmp_path / "data", count=4)
    (folder / "0.txt").write_text("a very long caption " * 20)
    train(on(base, dataset=str(folder), subset_size=0, out=str(tmp_path / "run")))
    assert re.search("note: of 25% of the captions the text encoder reads the beginning alone, \\d+ pieces", capsys.readouterr().err)


def test_reading_captions_changes_no_weights(tmp_path):
    "A loader draws a seed from PyTorch's numbers, unless it has its own."
    run = Run(TrainConfig(**QUICK | dict(stage="clip")), tmp_path, torch.device("cpu"), False)
    torch.manual_seed(3)
    stage = tinydiff.train.CLIPStage(run, open_dataset(run.config), SMALL)
    torch.manual_seed(3)
    twin = CLIP(stage.model.text_encoder.config, stage.model.image_encoder.config)
    assert all(torch.equal(weight, twin.state_dict()[key]) for key, weight in stage.model.state_dict().items())


def test_a_signal_while_captions_are_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(tinydiff.train.ARCHITECTURES, "tiny", SMALL)
    monkeypatch.setattr(tinydiff.train, "captions_in", lambda items: os.kill(os.getpid(), signal.SIGTERM) or ["a caption"])
    with pytest.raises(SystemExit):
        train(TrainConfig(**QUICK | dict(stage="clip", num_workers=0, out=str(tmp_path / "run"))))
    assert "stopped while reading captions, which begins anew" in capsys.readouterr().err


def test_no_checkpoint_can_be_read(base, tmp_path):
    "A run does not begin anew by itself, and its records stay."
    run = train(on(base, steps=4, checkpoint_every=2, out=str(tmp_path / "run")))
    for file in run.glob("checkpoints/diffusion/*/model.safetensors"): file.write_bytes(b"")
    with pytest.raises(ValueError, match="no checkpoint in .*diffusion can be read: remove the folder to begin the stage anew"):
        train(read_config(["--resume", "--out", str(run)]))
    assert len(read_metrics(run)) == 4


def test_a_step_is_saved_before_it_is_drawn(base, tmp_path, monkeypatch):
    "A picture that fails loses nothing."
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(tinydiff.train.DiffusionStage, "preview", lambda *args: 1 / 0)
        train(on(base, steps=3, checkpoint_every=2, sample_every=2, out=str(tmp_path / "run")))
    assert (tmp_path / "run/checkpoints/diffusion/0000002").is_dir()
    assert not (tmp_path / "run/samples/diffusion-000002.png").exists()
    train(read_config(["--resume", "--out", str(tmp_path / "run")]))
    whole = train(on(base, steps=3, checkpoint_every=2, sample_every=2, out=str(tmp_path / "whole")))
    assert not differences(whole, tmp_path / "run", "diffusion"), "what was not drawn is drawn now"
    assert len(list((whole / "samples").glob("diffusion-*.png"))) == 2


def test_pictures_are_written_whole(base, tmp_path, monkeypatch):
    "A picture that fails halfway leaves no half of it behind under its name."
    def half(path, content):
        with open(path, "wb") as file: file.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(pathlib.Path, "write_bytes", half)
    with pytest.raises(OSError, match="make room"):
        train(on(base, steps=2, sample_every=1, out=str(tmp_path / "run")))
    assert not list((tmp_path / "run/samples").glob("*.png"))


def test_full_disk(base, tmp_path, capfd):
    "A file that cannot be written to its end: one line, the checkpoint before stays, and the run goes on from it to the same end."
    config = on(base, steps=9, checkpoint_every=3)
    whole = train(dataclasses.replace(config, out=str(tmp_path / "whole")))
    child = os.fork()
    if child == 0:
        write = tinydiff.train.write_atomically

        def write_to_full_disk(folder, write_files):
            if folder.name == "0000006":
                resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
            write(folder, write_files)

        tinydiff.train.write_atomically = write_to_full_disk
        tinydiff.train.read_config = lambda args: dataclasses.replace(config, out=str(tmp_path / "full"))
        try:
            tinydiff.train.main()
        except SystemExit as stop:
            os._exit(stop.code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and re.search("checkpoint of step 6 could not be written.*whole ones in .*: 0000003.*--resume --out .*full", said[0])
    assert [p.name for p in (tmp_path / "full/checkpoints/diffusion").iterdir()] == ["0000003"]
    assert_same_run(whole, train(read_config(["--resume", "--out", str(tmp_path / "full")])), "diffusion", 9)


def fork_rank(config, rank, world, port):
    "A process of a run of several."
    child = os.fork()
    if child == 0:
        os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
        try:
            train(config)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def by_two(config):
    "Train in two processes."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [fork_rank(config, rank, 2, port) for rank in (0, 1)]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


@pytest.mark.parametrize("stage", ["vae", "clip", "diffusion"])
@pytest.mark.parametrize("optimizer, close", [("adamw", 1e-6), ("muon", 1e-3)])
def test_two_processes_are_like_one(base, tmp_path, stage, optimizer, close):
    """The same losses, by one, by two, and by one that goes on where two stopped; the long version is tests/two_processes.py.

    The gradients differ by rounding. Muon lifts quiet directions, where there is nothing but rounding, and so the difference too.
    """
    parts = dict(vae=str(base), text_encoder=str(base)) if stage == "diffusion" else {}
    config = TrainConfig(**QUICK | dict(stage=stage, optimizer=optimizer, steps=8, vae_steps=8, clip_steps=8, batch_size=6, vae_batch_size=6, clip_batch_size=6, flip=True, checkpoint_every=4) | parts)
    one = train(dataclasses.replace(config, out=str(tmp_path / "one")))
    assert by_two(dataclasses.replace(config, out=str(tmp_path / "two"))) == [0, 0]
    shutil.rmtree(tmp_path / "two/checkpoints" / stage / "0000008")
    both = [[r["loss"] for r in read_metrics(run)] for run in (one, tmp_path / "two")]
    resumed = train(read_config(["--resume", "--out", str(tmp_path / "two")]))
    both.append([r["loss"] for r in read_metrics(resumed)])
    assert [len(losses) for losses in both] == [8, 8, 8] and len(set(both[0])) == 8
    assert both[1] == pytest.approx(both[0], abs=close) and both[2] == pytest.approx(both[0], abs=close)


def test_two_processes_stop_at_once(base, tmp_path, monkeypatch, capfd):
    "A signal that one of them hears stops both after that step, however rarely they report."
    see = Guard.see
    monkeypatch.setattr(Guard, "see", lambda guard, step, *rest: (see(guard, step, *rest), step == 2 and guard.run.rank and os.kill(os.getpid(), signal.SIGTERM)))
    config = on(base, steps=50, batch_size=6, log_every=50, checkpoint_every=50, sample_every=50, out=str(tmp_path / "run"))
    assert by_two(config) == [1, 1]  # fork_rank's status for an exception, here SystemExit(0)
    said = capfd.readouterr().err
    assert said.count("stopped and saved after step 3 of 50") == 1 and said.count("SystemExit: 0") == 2
    assert [path.name for path in (tmp_path / "run/checkpoints/diffusion").iterdir()] == ["0000003"]


def test_two_processes_stop_while_they_encode(base, tmp_path, monkeypatch, capfd):
    "A signal that one of them hears there ends both in good order."
    encode = tinydiff.train.encode_dataset
    monkeypatch.setattr(tinydiff.train, "encode_dataset", lambda run, *rest: (run.rank or os.kill(os.getpid(), signal.SIGTERM), encode(run, *rest))[1])
    assert by_two(on(base, batch_size=6, out=str(tmp_path / "run"))) == [1, 1]
    said = capfd.readouterr().err
    assert said.count("stopped while encoding, which begins anew") == 1 and said.count("SystemExit: 0") == 2


def test_two_processes_share_the_encoding(base, tmp_path, monkeypatch):
    "Each encodes half of the pictures; the file is what one process would have written, and what was skipped by either is named."
    folder, encode = picture_folder(tmp_path / "data", count=11, captions=2), tinydiff.train.encode_dataset
    config = on(base, dataset=str(folder), subset_size=0, batch_size=6, steps=2)
    train(dataclasses.replace(config, out=str(tmp_path / "one")))
    monkeypatch.setattr(tinydiff.train, "encode_dataset", lambda run, dataset, parts, items: (tmp_path / f"saw-{run.rank}").write_text(str(len(items))) and encode(run, dataset, parts, items))
    assert by_two(dataclasses.replace(config, out=str(tmp_path / "two"))) == [0, 0]
    assert [(tmp_path / f"saw-{rank}").read_text() for rank in (0, 1)] == ["6", "5"]
    one, two = (load_file(tmp_path / name / "latents.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and torch.equal(one["ids"], two["ids"]) and torch.equal(one["first"], two["first"])
    torch.testing.assert_close(one["moments"], two["moments"], rtol=0, atol=2e-3)  # other batches, and half precision
    assert not list((tmp_path / "two").glob("latents-*"))


def test_more_processes_than_pictures(base, tmp_path):
    "One has nothing to encode; and what a killed run of more processes left is cleared away."
    folder = picture_folder(tmp_path / "data", count=1)
    config = on(base, dataset=str(folder), subset_size=0, batch_size=2, steps=2, out=str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/latents-7.safetensors").touch()
    assert by_two(config) == [0, 0]
    assert [path.name for path in (tmp_path / "run").glob("latents*")] == ["latents.safetensors"]


def test_what_either_process_skipped_is_named(tmp_path, monkeypatch, capfd):
    folder = picture_folder(tmp_path / "data", count=8)
    for i in batch_indices(8, 8, 0, 0)[:4:3]: (folder / f"{i}.png").write_bytes(b"<html>")  # 2 and 4: one for each process
    monkeypatch.setattr(tinydiff.train.VAEStage, "finish", lambda stage, model: None)  # it looks at all pictures once more
    config = TrainConfig(**QUICK | dict(stage="vae", dataset=str(folder), subset_size=0, vae_batch_size=8, vae_steps=1, sample_every=9, out=str(tmp_path / "run")))
    monkeypatch.setattr(tinydiff.train.Progress, "look", lambda *args: None)
    monkeypatch.setattr(tinydiff.train, "data_fingerprint", lambda dataset: "")  # so does this
    assert by_two(config) == [0, 0] and "2 of 8 items skipped" in capfd.readouterr().err


def test_run_record(base, tmp_path):
    "Configuration, data, code, packages and machine; and the starts before this one."
    run = train(on(base, out=str(tmp_path / "run")))
    first = json.loads((run / "run.json").read_text())
    assert torch.__version__.startswith(first["packages"]["torch"]) and first["hardware"]["cpus"] == os.cpu_count() and first["hardware"]["processor"]
    assert re.fullmatch(r"[0-9a-f]{12}\+?", first["commit"]) or not os.path.isdir(".git")
    again = json.loads((train(dataclasses.replace(on(base), resume=True, steps=3, out=str(run))) / "run.json").read_text())
    assert first["chosen"] == {"device": "cpu", "precision": "fp32", "num_workers": 0}
    assert again["data"] == first["data"] and [start["config"]["steps"] for start in again["earlier"]] == [2] and again["config"]["steps"] == 3


def test_other_pictures_are_noticed(base, tmp_path, capsys):
    folder = picture_folder(tmp_path / "data")
    config = on(base, dataset=str(folder), subset_size=0, out=str(tmp_path / "run"))
    train(config)
    before = (folder / "1.png").read_bytes()
    for red, expected in ((True, True), (True, True), (False, False)):  # compared with the first start's, whatever came between
        Image.new("RGB", (20, 20), "red").save(folder / "1.png") if red else (folder / "1.png").write_bytes(before)
        train(dataclasses.replace(config, resume=True, steps=3))
        assert ("note: the pictures are not those" in capsys.readouterr().err) == expected


def test_skipped_pictures_are_named_at_the_end(tmp_path, capsys):
    folder = picture_folder(tmp_path / "data", count=4)
    (folder / "2.png").write_bytes(b"<html>")
    train(TrainConfig(**QUICK | dict(stage="vae", dataset=str(folder), subset_size=0, num_workers=2, out=str(tmp_path / "run"))))
    said = capsys.readouterr().err
    assert "1 of 4 items skipped" in said and re.search(r"item 2: cannot identify image file '.*/2.png'", said)
    assert (tmp_path / "run/skipped.txt").read_text() in said


@pytest.mark.parametrize("stage", ["vae", "diffusion"])
def test_skipped_pictures_are_remembered_by_a_run_that_was_killed(stage, base, tmp_path, monkeypatch, capsys):
    "One is met in the first step and, by its latents, never again; one was mended meanwhile."
    folder = picture_folder(tmp_path / "data", count=66)  # at the first eight and at every third each start takes a look
    pictures = sorted(folder.glob("*.png"))
    for i in (20, 22): pictures[i].write_bytes(b"<html>")
    parts = dict(vae=str(base), text_encoder=str(base)) if stage == "diffusion" else {}
    config = TrainConfig(**QUICK | parts | dict(stage=stage, dataset=str(folder), batch_size=66, vae_batch_size=66, subset_size=0, out=str(tmp_path / "run")))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupt(patch, 1)
        train(config)
    assert "2 of 66 items skipped" in (tmp_path / "run/skipped.txt").read_text()
    shutil.copy(pictures[0], pictures[22])
    capsys.readouterr()
    train(dataclasses.replace(config, resume=True))
    assert "1 of 66 items skipped" in (said := capsys.readouterr().err) and re.search(r"item 20: cannot identify", said)
    assert tinydiff.train.noted(tmp_path / "run") == [20]


@pytest.mark.parametrize("error, message", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "needs more memory.*--batch_size .5.*--grad_accum.*--grad_checkpoint.*--image_size"),
    *((RuntimeError(text), "needs more memory than cpu has") for text in (
        "[enforce fail at alloc_cpu.cpp:125] DefaultCPUAllocator: can't allocate memory", "CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)")),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of shared memory."), "process that reads pictures was killed.*lower --num_workers"),
    (OSError(errno.ENOSPC, "No space left on device"), "could not write into .*make room, then go on with --resume"),
    (SafetensorError("I/O error: File too large (os error 27)"), "could not write into .*File too large.*make room, then go on with --resume"),
])
def test_what_ends_a_stage(base, tmp_path, monkeypatch, capsys, error, message):
    def fail(*args): raise error
    monkeypatch.setattr(tinydiff.train.Denoiser, "forward", fail)
    status, _, said = run_command(monkeypatch, capsys, tinydiff.train.main, *flags(on(base)), "--out", tmp_path / "run")
    said = [line for line in said.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(said) == 1 and re.search(message, said[0])


def test_a_script_that_every_reader_runs_again(base, tmp_path, monkeypatch):
    "Where processes do not fork, a script without a guard starts itself in each reader, which ends at once."
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda: "spawn")
    run = Run(on(base), tmp_path, torch.device("cpu"), False)
    with pytest.raises(ValueError, match="must call train.. under `if __name__ == '__main__':`"), explained("vae", run):
        raise RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")


def test_compiling_without_a_compiler(base, tmp_path):
    run = Run(on(base, compile=True), tmp_path, torch.device("cpu"), False)
    with pytest.raises(ValueError, match="--compile failed .*no compiler.*leave it out with --resume --no_compile --out"), tinydiff.train.explained("diffusion", run):
        from torch._dynamo.exc import TorchDynamoException
        raise TorchDynamoException("no compiler\nand a long story")


def test_advice_is_the_stage_s(base, tmp_path):
    "Stage clip needs its batch whole, and only the UNet can compute its activations again."
    run = Run(on(base), tmp_path, torch.device("cpu"), False)
    advice = {}
    for stage in ("vae", "clip", "diffusion"):
        with pytest.raises(ValueError) as said, tinydiff.train.explained(stage, run):
            raise torch.OutOfMemoryError
        advice[stage] = re.findall(r"--(\w+)", str(said.value))
    assert advice == {"vae": ["vae_batch_size", "grad_accum", "image_size", "resume", "out"], "clip": ["clip_batch_size", "image_size", "resume", "out"],
                      "diffusion": ["batch_size", "grad_accum", "grad_checkpoint", "image_size", "resume", "out"]}


def test_large_pictures_are_encoded_in_smaller_batches(base, tmp_path, monkeypatch):
    seen, encode = [], tinydiff.train.AutoencoderKL.encode
    monkeypatch.setattr(tinydiff.train.AutoencoderKL, "encode", lambda vae, images: seen.append(len(images)) or encode(vae, images))
    for size, most in ((16, 20), (512, 4)):
        config = on(base, image_size=size, subset_size=20)
        run, data = Run(config, tmp_path, torch.device("cpu"), False), open_dataset(config)
        tinydiff.train.encode_dataset(run, data, load_parts(base, base), torch.arange(20))
        assert max(seen) == most and sum(seen) == 20, size
        seen.clear()


def test_bf16_where_pytorch_was_built_without_onednn(monkeypatch):
    "As on Apple's processors: no crash, float32."
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.delattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", raising=False)
    assert tinydiff.train.has_bf16(torch.device("cpu")) is False


def test_each_process_takes_its_own_gpu(monkeypatch):
    "By name, before anything is put on the first one."
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(tinydiff.train, "choose_device", lambda name: asked.append(name) or torch.device("cpu"))
    for name, value in (("RANK", "3"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "4")): monkeypatch.setenv(name, value)
    for device in (None, "cuda", "cpu"):
        assert tinydiff.train.join_processes(TrainConfig(device=device))[1:] == (3, 4)
    assert asked == ["cuda:1", "cuda:1", "cpu"]


def test_only_stages_that_run_must_share_their_batch():
    for stage, values in (("diffusion", dict(batch_size=30)), ("vae", dict(vae_batch_size=9)), ("clip", dict(clip_batch_size=7))):
        tinydiff.train.check_shares(TrainConfig(stage=stage, grad_accum=3, **values), 1)
    with pytest.raises(ValueError, match="--vae_batch_size 8 cannot be shared"):
        tinydiff.train.check_shares(TrainConfig(stage="all", batch_size=30, grad_accum=3), 1)


def test_only_the_newest_checkpoints_stay(base, tmp_path):
    run = train(on(base, steps=5, checkpoint_every=1, keep=2, out=str(tmp_path / "run")))
    assert sorted(p.name for p in (run / "checkpoints/diffusion").iterdir()) == ["0000004", "0000005"]


def test_optimizer_state_keeps_its_layout(rng):
    "Moments saved and loaded go on as if they had stayed, for weights in channels_last, of which the file knows nothing."
    def model():
        torch.manual_seed(0)
        net = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
        return net, torch.optim.AdamW(net.parameters(), lr=0.01, fused=True)

    def learn(net, optimizer, batches):
        for x in batches:
            net(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    batches = torch.randn(8, 2, 4, 6, 6, generator=rng)
    straight, restarted, saved = model(), model(), model()
    learn(*straight, batches)
    learn(*saved, batches[:4])
    restarted[0].load_state_dict(saved[0].state_dict())
    load_optimizer_tensors(restarted[1], {k: v.contiguous() for k, v in optimizer_tensors(saved[1]).items()})
    learn(*restarted, batches[4:])
    assert torch.equal(straight[0].weight, restarted[0].weight)


def test_more_steps_keep_the_order(base, tmp_path):
    "Which pictures a step sees does not depend on how many steps there will be, nor what they look like encoded."
    runs = [Run(on(base, subset_size=40, steps=steps), tmp_path, torch.device("cpu"), False) for steps in (2, 3, 100)]
    data = [EncodedData(run, open_dataset(run.config), load_parts(base, base)) for run in runs]
    assert [len(d.cached["moments"]) for d in data] == [10, 15, 40]
    for step in range(2):
        for other in data[1:]:
            assert torch.equal(data[0].ids(step), other.ids(step))
            torch.testing.assert_close(data[0].latents(step), other.latents(step), rtol=0, atol=2e-3)


# --- data order, learning rate, average

def test_batches_are_functions_of_seed_and_step(seed):
    n, batch = 24, 5
    seen = [i for step in range(48) for i in batch_indices(n, batch, seed, step)]
    epochs = [seen[i : i + n] for i in range(0, len(seen), n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) == len(epochs)
    sampler = list(StepSampler(n, batch, seed, 7, 11))
    assert sampler == [batch_indices(n, batch, seed, step) for step in range(7, 11)]
    shares = [list(StepSampler(n, 6, seed, 3, 5, rank, 3)) for rank in range(3)]
    for whole, *parts in zip(StepSampler(n, 6, seed, 3, 5), *shares):
        assert sorted(whole) == sorted(sum(parts, [])) and {len(p) for p in parts} == {2}


def test_learning_rate():
    rates = [learning_rate(step, 100, 2.0, 10) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)]) and rates[10] == pytest.approx(2.0)
    assert rates[55] == pytest.approx(1.0) and rates[-1] < 1e-2 and all(a > b for a, b in zip(rates[10:], rates[11:]))


def test_ema_of_a_scalar(rng):
    "The closed form: each value weighs (1 - d) times the decays after it; early decays are (1 + step) / (10 + step)."
    values = torch.randn(30, generator=rng, dtype=torch.float64).tolist()
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    model.weight.data.fill_(1.0)
    ema, decays = EMA(model, 0.7), [min(0.7, (1 + step) / (10 + step)) for step in range(30)]
    assert decays[0] == 0.1 and decays[20] == 0.7
    expected = math.prod(decays)
    for step, value in enumerate(values):
        model.weight.data.fill_(value)
        ema.update(model, step)
        expected += (1 - decays[step]) * math.prod(decays[step + 1 :]) * model.weight.item()
    assert ema.model.weight.dtype == torch.float32 and ema.model.weight.item() == pytest.approx(expected, abs=1e-5)
    assert model.weight.item() == pytest.approx(values[-1], abs=0.02), "the weights themselves are not touched"


def test_ema_keeps_buffers():
    model = nn.BatchNorm1d(3)
    ema = EMA(model, 0.9)
    model(torch.randn(8, 3))
    ema.update(model, 0)
    assert ema.model.running_mean.any() and torch.equal(ema.model.running_mean, model.running_mean) and ema.model.num_batches_tracked == 1


# --- latents and captions

@pytest.fixture
def encoded(base, tmp_path):
    "The encoded scenes, as flips and dropout would have them."
    run = Run(on(base, flip=True, steps=1000, batch_size=24, caption_dropout=0.3), tmp_path, torch.device("cpu"), False)
    return EncodedData(run, open_dataset(run.config), load_parts(base, base))


def test_captions_are_dropped_one_by_one(encoded):
    dropped = torch.stack([(encoded.ids(step) == encoded.null_ids).all(dim=1) for step in range(200)])
    assert abs(dropped.float().mean() - 0.3) < 0.03, "4,800 throws: three standard deviations are 0.02"
    assert 0.02 < dropped.float().mean(dim=1).var() * 24 / (0.3 * 0.7) * 0.5, "the rate of a batch varies"
    assert not (dropped.all(dim=1) | ~dropped.any(dim=1)).float().mean() > 0.05, "a coin for the batch"


def test_cached_latents_are_fresh_each_epoch(base, encoded):
    "Two epochs differ, and over many the mean is that of the two mirrors as the VAE encodes them."
    vae, scenes = load_vae(base / "vae"), open_dataset(encoded.run.config)
    images = torch.stack([scenes[i]["pixel_values"] for i in range(24)])
    with torch.no_grad():
        means = [vae.encode(x).mean * vae.config.scaling_factor for x in (images, images.flip(-1))]
    samples = torch.zeros(400, 24, *means[0].shape[1:])
    for epoch in range(400):  # one batch is one epoch here
        samples[epoch, batch_indices(24, 24, 0, epoch)] = encoded.latents(epoch)
    middle, error = (means[0] + means[1]) / 2, samples.std(dim=0) / 400**0.5
    assert ((samples.mean(dim=0) - middle).abs() < 6 * error + 2e-3).all(), "mirrored or not, it is the latent of that very picture"
    assert (samples[0] != samples[1]).float().mean() > 0.99 and samples.std(dim=0).mean() > 1e-3
    assert (encoded.cached["moments"][:, 0] - encoded.cached["moments"][:, 1]).abs().max() > 0


def test_both_mirrors_are_used(encoded, monkeypatch):
    "Where the posterior is narrow, a latent is one of two: each about half of the time."
    encoded.cached["moments"][:, 0], encoded.cached["moments"][:, 1] = 1.0, -1.0
    encoded.cached["moments"][:, :, 4:] = -30.0
    coins = torch.stack([encoded.latents(step)[:, 0, 0, 0].sign() for step in range(60)])
    assert set(coins.unique().tolist()) == {-1.0, 1.0} and abs(coins.mean()) < 0.1
    assert coins.mean(dim=1).abs().max() < 1, "a coin for each picture, not for the batch"


def test_cache_is_made_anew_when_it_must(base, tmp_path, monkeypatch):
    made, encode = [], tinydiff.train.encode_dataset
    monkeypatch.setattr(tinydiff.train, "encode_dataset", lambda *args: made.append(1) or encode(*args))
    out = str(tmp_path / "run")
    for more, count in [({}, 1), (dict(steps=3), 2), (dict(steps=4, flip=True), 3), (dict(steps=4, flip=True, lr=0.5), 3)]:
        train(on(base, out=out, resume=count > 1, **dict(steps=2) | more))
        assert len(made) == count, more
    (tmp_path / "run/latents.safetensors").write_bytes(b"damaged")
    train(on(base, out=out, resume=True, steps=5, flip=True))
    assert len(made) == 4
    with open(tmp_path / "run/latents.safetensors", "r+b") as file:  # one bit
        file.seek(-100, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-100, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    for _ in range(2): train(on(base, out=out, resume=True, steps=6, flip=True))
    assert len(made) == 5


def test_every_caption_is_used(base, tmp_path):
    "An item with several captions gives another one from time to time, in stages 2 and 3."
    folder = picture_folder(tmp_path / "data", captions=3)
    run = Run(on(base, dataset=str(folder), subset_size=0, caption_dropout=0.0, steps=50), tmp_path, torch.device("cpu"), False)
    data = EncodedData(run, open_dataset(run.config), load_parts(base, base))
    assert len({tuple(row) for step in range(50) for row in data.ids(step).tolist()}) == 9 == len(data.cached["ids"])
    stage = tinydiff.train.PixelStage(run, open_dataset(run.config), 5, 50)
    stage.start(0)
    assert len({caption for step in range(50) for caption in stage.pictures(step)[1]}) == 9


def test_scaling_factor(tmp_path, rng):
    "Latents times the factor have a standard deviation of about 1, also after a round trip through a folder."
    run = train(TrainConfig(**QUICK | dict(stage="vae", vae_steps=40, vae_batch_size=8, vae_lr=3e-3, out=str(tmp_path / "run"))))
    vae = load_vae(run / "vae")
    assert vae.config.scaling_factor != 1.0
    dataset = open_dataset(TrainConfig(**QUICK | dict(split="validation")))
    with torch.no_grad():
        latents = vae.encode(torch.stack([item["pixel_values"] for item in map(dataset.__getitem__, range(24))])).sample(rng)
    assert 0.9 < (latents * vae.config.scaling_factor).std() < 1.1


# --- what goes wrong

@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("stage", ["vae", "diffusion"])
@pytest.mark.parametrize("log_every", [1, 4])
def test_non_finite_loss(base, tmp_path, monkeypatch, stage, log_every, optimizer):
    "No update from that step on, though the loop looks only later; step, items and timesteps are named; the run can go on."
    parts = dict(vae=str(base), text_encoder=str(base)) if stage == "diffusion" else {}
    config = TrainConfig(**QUICK | dict(stage=stage, optimizer=optimizer, steps=8, vae_steps=8, log_every=log_every, checkpoint_every=2, out=str(tmp_path / "run")) | parts)
    kind = {"vae": tinydiff.train.VAEStage, "diffusion": tinydiff.train.DiffusionStage}[stage]
    batch, bad, last = kind.batch, batch_indices(24, 5, 0, 3)[2], []

    def poisoned(self, step):
        first, *others = batch(self, step)
        return first.index_fill(0, torch.tensor([2]), math.inf) if step == 3 else first, *others

    def spied(self, step, *numbers):
        see(self, step, *numbers)
        last.append([p.detach().clone() for p in self.optimizer.param_groups[0]["params"]])

    see = Guard.see
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=rf"^step 4 of stage {stage}: .*unchanged.*1 of its 5 items alone: item {bad}\b") as said:
        patch.setattr(kind, "batch", poisoned)
        patch.setattr(Guard, "see", spied)
        train(config)
    assert bool(re.search(r"at timestep \d+\.\d", str(said.value))) == (stage == "diffusion") and len(str(said.value)) < 400
    assert len(last) == 4 and [p.name for p in sorted((tmp_path / "run/checkpoints" / stage).iterdir())] == ["0000002"]
    train(dataclasses.replace(config, resume=True))


def test_nothing_is_updated_after_a_bad_step(rng):
    "Weights, moments and counter stay, also at later steps whose numbers are good, until somebody looks."
    net = nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, fused=True)
    guard = Guard(optimizer, Run(TrainConfig(), None, torch.device("cpu"), False))
    state = lambda: {k: v.clone() for k, v in (*net.state_dict().items(), *optimizer_tensors(optimizer).items())}
    states = []
    for step, loss in enumerate([1.0, 1.0, math.inf, 1.0]):
        net(torch.randn(2, 3, generator=rng)).square().mean().backward()
        guard.see(step, torch.tensor(loss), torch.tensor(1.0))
        optimizer.step()
        states.append(state())
    same = [all(torch.equal(a[k], b[k]) for k in b) for a, b in zip(states[1:], states)]
    assert same == [False, True, True] and guard.first_bad == 2


def test_muon_without_gradients():
    "A weight that got none stays, also where no other weight got one."
    net = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    optimizer, before = tinydiff.train.Muon(net, lr=0.1), [p.detach().clone() for p in net.parameters()]
    optimizer.step()
    net[0].weight.grad = torch.ones(3, 3)
    optimizer.step()
    assert [torch.equal(a, b) for a, b in zip(before, net.parameters())] == [False, True, True, True]


def test_muon_does_not_look_whether_the_step_was_good(rng):
    "Weights stay where `found_inf` is 1, and no number is fetched for that; counters lie on the CPU, in a list."
    net, fetched = nn.Linear(3, 3), []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._local_scalar_dense.default:
                fetched.append(args[0].item())
            return function(*args, **(kwargs or {}))

    optimizer, before = tinydiff.train.Muon(net, lr=0.1), [p.clone() for p in net.parameters()]
    for step, (bad, factor) in enumerate([(0.0, 1.0), (1.0, math.nan), (1.0, 1.0)]):
        (net(torch.randn(2, 3, generator=rng)).square().mean() * factor).backward()
        optimizer.found_inf = torch.tensor(bad)
        with Spy():
            optimizer.step()
        assert not fetched
        if step == 0:
            assert not any(torch.equal(p, q) for p, q in zip(net.parameters(), before))
            before = [p.clone() for p in net.parameters()]
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before))
        optimizer.zero_grad()


def test_bfloat16_copies_compute_and_float32_weights_learn():
    "The answer and the gradients are those of a bfloat16 model; they arrive in float32, at the weights that are trained and at no other."
    torch.manual_seed(0)
    model = Denoiser(UNet(SMALL.unet), CLIPTextEncoder(SMALL.text).requires_grad_(False), Sketch(SMALL.text, 4))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    plain, copies = copy.deepcopy(model).bfloat16(), InBFloat16(model)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 997.0]), torch.randint(500, (2, 32))
    assert [id(p) for p in copies.parameters()] == [id(p) for p in model.parameters()]
    for part in range(1, 3):  # gradients of parts add up in float32
        with torch.autocast("cpu", torch.bfloat16):
            answers = copies(*inputs)
            sum(answer.float().square().mean() for answer in answers).backward()
        plain.zero_grad()
        sum(answer.float().square().mean() for answer in plain(*inputs)).backward()
        assert all(answer.dtype == torch.bfloat16 and torch.equal(answer, other) for answer, other in zip(answers, plain(*inputs), strict=True))
        for p, q in zip(model.parameters(), plain.parameters()):
            assert p.dtype == torch.float32 and (p.grad is None) == (q.grad is None)
            assert q.grad is None or (p.grad.dtype == torch.float32 and torch.equal(p.grad, part * q.grad.float()))
    with torch.no_grad():
        model.unet.conv_out.bias.add_(1)
    assert torch.allclose(copies(*inputs)[0].float(), answers[0].float() + 1, atol=0.02)


def test_a_process_that_lost_another_ends_at_once_on_a_gpu(tmp_path, monkeypatch, capsys):
    "Python's orderly end would wait for the GPU, and the GPU for the lost process."
    def leave(status):
        raise SystemExit(status)

    monkeypatch.setattr(os, "_exit", leave)
    for device, end in (("cuda", SystemExit), ("cpu", ValueError)):
        with pytest.raises(end) as stopped, explained("diffusion", Run(TrainConfig(), tmp_path, torch.device(device), False, 0, 2)):
            raise RuntimeError("Connection closed by peer [127.0.0.1]:1234")
        said = capsys.readouterr().err if device == "cuda" else str(stopped.value)
        assert "process 0 of 2 has lost another one" in said and f"--resume --out {tmp_path}" in said
        assert device == "cpu" or (stopped.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1)


def test_cuda_graphs_are_recorded_for_what_the_loop_calls(base, tmp_path, monkeypatch):
    "Inputs of the loop's shapes, types and layout; the model that everybody else calls keeps its own forward pass."
    seen, called, own, parallel = [], [], [], tinydiff.train.parallel

    def record(model, inputs, allow_unused_input):
        seen.append([(x.shape, x.dtype) for x in inputs])
        plain = model.forward

        def forward(*args):
            called.append([(x.shape, x.dtype) for x in args])
            return plain(*args)

        model.forward = forward
        return model

    monkeypatch.setattr(tinydiff.train, "parallel", lambda stage, model, run: own.append(model) or parallel(stage, model, run))
    monkeypatch.setattr(tinydiff.train, "join_processes", lambda config: (torch.device("cpu"), 0, 1))  # as if it were a GPU
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    plain = train(on(base, out=str(tmp_path / "plain")))
    graphs = train(on(base, cuda_graphs=True, out=str(tmp_path / "graphs")))
    assert len(seen) == 1 and called == seen * 2  # two steps; not the pictures
    assert not any("forward" in vars(model) for model in own)
    assert not differences(plain, graphs, "diffusion")


def test_the_loop_does_not_wait_for_the_device(base, tmp_path, monkeypatch):
    "Numbers are fetched from the device at the steps that print, look or save, and at no other."
    fetched, step = [], [0]

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
                fetched.append(step[0])
            return function(*args, **(kwargs or {}))

    def spied(call):
        def wrapper(*args, **settings):
            with Spy():
                return call(*args, **settings)
        return wrapper

    rate = tinydiff.train.learning_rate
    monkeypatch.setattr(tinydiff.train, "learning_rate", lambda now, *args: step.__setitem__(0, now + 1) or rate(now, *args))
    for owner, name in ((tinydiff.train.DiffusionStage, "loss"), (nn.utils, "clip_grad_norm_"), (Guard, "see"), (Guard, "check"), (tinydiff.train.Muon, "step"), (torch.optim.AdamW, "step"),
                        (EMA, "update"), (tinydiff.train.Progress, "report")):
        monkeypatch.setattr(owner, name, spied(getattr(owner, name)))
    train(on(base, steps=8, log_every=4, sample_every=100, checkpoint_every=6, out=str(tmp_path / "run")))
    assert set(fetched) == {4, 6, 8}


def flags(config):
    "A command line that asks for this configuration."
    default, given = TrainConfig(), dataclasses.asdict(config)
    pairs = [(k, v) for k, v in given.items() if v != getattr(default, k) and k != "out"]
    return [word for k, v in pairs for word in ([f"--{k}"] if v is True else [f"--{k}", str(v)])]


BAD = {
    "unknown data set": (["--dataset", "sceens"], "there is no data set 'sceens'.*scenes"),
    "unknown split": (["--split", "trian"], "trian"),
    "no such folder": (["--dataset", "./nowhere"], "nowhere"),
    "hub without network": (["--dataset", "nobody/nothing"], "nobody/nothing"),
    "unknown scheduler": (["--scheduler", "pndm"], "invalid choice 'pndm'.*ddpm"),
    "unknown preset": (["--preset", "huge"], "unknown preset 'huge'; there are laptop, gpu"),
    "unknown flag": (["--stepz", "3"], "--stepz"),
    "no number": (["--steps", "many"], "--steps.*many"),
    "no value": (["--steps"], "--steps"),
    "out without value": (["--out"], "--out"),
    "0 steps": (["--steps", "0"], "--steps must be at least 1, not 0"),
    "batch of 0": (["--batch_size", "0"], "--batch_size must be at least 1"),
    "negative": (["--num_workers", "-1"], "--num_workers must be at least 0"),
    "huge": (["--batch_size", str(10**20)], "--batch_size must be between 1 and 2147483647"), "huge seed": (["--seed", str(2**63)], "--seed must be between 0 and"),
    "not finite": (["--lr", "nan"], "--lr must be a finite number, not nan"),
    "share": (["--caption_dropout", "1.5"], "--caption_dropout must be between 0 and 1"),
    "flow has no prediction type": (["--prediction_type", "x0"], "--scheduler ddpm"),
    "parts": (["--grad_accum", "7"], "multiple of 7"),
    "device": (["--device", "gpu"], "no device 'gpu'"),
    "graphs without a GPU": (["--cuda_graphs"], "--cuda_graphs needs an NVIDIA GPU"),
    "a sketch for nobody": (["--no_train_text_encoder", "--sketch_weight", "2"], "--sketch_weight is for a text encoder that learns"),
    "a negative sketch": (["--sketch_weight", "-1"], "--sketch_weight must be"),
    "graphs and compile": (["--cuda_graphs", "--compile"], "--cuda_graphs goes neither with --compile"),
    "graphs and parts": (["--cuda_graphs", "--grad_accum", "2"], "--cuda_graphs goes neither with .* nor with --grad_accum"),
    "no VAE": (["--vae", "/nowhere"], "/nowhere"),
    "not a checkpoint": (["--vae", "EMPTY"], "config.json is missing"),
    "half a checkpoint": (["--text_encoder", "HALF"], "tokenizer"),
    "UNet for another VAE": (["--unet", "OTHER"], "do not fit|another architecture"),
    "VAE in stage all": (["--stage", "all"], "--vae.*--stage diffusion"),
    "odd size": (["--image_size", "18"], "--image_size must be a multiple of 4"),
    "resume nothing": (["--resume", "--out", "/nowhere"], "/nowhere"),
    "resume without out": (["--resume"], "--resume needs --out"),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_cost_one_line(base, tmp_path, monkeypatch, capsys, name):
    "Exit status 2, one line that says what is wrong, and nothing is written."
    args, message = BAD[name]
    for folder in ("EMPTY", "HALF", "OTHER"):
        (tmp_path / folder).mkdir()
    shutil.copytree(base / "text_encoder", tmp_path / "HALF/text_encoder")
    wide = tinydiff.train.UNet(dataclasses.replace(SMALL.unet, in_channels=6))
    tinydiff.train.save_component(wide, tmp_path / "OTHER")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    last = [] if "--out" in args or name == "resume without out" else ["--out", tmp_path / "run"]
    status, _, said = run_command(monkeypatch, capsys, tinydiff.train.main, *flags(on(base)), *args, *last)
    assert status == 2, said
    lines = [line for line in said.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) < 500, said
    assert re.search(message, lines[0])
    assert sorted(tmp_path.rglob("*")) == before


def test_emoji_of_odd_size(base, tmp_path, monkeypatch, capsys):
    status, _, said = run_command(monkeypatch, capsys, tinydiff.train.main, "--dataset", "emoji", "--image_size", 301, "--stage", "vae", "--out", tmp_path / "run")
    assert status == 2 and "--image_size must be a multiple of 4" in said and not (tmp_path / "run").exists()
    train(TrainConfig(**QUICK | dict(stage="vae", image_size=18, half_size_every=0, out=str(tmp_path / "run"))))  # nothing is halved once more


def test_folder_that_cannot_be_written(base, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    status, _, said = run_command(monkeypatch, capsys, tinydiff.train.main, *flags(on(base)), "--out", tmp_path / "file/run")
    assert status == 2 and "cannot be written" in said and len(said.strip().splitlines()) == 1


def test_lines_that_are_no_metrics(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"stage": "vae", "step": 1}\n5\n{"a": 1}\n\xff\xfe\n{"stage": "vae", "st')
    assert read_metrics(tmp_path) == [{"stage": "vae", "step": 1}]


def test_a_run_is_not_overwritten(base, monkeypatch, capsys):
    before = (base / "run.json").read_bytes()
    status, _, said = run_command(monkeypatch, capsys, tinydiff.train.main, "--out", base)
    assert status == 2 and "already holds a run" in said and (base / "run.json").read_bytes() == before


@pytest.mark.parametrize("left", ["model_index.json", "checkpoints"])
def test_neither_a_model_nor_checkpoints_alone_are_overwritten(left, base, tmp_path, monkeypatch, capsys):
    "A pipeline that somebody saved there, or a run whose run.json was lost."
    (run := tmp_path / "run").mkdir()
    (shutil.copytree if (base / left).is_dir() else shutil.copy)(base / left, run / left)
    status, _, said = run_command(monkeypatch, capsys, tinydiff.train.main, "--stage", "vae", "--out", run)
    assert status == 2 and "already holds a run or a model" in said and os.listdir(run) == [left]


@pytest.mark.parametrize("change, message", [
    (dict(step=3), "unknown configuration key 'step'; did you mean 'steps'"), (dict(steps="many"), "--steps must be a whole number"),
    (dict(flip=1), "--flip must be bool"), (dict(stage="unet"), "--stage must be one of vae"), (dict(subset_size=-1), "--subset_size"),
    (dict(seed=2**63), "--seed"),
])
def test_stored_configuration_is_checked(base, tmp_path, monkeypatch, capsys, change, message):
    stored = json.loads((base / "run.json").read_text())
    stored["config"] |= change
    (tmp_path / "run.json").write_text(json.dumps(stored))
    status, _, said = run_command(monkeypatch, capsys, tinydiff.train.main, "--resume", "--out", tmp_path)
    assert status == 2 and message in said and len(said.strip().splitlines()) == 1


def test_configuration_survives_json(seed):
    for config in (*PRESETS.values(), TrainConfig(seed=seed, snr_gamma=5.0, scheduler="ddpm", out="there")):
        assert config_from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config
    assert read_config(["--preset", "gpu", "--steps", "7"]) == dataclasses.replace(PRESETS["gpu"], steps=7)
    assert read_config(["--seed=3", "--out=x", "--flip"]) == TrainConfig(seed=3, out="x", flip=True)


def test_checkpoint_of_other_networks(base, tmp_path, monkeypatch, capsys):
    shutil.copytree(base, tmp_path / "run")
    wider = dataclasses.replace(SMALL, unet=dataclasses.replace(SMALL.unet, block_out_channels=(8, 24)))
    monkeypatch.setitem(tinydiff.train.ARCHITECTURES, "tiny", wider)
    status, _, said = run_command(monkeypatch, capsys, tinydiff.train.main, "--resume", "--out", tmp_path / "run")
    assert status == 2 and "is for other networks, or another optimizer" in said


# --- from data to pictures

def picture_folder(folder, captions=1, count=3):
    "A local data set: few pictures, of other sizes and modes than the model's."
    folder.mkdir()
    for i in range(count):
        Image.new("RGBA" if i else "L", (20 + i, 31), (40 * i, 200, 90, 255) if i else 77).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("\n".join(f"caption {j} of picture {i}" for j in range(captions)))
    return folder


@pytest.mark.parametrize("dataset", ["scenes", "emoji", "folder"])
def test_train_then_sample(tmp_path, monkeypatch, capsys, dataset):
    "All stages by the command, then pictures by the other command; a data set smaller than a batch will do."
    name = str(picture_folder(tmp_path / "data")) if dataset == "folder" else dataset
    config = TrainConfig(stage="all", **QUICK | dict(dataset=name, num_workers=1))
    status, said, _ = run_command(monkeypatch, capsys, tinydiff.train.main, *flags(config), "--out", tmp_path / "run")
    assert status == 0 and "tinydiff-sample" in said
    assert {p.name for p in (tmp_path / "run/samples").iterdir()} == {f"{s}-000002.png" for s in ("vae", "clip", "diffusion", "timesteps")}
    args = ["--checkpoint", tmp_path / "run", "--prompt", "a red boat", "", "--steps", "2", "--device", "cpu", "--out", tmp_path / "out"]
    status, said, error = run_command(monkeypatch, capsys, tinydiff.sample.main, *args)
    assert status == 0, error
    images = [Image.open(tmp_path / f"out/{i:03}.png") for i in range(2)]
    assert all(image.size == (16, 16) and len(image.getcolors(256)) > 1 for image in images)


@pytest.mark.parametrize("prediction_type", ["epsilon", "x0", "v_prediction"])
def test_ddpm_then_sample(base, tmp_path, prediction_type):
    run = train(on(base, scheduler="ddpm", prediction_type=prediction_type, out=str(tmp_path / "run")))
    pipe = TextToImage.from_pretrained(run)
    assert pipe.scheduler.prediction_type == prediction_type
    assert pipe("a red boat", num_inference_steps=3)[0].size == (16, 16)


def test_gradient_checkpointing_reaches_the_unet(base, tmp_path):
    for wanted in (False, True):
        run = Run(on(base, grad_checkpoint=wanted), tmp_path, torch.device("cpu"), False)
        stage = tinydiff.train.DiffusionStage(run, open_dataset(run.config), SMALL, load_parts(base, base))
        assert stage.model.unet.gradient_checkpointing is wanted


def test_text_encoder_learns_or_stays(base, tmp_path):
    before = load_text_encoder(base / "text_encoder").state_dict()
    for learns in (False, True):
        run = train(on(base, train_text_encoder=learns, ema_decay=0.0, out=str(tmp_path / str(learns))))
        after = load_text_encoder(run / "text_encoder").state_dict()
        assert before.keys() == after.keys()
        moved = [key for key in before if not torch.equal(before[key], after[key])]
        assert (len(moved) > len(before) / 2) if learns else not moved


def test_a_sketch_is_of_the_caption_alone(rng):
    "Neither the noisy picture nor the timestep changes it; each place and the order of words do; the UNet's answer is what it is without."
    torch.manual_seed(0)
    model = Denoiser(UNet(SMALL.unet), CLIPTextEncoder(SMALL.text), Sketch(SMALL.text, 4, side=6))
    nn.init.normal_(model.unet.conv_out.weight)
    ids = torch.randint(1, 500, (3, 12), generator=rng)
    prediction, sketches = model(torch.randn(3, 4, 8, 8, generator=rng), torch.tensor([3.0, 500.0, 997.0]), ids)
    other, again = model(torch.randn(3, 4, 8, 8, generator=rng), torch.tensor([997.0, 3.0, 500.0]), ids)
    assert sketches.shape == (3, 4, 6, 6) and torch.equal(sketches, again) and not torch.equal(prediction, other)
    turned = model.sketch(model.text_encoder(ids[:, [0, 3, 2, 1, *range(4, 12)]]))
    assert (turned - sketches).abs().amax(dim=(1, 2, 3)).min() > 1e-4
    assert (sketches.flatten(2)[..., :1] - sketches.flatten(2)[..., 1:]).abs().amax(dim=1).min() > 1e-3
    noisy, t = torch.randn(3, 4, 8, 8, generator=rng), torch.full((3,), 400.0)
    assert torch.equal(Denoiser(model.unet, model.text_encoder)(noisy, t, ids)[0], model(noisy, t, ids)[0])


def test_a_sketch_learns_the_mean_of_a_captions_pictures(rng):
    "Two captions of the same words, and pictures that scatter around two means: 300 steps of the sketch and the text encoder."
    torch.manual_seed(0)
    encoder, sketch = CLIPTextEncoder(SMALL.text), Sketch(SMALL.text, 4, side=4)
    ids, means = torch.tensor([[1, 7, 9, 2], [1, 9, 7, 2]]), torch.randn(2, 4, 4, 4, generator=rng)
    optimizer = torch.optim.Adam([*encoder.parameters(), *sketch.parameters()], lr=1e-2)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = learning_rate(step, 300, 1e-2, 20)
        pictures = means + 0.5 * torch.randn(2, 4, 4, 4, generator=rng)
        (sketch(encoder(ids)) - pictures).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (sketch(encoder(ids)) - means).square().mean() < 0.1 * (means[0] - means[1]).square().mean()


@pytest.mark.parametrize("scheduler", ["ddpm", "flow"])
def test_a_sketch_counts_with_its_weight(base, tmp_path, scheduler):
    "It is held against the latents' means, and its gradient reaches the text encoder and not the UNet."
    def loss(weight):
        torch.manual_seed(0)
        run = Run(on(base, sketch_weight=weight, scheduler=scheduler), tmp_path, torch.device("cpu"), False)
        stage = tinydiff.train.DiffusionStage(run, open_dataset(run.config), SMALL, load_parts(base, base))
        return stage, *stage.loss(stage.model, *stage.batch(0))

    (_, none, nothing), (_, one, number), (stage, three, same) = (loss(weight) for weight in (0.0, 1.0, 3.0))
    assert not nothing and torch.equal(number["sketch"], same["sketch"])
    torch.testing.assert_close(torch.stack([one, three]) - none, torch.stack([number["sketch"], 3 * number["sketch"]]), rtol=1e-4, atol=1e-5)
    (three - stage.loss(lambda *args: stage.model(*args)[:1], *stage.batch(0))[0]).backward()
    assert stage.model.text_encoder.token_embedding.weight.grad.norm() > 1e-4 and stage.model.sketch.places.weight.grad.norm() > 1e-4
    assert stage.model.unet.conv_out.weight.grad.norm() < 1e-6

    latents, noise, t, ids = torch.randn(5, 4, 32, 16), *stage.batch(0)[1:]
    noise, means = torch.randn_like(latents), latents.unflatten(2, (8, 4)).unflatten(4, (8, 2)).mean(dim=(3, 5))
    right, numbers = stage.loss(lambda *args: (stage.scheduler.get_target(latents, noise, t), means), latents, noise, t, ids)
    wrong, others = stage.loss(lambda *args: (stage.scheduler.get_target(latents, noise, t), means + 0.5), latents, noise, t, ids)
    assert right < 1e-10 and numbers["sketch"] < 1e-10
    torch.testing.assert_close(torch.stack([wrong, others["sketch"]]), torch.tensor([0.75, 0.25]))


def test_a_sketch_is_for_text_encoders_that_learn(base, tmp_path):
    "It is logged and is among a checkpoint's weights, not among the finished pipeline's; where the encoder stays, or with weight 0, there is none."
    for name, more in (("there", {}), ("stays", dict(train_text_encoder=False)), ("zero", dict(sketch_weight=0.0))):
        run = train(on(base, out=str(tmp_path / name), **more))
        kept = load_file(run / "checkpoints/diffusion/0000002/ema.safetensors")
        assert any(key.startswith("sketch.") for key in kept) == all("sketch" in record for record in read_metrics(run)) == (name == "there")
        assert not any("sketch" in key for part in ("unet", "text_encoder") for file in (run / part).glob("*.safetensors") for key in load_file(file))
        opened = tinydiff.evaluate.open_checkpoint(str(run / "checkpoints/diffusion/0000002/ema.safetensors"))
        assert torch.equal(opened.unet.conv_in.weight, kept["unet.conv_in.weight"])


def test_runs_from_before_the_sketch_go_on(base, tmp_path):
    "Their configuration has no weight for it, and their checkpoints none."
    run = train(on(base, sketch_weight=0.0, out=str(tmp_path / "run")))
    about = json.loads((run / "run.json").read_text())
    del about["config"]["sketch_weight"]
    (run / "run.json").write_text(json.dumps(about))
    train(read_config(["--resume", "--steps", "3", "--out", str(run)]))
    assert len(read_metrics(run)) == 3 and "sketch" not in read_metrics(run)[-1]


def test_start_from_a_unet(base, tmp_path):
    run = train(on(base, unet=str(base), lr=1e-12, out=str(tmp_path / "run")))
    a, b = (load_file(folder / "unet/diffusion_pytorch_model.safetensors") for folder in (base, run))
    assert all(torch.allclose(a[key], b[key], atol=1e-6) for key in a)


def test_metrics_are_drawn(base, tmp_path):
    figure = plot_metrics(base)
    assert [ax.get_title().split(":")[0] for ax in figure.axes] == ["vae", "clip", "diffusion"]
    assert len(figure.axes[2].lines[0].get_xdata()) == 2
    with pytest.raises(FileNotFoundError, match="no run"):
        plot_metrics(tmp_path)


def test_tensorboard(base, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run = train(on(base, tensorboard=True, steps=4, checkpoint_every=2, out=str(tmp_path / "run")))
    shutil.rmtree(run / "checkpoints/diffusion/0000004")
    train(read_config(["--resume", "--out", str(run)]))
    board = EventAccumulator(str(run / "tensorboard/diffusion")).Reload()
    assert [event.step for event in board.Scalars("diffusion/loss")] == [1, 2, 3, 4]
