"Sampling: guidance, seeds, samplers, settings, film strips, and the command line with all that can be asked of it wrongly."
import json
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from small import run_command

import tinydiff.sample
from tinydiff.models.attention import repeat_like
from tinydiff.models.clip import CLIPTextConfig, CLIPTextEncoder, CLIPTokenizer
from tinydiff.models.unet import UNet, UNetConfig
from tinydiff.models.vae import AutoencoderKL, VAEConfig
from tinydiff.sample import (
    BUNDLED, UNETS, SampleConfig, TextToImage, contact_sheet, choose_device, choose_sampler, film_strip, guided_context, is_hub_id,
    latent_shape, main, one_line_errors, part_folder, pick, picture_generators, read_settings, sample, start_noise, started,
)
from tinydiff.schedulers.flow_matching import make_scheduler

torch.set_num_threads(1)
PROMPTS = ["a red boat at night", "a small cabin in the woods", "three yellow stars"]
TOKENIZER = CLIPTokenizer.train(3 * PROMPTS, vocab_size=600, max_length=16)
N = len(TOKENIZER.vocab)
UNET = UNetConfig(sample_size=8, block_out_channels=(16, 32), cross_attention=(True, False), num_heads=4, cross_attention_dim=32, norm_num_groups=8)
VAE = VAEConfig(block_out_channels=(8, 16), norm_num_groups=4, sample_size=16, scaling_factor=0.8)
TEXT = CLIPTextConfig(vocab_size=N, hidden_size=32, intermediate_size=64, num_hidden_layers=2, max_position_embeddings=16, projection_dim=32)
FAMILY_OF = {"ddpm": "ddpm", "ddim": "ddpm", "flow": "flow", "heun": "flow"}
each_sampler = pytest.mark.parametrize("sampler", FAMILY_OF)


@torch.no_grad()
def randomize(model, rng):
    "Fresh values in every parameter; zero convolutions and norms too."
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=rng)
        parameter.copy_(noise / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.1 * noise + (parameter == 1).float())
    return model.eval()


def make_pipe(rng, sampler="flow"):
    models = (randomize(UNet(UNET), rng), randomize(AutoencoderKL(VAE), rng), randomize(CLIPTextEncoder(TEXT), rng))
    return TextToImage(*models, TOKENIZER, choose_sampler(make_scheduler(FAMILY_OF[sampler]), sampler))


@pytest.fixture
def pipe(rng):
    "A small pipeline with random weights, which draws 16-pixel pictures that depend on the prompt."
    return make_pipe(rng)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Such a pipeline, saved."
    path = tmp_path_factory.mktemp("saved") / "model"
    make_pipe(torch.Generator().manual_seed(0)).save_pretrained(path)
    return path


def pixels(image):
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).int()


def apart(a, b):
    "The largest difference of any pixel, in levels of 255."
    return (pixels(a) - pixels(b)).abs().max().item()


def last(states):
    *_, state = states
    return state


class Straight(torch.nn.Module):
    "A UNet that knows the end of every road: the velocity to clean latents that depend on the text alone."
    config, asked = UNET, 0

    def __init__(self):
        super().__init__()
        self.conv_in = torch.nn.Conv2d(4, 1, 1)

    def end(self, context):
        return context[:, 1:5, :8].mean(2)[..., None, None].expand(-1, -1, 8, 8)

    def forward(self, x, t, context):
        self.asked += 1
        return (repeat_like(x, context) - self.end(context)) / (t / 1000)


# --- the loop against an exact model

@pytest.mark.parametrize("sampler", ["flow", "heun"])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_an_exact_model_is_followed_to_the_end(sampler, steps, rng, seed):
    "Straight roads end where the model says, from any noise, in any number of steps; and the picture is the decoded end."
    pipe = make_pipe(rng, sampler)
    pipe.unet = Straight()
    context, empty = pipe.encode_prompt(PROMPTS), pipe.encode_prompt([""])
    end, nothing = pipe.unet.end(context), pipe.unet.end(empty)
    for w in (0, 1, 2.5):
        states = list(pipe.stream(PROMPTS, num_inference_steps=steps, guidance_scale=w, seed=seed))
        torch.testing.assert_close(states[-1].latents, nothing + w * (end - nothing), rtol=1e-4, atol=1e-4)
        for state in states:
            torch.testing.assert_close(state.pred_original_sample, nothing + w * (end - nothing), rtol=1e-3, atol=1e-3)
        drawn = pipe(PROMPTS, num_inference_steps=steps, guidance_scale=w, seed=seed)
        assert [a.tobytes() for a in drawn] == [a.tobytes() for a in pipe.decode(states[-1].latents)]


def test_the_model_is_asked_no_more_than_needed(rng):
    pipe = make_pipe(rng)
    for sampler, steps, asked in [("flow", 5, 5), ("heun", 5, 9)]:
        pipe.scheduler, pipe.unet = choose_sampler(pipe.scheduler, sampler), Straight()
        pipe(PROMPTS, num_inference_steps=steps)
        assert pipe.unet.asked == asked


# --- guidance

@torch.no_grad()
def walk_by_hand(pipe, prompts, steps, seed):
    "The plain conditional loop."
    scheduler, generators = started(pipe.scheduler, steps), [torch.Generator().manual_seed(seed) for _ in prompts]
    x, context = start_noise((4, 8, 8), generators), pipe.text_encoder(pipe.tokenizer(prompts))
    for t in scheduler.timesteps:
        x = scheduler.step(pipe.unet(x, t, context), t, x, generators).prev_sample
    return x


@each_sampler
def test_scale_1_is_conditional_and_0_unconditional(sampler, rng, seed):
    pipe = make_pipe(rng, sampler)
    settings = dict(num_inference_steps=3, seed=seed)
    conditional, unconditional = walk_by_hand(pipe, PROMPTS, 3, seed), walk_by_hand(pipe, ["", "", ""], 3, seed)
    assert (conditional - unconditional).abs().max() > 0.01  # the text matters
    torch.testing.assert_close(last(pipe.stream(PROMPTS, guidance_scale=1, **settings)).latents, conditional)
    torch.testing.assert_close(last(pipe.stream(PROMPTS, guidance_scale=0, **settings)).latents, unconditional, rtol=1e-4, atol=1e-4)


def test_guidance_leads_on_along_the_difference(pipe, seed):
    "After one step the latents are a straight line in w."
    x = [last(pipe.stream(PROMPTS, guidance_scale=w, num_inference_steps=1, seed=seed)).latents for w in (0, 1, 3)]
    torch.testing.assert_close(x[2], x[0] + 3 * (x[1] - x[0]), rtol=1e-3, atol=1e-3)
    assert (x[1] - x[0]).abs().max() > 0.01


def test_negative_prompts(pipe, seed):
    settings = dict(num_inference_steps=3, seed=seed)
    plain = last(pipe.stream(PROMPTS[0], guidance_scale=1, **settings)).latents
    away_from_itself = last(pipe.stream(PROMPTS[0], negative_prompt=PROMPTS[0], guidance_scale=5, **settings)).latents
    torch.testing.assert_close(away_from_itself, plain, rtol=1e-3, atol=1e-3)  # c + w (c - c)
    nowhere, elsewhere = (last(pipe.stream(PROMPTS[0], negative_prompt=n, **settings)).latents for n in ("", PROMPTS[1]))
    assert (nowhere - elsewhere).abs().max() > 0.01
    only_negative = last(pipe.stream(PROMPTS[0], negative_prompt=PROMPTS[1], guidance_scale=0, **settings)).latents
    torch.testing.assert_close(only_negative, last(pipe.stream(PROMPTS[1], guidance_scale=1, **settings)).latents, rtol=1e-3, atol=1e-3)


def test_empty_texts_come_first():
    context, negative = torch.ones(3, 2, 4), torch.zeros(1, 2, 4)
    assert guided_context(context, negative, 2.0)[:, 0, 0].tolist() == [0, 0, 0, 1, 1, 1]
    assert guided_context(context, negative, 1) is context


# --- seeds

@each_sampler
def test_the_same_seed_alone_and_in_a_batch(sampler, rng, seed):
    "Also where fresh noise is drawn on the way."
    pipe, steps = make_pipe(rng, sampler), dict(num_inference_steps=4)
    batch = pipe(PROMPTS, num_images=3, seed=seed, **steps)
    assert len(batch) == 9 and all(image.size == (16, 16) and image.mode == "RGB" for image in batch)
    for prompt, i in [(0, 0), (1, 2), (2, 1)]:
        alone, = pipe(PROMPTS[prompt], seed=seed + i, **steps)
        assert apart(alone, batch[3 * prompt + i]) <= 1
        assert apart(alone, batch[3 * prompt + (i + 1) % 3]) > 1 < apart(alone, batch[(3 * prompt + 3 + i) % 9])
    assert batch[0].tobytes() == pipe(PROMPTS, num_images=3, seed=seed, **steps)[0].tobytes()


def test_a_step_takes_a_list_of_generators(seed):
    scheduler, x, out = started(make_scheduler("ddpm"), 4), torch.zeros(3, 4, 8, 8), torch.zeros(3, 4, 8, 8)
    make = lambda: [torch.Generator().manual_seed(seed + i) for i in range(3)]
    t = scheduler.timesteps[0]
    three, third = scheduler.step(out, t, x, make()).prev_sample, scheduler.step(out[:1], t, x[:1], make()[2:]).prev_sample
    assert torch.equal(three[2], third[0]) and not torch.equal(three[1], three[2])
    assert torch.equal(scheduler.step(out, t, x, tuple(make())).prev_sample, three)
    for n in (0, 1, 2):
        with pytest.raises(ValueError, match=f"3 rows need as many generators; got {n}"):
            scheduler.step(out, t, x, make()[:n])


def test_sampling_leaves_the_global_generator_alone(pipe):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    pipe(PROMPTS[0], num_inference_steps=2)
    assert torch.equal(before, torch.get_rng_state())


# --- the stream

@each_sampler
def test_states(sampler, rng, seed):
    pipe = make_pipe(rng, sampler)
    states = list(pipe.stream(PROMPTS, num_inference_steps=5, seed=seed))
    assert [s.step for s in states] == list(range(1, 10 if sampler == "heun" else 6))
    assert [s.timestep for s in states] == started(pipe.scheduler, 5).timesteps.tolist()
    assert {s.latents.shape for s in states} == {s.pred_original_sample.shape for s in states} == {(3, 4, 8, 8)}
    torch.testing.assert_close(states[-1].latents, states[-1].pred_original_sample)  # the clean end
    assert not any(s.latents.requires_grad for s in states)
    assert len({s.latents.sum().item() for s in states}) == len(states)


def test_decode_undoes_what_encoding_does(pipe, rng):
    "Latents of a picture, scaled as the UNet knows them, come back as the autoencoder's own reconstruction."
    images = torch.rand(2, 3, 16, 16, generator=rng) * 2 - 1
    with torch.no_grad():
        mean = pipe.vae.encode(images).mean
        expected = ((pipe.vae.decode(mean) + 1) * 127.5).round().clamp(0, 255)
    for image, right in zip(pipe.decode(mean * pipe.vae.config.scaling_factor), expected):
        assert (pixels(image).view(16, 16, 3) - right.permute(1, 2, 0)).abs().max() <= 1


@each_sampler
def test_streams_do_not_disturb_each_other(sampler, rng, seed):
    "Two at once on one pipeline, of different lengths, and the pipeline's scheduler as it was."
    pipe = make_pipe(rng, sampler)
    before = pipe.scheduler.timesteps.clone()
    alone = [last(pipe.stream(p, num_inference_steps=n, seed=seed)).latents for p, n in zip(PROMPTS, (3, 5))]
    both = [pipe.stream(p, num_inference_steps=n, seed=seed) for p, n in zip(PROMPTS, (3, 5))]
    ends = [None, None]
    while both[1]:
        for i, states in enumerate(both):
            if states and (state := next(states, None)) is None: both[i] = None
            elif states: ends[i] = state.latents
    assert all(torch.equal(a, b) for a, b in zip(ends, alone))
    assert torch.equal(pipe.scheduler.timesteps, before)


def test_other_sizes(pipe):
    assert pipe(PROMPTS[0], num_inference_steps=1, height=24, width=32)[0].size == (32, 24)
    assert latent_shape(pipe.unet, pipe.vae) == (4, 8, 8)


def test_progress_counts_calls(pipe, capsys):
    pipe.scheduler = choose_sampler(pipe.scheduler, "heun")
    pipe(PROMPTS[0], num_inference_steps=3, progress=True)
    assert "5/5" in capsys.readouterr().err


BAD_SETTINGS = {
    "no steps": dict(num_inference_steps=0), "half a step": dict(num_inference_steps=1.5), "yes steps": dict(num_inference_steps=True),
    "no images": dict(num_images=0), "odd height": dict(height=17), "odd width": dict(width=30), "no height": dict(height=0),
    "height -16": dict(height=-16), "float height": dict(height=16.0), "scale nan": dict(guidance_scale=float("nan")),
    "scale inf": dict(guidance_scale=float("inf")), "scale text": dict(guidance_scale="4"), "seed -1": dict(seed=-1),
    "seed 2^63": dict(seed=2**63), "seed 0.5": dict(seed=0.5), "no prompts": dict(prompt=[]), "prompt 7": dict(prompt=7),
    "prompt None": dict(prompt=[None]), "prompt bytes": dict(prompt=b"boat"),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_bad_settings_are_refused_at_once(name, pipe):
    "In one line, when the stream is made, before the model is asked."
    pipe.unet = Straight()
    for method in (pipe, pipe.stream):
        with pytest.raises(ValueError) as error:
            method(**{"prompt": "a boat", **BAD_SETTINGS[name]})
        assert "\n" not in str(error.value) and 20 < len(str(error.value)) < 200
    assert pipe.unet.asked == 0


def test_more_steps_than_a_ddpm_model_has(rng):
    with pytest.raises(ValueError):
        make_pipe(rng, "ddpm")("a boat", num_inference_steps=1001)


def test_unknown_settings_are_refused(pipe):
    with pytest.raises(TypeError, match="num_steps"):
        pipe("a boat", num_steps=3)


@pytest.mark.parametrize("prompt", ["", " ", "\n\t", "zyxwvut qqq", "\U0001f469\u200d\U0001f680 \u26f5 \u65e5\u672c\u8a9e", "boat " * 2000, "x" * 10_000, "<|endoftext|>", "\x00"],
                         ids=lambda prompt: ascii(prompt)[:20])
def test_any_text_is_a_prompt(prompt, pipe):
    image, = pipe(prompt, negative_prompt=prompt[::-1], num_inference_steps=1)
    assert image.size == (16, 16)


@pytest.mark.parametrize("wrong", [None, ["a"], ["a", "b"]])
def test_one_negative_prompt_for_all(pipe, wrong):
    with pytest.raises(ValueError, match="negative_prompt must be one text"): pipe.stream(["a", "b"], negative_prompt=wrong)


def test_half_a_character_is_read_as_a_question_mark(pipe):
    assert torch.equal(pipe.tokenizer(["a boat \ud83d"]), pipe.tokenizer(["a boat ?"]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(folder, dtype):
    pipe = TextToImage.from_pretrained(folder).to(dtype)
    assert pipe("a boat", num_inference_steps=2)[0].size == (16, 16)
    *_, last = pipe.stream("a boat", num_inference_steps=2)
    assert last.latents.dtype == torch.float32


def test_bfloat16_hardly_changes_a_picture():
    pipes = [TextToImage.from_pretrained("tiny", dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    whole, rounded = (np.asarray(pipe("a red boat at night", num_inference_steps=6, seed=3)[0], float) for pipe in pipes)
    assert 0 < np.abs(whole - rounded).mean() < 8 < np.abs(whole - whole.mean((0, 1))).mean()


def test_a_pixels_channels_lie_together(folder):
    "On a CPU, whatever moved or rounded the networks since; and the picture is that of the usual layout."
    pipe = TextToImage.from_pretrained(folder)
    for moved in (pipe, TextToImage.from_pretrained(folder, dtype=torch.bfloat16), TextToImage.from_pretrained(folder).to("cpu", torch.float64)):
        for network in (moved.unet, moved.vae):
            assert all(w.is_contiguous(memory_format=torch.channels_last) for w in network.parameters() if w.ndim == 4)
    elsewhere = TextToImage.from_pretrained(folder).to("meta")
    assert all(w.is_contiguous() for network in (elsewhere.unet, elsewhere.vae) for w in network.parameters())
    usual = TextToImage.from_pretrained(folder)
    for network in (usual.unet, usual.vae): network.to(memory_format=torch.contiguous_format)
    a, b = (last(p.stream("a boat", num_inference_steps=2)).latents for p in (pipe, usual))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_too_many_pictures_at_once(cli, folder, monkeypatch):
    def fail(*args, **settings): raise RuntimeError("[enforce fail at alloc_cpu.cpp:125] DefaultCPUAllocator: can't allocate memory")
    monkeypatch.setattr(TextToImage, "__call__", fail)
    code, _, said = cli("--prompt", "a", "b", "--num_images", 50, "--checkpoint", folder)
    assert code == 2 and "100 pictures at once need more memory than cpu has: lower --num_images" in said


def test_samplers_of_another_family_are_refused():
    for family, name in [("flow", "ddpm"), ("flow", "ddim"), ("ddpm", "heun"), ("ddpm", "flow"), ("flow", "euler")]:
        with pytest.raises(ValueError, match=f"not with {name}"):
            choose_sampler(make_scheduler(family), name)
    assert choose_sampler(make_scheduler("ddpm", prediction_type="x0"), "ddim") == make_scheduler("ddpm", prediction_type="x0", eta=0.0)
    assert choose_sampler(make_scheduler("flow", shift=2.0), None) == make_scheduler("flow", shift=2.0)


# --- checkpoints

def test_hub_ids():
    yes, no = ("org/name", "stable-diffusion-v1-5/stable-diffusion-v1-5", "a.b/c.d"), ("tiny", "./name", "../name", "/org/name", "a/b/c", "org/", "", "~/x", "a b/c")
    assert all(map(is_hub_id, yes)) and not any(map(is_hub_id, no))
    assert not is_hub_id("tests/test_sample.py") or not Path("tests/test_sample.py").exists()


def test_a_hub_id_is_fetched_once(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(tinydiff.sample, "fetch", lambda *args: asked.append(args) or folder)
    assert TextToImage.from_pretrained("org/name", revision="abc").unet.config == UNET
    assert asked == [("org/name", "abc")]
    assert part_folder("org/name", "vae") == folder / "vae"


def test_a_folder_comes_before_the_hub(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(tinydiff.sample, "fetch", lambda *args: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name").symlink_to(folder)
    TextToImage.from_pretrained("org/name")
    with pytest.raises(ValueError, match="revision"):
        TextToImage.from_pretrained("org/name", revision="abc")
    with pytest.raises(ValueError, match="revision"):
        TextToImage.from_pretrained("tiny", revision="abc")


def test_what_is_missing_is_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a folder, nor a hub id, nor one of tiny, tiny-ddpm, tiny-128"):
        TextToImage.from_pretrained("huge")
    (tmp_path / "unet").mkdir()
    with pytest.raises(FileNotFoundError, match="not a complete checkpoint: vae, text_encoder, tokenizer, scheduler missing"):
        TextToImage.from_pretrained(tmp_path)


def test_parts_that_do_not_fit_make_no_pipeline(pipe, rng):
    other = randomize(UNet(UNetConfig(**{**UNET.__dict__, "cross_attention_dim": 40})), rng)
    with pytest.raises(ValueError, match="do not fit"):
        TextToImage(other, pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.scheduler)


@pytest.mark.parametrize("name", UNETS)
def test_bundled_models_draw(name):
    pipe, size = TextToImage.from_pretrained(name), (128, 128) if name == "tiny-128" else (64, 64)
    assert type(pipe.scheduler) is type(make_scheduler(UNETS[name].split("-")[0]))
    a, b = pipe([PROMPTS[0], PROMPTS[1]], num_inference_steps=4)
    assert a.size == size and apart(a, b) > 30 and pixels(a).float().std() > 10


# --- pictures of pictures

def test_contact_sheet(pipe):
    images = [Image.new("RGB", (64, 64), color) for color in ("red", "green", "blue")]
    sheet = contact_sheet(images, ["", "\U0001f600\n\n", "long " * 2000], columns=2)
    assert sheet.width == 2 * 136 + 8 and sheet.height < 2 * 220
    middles = [(8 + 64, 8 + 64), (8 + 136 + 64, 8 + 64)]
    assert [sheet.getpixel(xy) for xy in middles] == [(255, 0, 0), (0, 128, 0)]
    assert contact_sheet([Image.new("RGB", (512, 512))], ["big"]).width == 512 + 16


def test_film_strip(pipe, seed):
    "Above the latents after a step, below what the model saw then; decoded in one go."
    states, asked = list(pipe.stream(PROMPTS, num_inference_steps=9, seed=seed)), []
    strip = film_strip(states, lambda latents: asked.append(latents) or pipe.decode(latents), moments=4, index=1)
    chosen = [states[i] for i in (0, 3, 5, 8)]
    assert len(asked) == 1
    assert torch.equal(asked[0], torch.stack([s.latents[1] for s in chosen] + [s.pred_original_sample[1] for s in chosen]))
    assert strip.size[0] == film_strip(iter(states), pipe.decode, moments=4).size[0]
    assert film_strip(states[:1], pipe.decode).size[0] < strip.size[0]


def test_pick(rng):
    items = list(range(int(torch.randint(3, 60, (), generator=rng))))
    for count in range(2, len(items) + 3):
        chosen = pick(items, count)
        assert len(chosen) == min(count, len(items)) and chosen == sorted(set(chosen)) and (chosen[0], chosen[-1]) == (0, items[-1])


# --- the command line

@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    return lambda *args: run_command(monkeypatch, capsys, main, *args)


def test_one_picture_knows_how_it_was_made(cli, folder, tmp_path):
    code, out, _ = cli("--prompt", "a red \u26f5", "--checkpoint", folder, "--steps", 2, "--seed", 5, "--guidance_scale", 2.5, "--negative_prompt", "night",
                       "--scheduler", "heun", "--out", "deep/er/boat.png")
    assert code == 0 and out == "1 picture -> deep/er/boat.png\n"
    assert [path.name for path in (tmp_path / "deep" / "er").iterdir()] == ["boat.png"]
    settings = read_settings("deep/er/boat.png")
    assert settings["prompt"] == "a red \u26f5" and settings["seed"] == 5 and settings["guidance_scale"] == 2.5
    again = sample(SampleConfig(**settings | {"prompt": (settings["prompt"],), "out": "again.png"}))
    assert Image.open(again).tobytes() == Image.open("deep/er/boat.png").tobytes()
    direct = TextToImage.from_pretrained(folder)
    direct.scheduler = choose_sampler(direct.scheduler, "heun")
    assert apart(direct("a red \u26f5", negative_prompt="night", num_inference_steps=2, guidance_scale=2.5, seed=5)[0], Image.open(again)) <= 1


def test_several_pictures(cli, folder, tmp_path):
    common = ("--checkpoint", folder, "--steps", 1, "--num_images", 2, "--seed", 3, "--prompt", "a", "b")
    assert cli(*common, "--out", "sheet.png")[:2] == (0, "4 pictures -> sheet.png\n")
    assert [(p["prompt"], p["seed"]) for p in read_settings("sheet.png")["pictures"]] == [("a", 3), ("a", 4), ("b", 3), ("b", 4)]
    assert cli(*common, "--out", "folder")[0] == cli(*common, "--out", "v1.0/")[0] == 0
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["000.png", "001.png", "002.png", "003.png"]
    third = Image.open(tmp_path / "folder" / "002.png")
    assert read_settings(tmp_path / "folder" / "002.png")["prompt"] == "b" and third.size == (16, 16)
    assert apart(third, TextToImage.from_pretrained(folder)("b", num_inference_steps=1, seed=3)[0]) <= 1
    assert (tmp_path / "v1.0" / "003.png").is_file()


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".webp", ".PNG"])
def test_picture_formats(suffix, cli, folder):
    assert cli("--prompt", "", "--checkpoint", folder, "--steps", 1, "--out", f"a{suffix}")[0] == 0
    assert Image.open(f"a{suffix}").size == (16, 16)


@pytest.mark.parametrize("prompt", ["", "\U0001f469\u200d\U0001f680", "zyxwvut", "boat " * 2000])
def test_any_prompt_on_the_command_line(prompt, cli, folder):
    assert cli("--prompt", prompt, "a", "--checkpoint", folder, "--steps", 1, "--out", "a.png")[0] == 0
    assert read_settings("a.png")["pictures"][0]["prompt"] == prompt


def test_help_is_no_error(cli):
    code, out, err = cli("--help")
    assert code == 0 and "--guidance_scale" in out and "--prompt" in out and not err


BAD_FLAGS = {
    "unknown flag": (["--stps", 3], "Unrecognized options: --stps"), "unknown sampler": (["--scheduler", "euler"], "invalid choice 'euler'"), "steps 0": (["--steps", 0], "error: steps must be"),
    "steps -1": (["--steps", -1], "steps must be"), "steps x": (["--steps", "x"], "parsing --steps"), "no images": (["--num_images", 0], "num_images"),
    "odd ending": (["--out", "x/a.xyz"], ".xyz"), "no such writer": (["--out", "a.psd"], ".psd"), "seed": (["--seed", -1], "seed"),
    "scale": (["--guidance_scale", "nan"], "guidance_scale"), "size": (["--height", 17], "multiples of 4"), "missing": (["--checkpoint", "nowhere"], "nowhere"),
    "other family": (["--scheduler", "ddpm"], "not with ddpm"), "device": (["--device", "abacus"], "abacus"),
    "revision": (["--revision", "abc"], "revision"),
}


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_bad_flags(name, cli, folder, tmp_path):
    "One clear line, exit status 2, nothing written."
    flags, words = BAD_FLAGS[name]
    code, out, err = cli("--prompt", "a boat", "--checkpoint", folder, "--out", "new/a.png", *flags)
    assert code == 2 and not out
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err and len(err) < 400, err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("out", ["taken/a.png", "taken/", "taken/more/a.png"])
def test_a_place_that_cannot_be_written(out, cli, folder, tmp_path, monkeypatch):
    "Is noticed before anything is drawn."
    (tmp_path / "taken").touch()
    monkeypatch.setattr(TextToImage, "stream", lambda *args, **settings: pytest.fail("it draws"))
    code, _, err = cli("--prompt", "a boat", "--checkpoint", folder, "--out", out)
    assert code == 2 and err == f"error: --out {out} cannot be written: taken is no folder\n"


def test_a_sheet_too_large_for_its_format(cli, folder, tmp_path, monkeypatch):
    "WebP's sides end at 16,383 pixels: then it is a PNG, and nothing that was drawn is lost."
    monkeypatch.setattr(tinydiff.sample, "contact_sheet", lambda images, captions: Image.new("RGB", (8, 16_384)))
    code, out, _ = cli("--prompt", "a", "b", "--checkpoint", folder, "--steps", 1, "--out", "a.webp")
    assert (code, out) == (0, "2 pictures -> a.webp.png\n") and [path.name for path in tmp_path.glob("a.*")] == ["a.webp.png"]


@pytest.mark.parametrize("again", [("--prompt", "b"), ("--prompt=b",)])
def test_prompts_in_two_places(again, cli, folder):
    code, _, err = cli("--prompt", "a", "--checkpoint", folder, *again)
    assert code == 2 and err == "error: --prompt is there 2 times: give all its values after one\n"


def test_a_prompt_that_is_cut_says_so(cli, folder):
    common = ("--checkpoint", folder, "--steps", 1, "--out", "a.png", "--prompt", "a red boat")
    assert "note:" not in cli(*common)[2]
    code, _, err = cli(*common, "a red boat at night " * 20)
    assert code == 0 and "note: of 'a red boat at night a red boat" in err and "the model reads no more than 'a red boat at night" in err and err.count("note:") == 1


def test_home_is_where_it_is_looked_for(cli, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cli("--prompt", "a", "--checkpoint", folder, "--steps", 1, "--out", "~/pictures/a.png")[0] == 0
    assert (tmp_path / "home/pictures/a.png").is_file() and not (tmp_path / "~").exists()


def test_a_stream_that_is_left_early_leaves_no_trace(folder):
    "Python closes its generator at the very end, when torch is half gone."
    code = (f"from tinydiff.sample import TextToImage\nstates = TextToImage.from_pretrained({str(folder)!r}).stream('a', num_inference_steps=3)\n"
            "print(next(states).latents.requires_grad)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")


def test_a_compiled_network_can_be_saved(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "as it is")
    pipe.vae = torch.compile(pipe.vae, backend="eager")
    pipe.save_pretrained(tmp_path / "compiled")
    name = "vae/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "compiled" / name).read_bytes() == (tmp_path / "as it is" / name).read_bytes()


@pytest.mark.parametrize("module", ["sample", "playground"])
def test_commands_run_as_modules(module):
    done = subprocess.run([sys.executable, "-m", f"tinydiff.{module}", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "usage:" in done.stdout


def test_a_prompt_alone_is_one_prompt():
    assert SampleConfig("a boat") == SampleConfig(("a boat",))


def test_numbers_of_numpy(pipe, folder, tmp_path):
    import numpy as np
    of_numpy = lambda settings: {name: {int: np.int64, float: np.float32}[type(value)](value) for name, value in settings.items()}
    settings = dict(num_inference_steps=2, guidance_scale=2.5, seed=3, height=16, num_images=2)
    assert [image.tobytes() for image in pipe("a", **of_numpy(settings))] == [image.tobytes() for image in pipe("a", **settings)]
    settings = dict(steps=2, guidance_scale=2.5, seed=3, num_images=2)
    sheet = sample(SampleConfig("a", checkpoint=str(folder), out=str(tmp_path / "a.png"), **of_numpy(settings)))
    assert read_settings(sheet)["pictures"][1]["seed"] == 4


@pytest.mark.parametrize("flags", [[], ["--prompt"], ["--out", "a.png"]])
def test_a_prompt_is_needed(flags, cli, tmp_path):
    code, _, err = cli(*flags)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and "prompt" in err
    assert not list(tmp_path.iterdir())


def test_bad_checkpoints_on_the_command_line(cli, folder, tmp_path, monkeypatch):
    import shutil
    for change in ("incomplete", "other architecture", "damaged", "hub"):
        bad = shutil.copytree(folder, tmp_path / change.replace(" ", "-"))
        if change == "incomplete": shutil.rmtree(bad / "vae")
        if change == "damaged": (bad / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"<html>")
        if change == "other architecture": (bad / "unet" / "config.json").write_text(json.dumps(json.loads((bad / "unet" / "config.json").read_text()) | {"act_fn": "gelu"}))
        if change == "hub": monkeypatch.setenv("HF_HUB_OFFLINE", "1"); bad = "nobody/nothing"
        code, out, err = cli("--prompt", "a", "--checkpoint", bad, "--out", "made/a.png")
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and not (tmp_path / "made").exists()
        assert str(bad) in err


def test_a_file_where_the_folder_should_be(cli, folder, tmp_path):
    (tmp_path / "taken").write_text("")
    for out in ("taken/a.png", "taken"):
        code, _, err = cli("--prompt", "a", "--checkpoint", folder, "--steps", 1, "--out", out)
        assert code == 2 and err.startswith("error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"] and not (tmp_path / "taken").read_text()


def test_a_failed_write_leaves_the_old_picture(cli, folder, monkeypatch, tmp_path):
    assert cli("--prompt", "a", "--checkpoint", folder, "--steps", 1, "--out", "a.png")[0] == 0
    before = Path("a.png").read_bytes()
    monkeypatch.setattr(Image.Image, "save", lambda self, file, *args, **kwargs: file.write(b"half") and (_ for _ in ()).throw(OSError("disk full")))
    code, _, err = cli("--prompt", "b", "--checkpoint", folder, "--steps", 1, "--out", "a.png")
    assert code == 2 and "disk full" in err and Path("a.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_errors_of_our_own_are_not_hidden(capsys):
    def fail(error): raise error
    for error, code in [(ValueError("a\nb"), 2), (FileNotFoundError("x"), 2), (torch.OutOfMemoryError("y"), 2), (KeyboardInterrupt(), 130)]:
        with pytest.raises(SystemExit) as stop: one_line_errors(lambda: fail(error))()
        assert stop.value.code == code
        assert capsys.readouterr().err == ("" if code == 130 else f"error: {' '.join(str(error).split())}\n")
    with pytest.raises(ZeroDivisionError): one_line_errors(lambda: 1 / 0)()


def test_devices():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device().type in ("cpu", "cuda")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no device 'cuda'"): choose_device("cuda")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="no memory is left on device cpu"):
        patch.setattr(torch, "zeros", Mock(side_effect=torch.OutOfMemoryError))
        choose_device("cpu")


def test_the_installed_command(folder, tmp_path):
    "A process of its own: what is on stderr is one line and not a traceback."
    run = lambda *args: subprocess.run([str(Path(sys.executable).parent / "tinydiff-sample"), *map(str, args)], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    done = run("--prompt", "a", "--checkpoint", folder, "--steps", 1)
    assert done.returncode == 0 and done.stdout == "1 picture -> sample.png\n" and (tmp_path / "sample.png").is_file()
    done = run("--prompt", "a", "--steps", "0")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_sides_and_precision_of_the_command(cli, folder):
    "What is not square, and what is rounded."
    draw = lambda name, *flags: cli("--prompt", "a", "--checkpoint", folder, "--steps", "1", "--out", name, *flags)
    for name, *flags in (("wide", "--height", "16", "--width", "32"), ("fp32", "--precision", "fp32"), ("bf16", "--precision", "bf16")):
        assert draw(f"{name}.png", *flags)[0] == 0
    assert Image.open("wide.png").size == (32, 16)
    assert Image.open("fp32.png").tobytes() != Image.open("bf16.png").tobytes()


def test_a_home_of_models(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(folder)
    TextToImage.from_pretrained("~/model").save_pretrained("~/other")
    assert (tmp_path / "other/model_index.json").is_file() and not (tmp_path / "~").exists()


def test_latents_that_are_no_numbers(pipe):
    with pytest.raises(ValueError, match="no finite numbers"):
        pipe.decode(torch.full((1, 4, 8, 8), torch.nan))


def test_a_picture_is_written_whole(tmp_path, monkeypatch):
    "A full disk leaves the picture that was there."
    write, path = Path.write_bytes, tmp_path / "a.png"
    path.write_bytes(b"old")

    def half(self, content):
        write(self, content[:10])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="disk full"):
        tinydiff.sample.write_image(Image.new("RGB", (8, 8)), {}, path)
    assert path.read_bytes() == b"old"


def test_a_film_strip_says_steps_and_times(pipe, monkeypatch):
    said, states = [], list(pipe.stream("a", num_inference_steps=4))
    monkeypatch.setattr(tinydiff.sample, "contact_sheet", lambda images, captions, columns: said.extend(captions))
    tinydiff.sample.film_strip(states, pipe.decode)
    assert said[0] == "x after step 1" and said[4:] == [f"x_0 from t = {t}" for t in (1000, 750, 500, 250)]


def test_the_bar_has_as_many_steps_as_the_walk(pipe, capsys):
    pipe("a", progress=True)
    assert "25/25" in capsys.readouterr().err
