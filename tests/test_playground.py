"The playground without a browser: pictures from pictures, maps, the worker, and every button."
import base64
import html
import json
import re
import sys
import time
from io import BytesIO

import pytest
import torch
from PIL import Image

from tinydiff import scenes
from tinydiff.playground import (
    CHECKPOINTS, AppConfig, Models, Playground, Worker, advance, between, last, last_part, new_run, pictures_html, prompt_words, repaint,
    picture_latents, same_seed, show_step, show_word, side_by_side, slerp, voila_arguments, walked_with, watch_attention, word_map, write_notebook,
)
from tinydiff.sample import SampleConfig, SampleState, picture_generators, read_settings, start_noise, start_app, started


@pytest.fixture(scope="module")
def models():
    return Models()


def asked(prompt="a red boat at night", **settings):
    return SampleConfig((prompt,), scheduler=settings.pop("scheduler", "flow"), steps=settings.pop("steps", 3), **settings)


def finish(playground):
    "Wait for what runs; the message of the page."
    playground.worker.thread.join(60)
    assert not playground.worker.thread.is_alive()
    return html.unescape(re.sub("<.*?>", "", playground.stage.status.value))


# --- functions

@pytest.mark.parametrize("scheduler", CHECKPOINTS)
def test_repaint_keeps_what_is_not_marked(models, scheduler, rng, seed):
    "Outside a random mask the latents are the picture's own, to the bit, whatever the sampler."
    pipe, image = models(scheduler), scenes.render(scenes.parse("a red boat in a meadow"), 64, seed % 100)
    mask = torch.rand(16, 16, generator=rng) < 0.5
    *_, end = repaint(pipe, asked(scheduler=scheduler, seed=seed), image, 1.0, mask)
    clean = picture_latents(pipe, image)
    assert torch.equal(end.latents[..., ~mask], clean[..., ~mask])
    assert (end.latents - clean)[..., mask].abs().mean() > 0.1


@pytest.mark.parametrize("scheduler", CHECKPOINTS)
def test_repaint_shows_the_model_one_noise_level(models, scheduler, rng, seed):
    "At every call the part that is kept is as noisy as the timestep says."
    pipe, image, calls = models(scheduler), scenes.render(scenes.parse("a red boat in a meadow"), 64, seed % 100), []
    mask = torch.rand(16, 16, generator=rng) < 0.5
    hook = pipe.unet.register_forward_pre_hook(lambda unet, inputs: calls.append((inputs[0][:1].clone(), inputs[1])))
    try: list(repaint(pipe, asked(scheduler=scheduler, seed=seed, steps=4), image, 1.0, mask))
    finally: hook.remove()
    clean, noise = picture_latents(pipe, image), start_noise((4, 16, 16), picture_generators(seed, 1, 1))
    for latents, t in calls:
        torch.testing.assert_close(latents[..., ~mask], pipe.scheduler.add_noise(clean, noise, t)[..., ~mask])


def test_walks_have_their_own_decoders():
    "Of two models each has its own autoencoder."
    def walk(value): yield SampleState(1, 0.0, torch.zeros(1), torch.full((1,), value))
    decoders = {"a": lambda latents: [10 * latents.item()], "b": lambda latents: [100 * latents.item()]}
    assert last(side_by_side({"a": walk(1.0), "b": walk(2.0)}, decoders)) == ([10.0, 200.0], ["a", "b"])


@pytest.mark.parametrize("scheduler", CHECKPOINTS)
def test_repaint_with_full_strength_is_text_to_image(models, scheduler):
    "At the noisy end nothing is left of the picture: a different one changes next to nothing."
    pipe = models(scheduler)
    ends = [list(repaint(pipe, asked(scheduler=scheduler, steps=4), Image.new("RGB", (80, 50), color), 1.0))[-1].latents for color in ("black", "white")]
    weak = [list(repaint(pipe, asked(scheduler=scheduler, steps=4), Image.new("RGB", (64, 64), color), 0.25))[-1].latents for color in ("black", "white")]
    far, near = (ends[0] - ends[1]).abs().mean(), (weak[0] - weak[1]).abs().mean()
    assert far < (near / 3 if scheduler in ("ddpm", "ddim") else 1e-4) and near > 0.5  # DDPM's noisy end is not quite noise


def test_last_part_is_a_chain_of_heun(models):
    "What is left begins with one visit and goes on with two, as a walk of its own would."
    timesteps = started(models("heun").scheduler, 8).timesteps
    for strength in (0.1, 0.3, 0.5, 0.99, 1.0):
        left = last_part(timesteps, strength)
        assert left[0] > left[1:].max() if len(left) > 1 else True
        assert all((left == t).sum() == 2 for t in left[1:]) and torch.equal(left, timesteps[-len(left):])
    for strength in (0, -1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="strength must be"):
            last_part(timesteps, strength)


def test_slerp(rng):
    "On the circle it is the angle; the norm of equal lengths is kept; the ends are the ends."
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    for amount in torch.rand(5, generator=rng).tolist():
        angle = torch.tensor(amount * torch.pi / 2)
        assert torch.allclose(slerp(a, b, amount), torch.stack([angle.cos(), angle.sin()]), atol=1e-6)
    a, b = torch.randn(2, 4, 16, 16, generator=rng)
    b = b * a.norm() / b.norm()
    assert abs(slerp(a, b, 0.3).norm() / a.norm() - 1) < 1e-4
    assert torch.allclose(slerp(a, a, 0.7), a)


@pytest.mark.parametrize("scheduler", CHECKPOINTS)
def test_between_ends_at_its_ends(models, scheduler):
    "The first and the last picture are those of the two prompts and seeds alone."
    config = asked("a red boat", seed=1, scheduler=scheduler)
    images, captions = last(between(models, config, "a blue balloon", seed=9, pictures=3))
    ends = [models(scheduler)(prompt, seed=s, num_inference_steps=3)[0] for prompt, s in (("a red boat", 1), ("a blue balloon", 9))]
    for image, end in zip((images[0], images[-1]), ends):
        assert max(abs(x - y) for x, y in zip(image.tobytes(), end.tobytes())) <= 1
    assert captions == ["0.00", "0.50", "1.00"]


def test_attention_is_the_layers_own(models, rng):
    "The maps are the weights with which a layer mixes the values: its output can be computed from them, one head at a time."
    pipe = models("flow")
    name, layer = next((n, m) for n, m in pipe.unet.named_modules() if n.endswith("mid_block.attentions.0.transformer_blocks.0.attn2"))
    seen = []
    hook = layer.register_forward_hook(lambda module, inputs, output: seen.append((inputs, output)))
    try:
        with torch.no_grad(), watch_attention(pipe.unet) as maps:
            pipe.unet(torch.randn(1, 4, 16, 16, generator=rng), torch.tensor(300.0), pipe.encode_prompt(["a red boat"]))
    finally:
        hook.remove()
    (x, context), output = seen[0]
    q, k = (layer.split_heads(t) for t in (layer.to_q(x), layer.to_k(context)))
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    mixed = (weights @ layer.split_heads(layer.to_v(context))).transpose(1, 2).flatten(2)
    assert torch.allclose(layer.to_out[0](mixed), output, atol=1e-5)
    assert torch.allclose(maps["mid 0"], weights.mean(1), atol=1e-6)


def test_watching_leaves_no_hook(models):
    unet = models("flow").unet
    frames = advance(models, new_run(models, asked(steps=5)))
    next(frames)
    assert any(module._forward_hooks for module in unet.modules())
    frames.close()
    with pytest.raises(RuntimeError), watch_attention(unet):
        unet(torch.zeros(1, 3, 16, 16), torch.tensor(0.0), torch.zeros(1, 32, 128))
    assert not any(module._forward_hooks for module in unet.modules())


def test_words_have_their_tokens(models):
    "Decoded again, the tokens of each word are that word."
    tokenizer = models("flow").tokenizer
    prompt = "  A small  elephant, at NIGHT 🌻 "
    ids = tokenizer([prompt])[0]
    for word, positions in prompt_words(tokenizer, prompt):
        assert tokenizer.decode(ids[list(positions)]).replace(" ", "") == word.lower()


def test_map_and_step(models):
    run = new_run(models, asked("a red boat", num_images=2))
    list(advance(models, run))
    attention = {"a": torch.zeros(16, 4), "b": torch.full((64, 4), 0.5)}
    attention["a"][5, 2] = 1  # row 1, column 1 of 4
    peak = word_map(attention, "a", (2,), (64, 64))
    assert divmod(int(peak.argmax()), 64) in [(y, x) for y in range(20, 28) for x in range(20, 28)] and (peak.min(), peak.max()) == (0, 1)
    images, captions = show_step(run, 2)
    assert len(images) == 6 and captions[0] == "x after step 2"
    assert len(show_word(run, 1)[0]) == 3


def test_same_seed_is_one_noise(models):
    images, captions = last(same_seed(models, asked(steps=2)))
    assert len(images) == len(captions) == len(CHECKPOINTS)


# --- the worker

def test_stop_within_one_step_and_the_last_click_wins():
    steps, lamp, errors = [], [], []

    def job(name):
        for i in range(50):
            steps.append((name, i))
            time.sleep(0.01)
            yield

    worker = Worker(lamp.append)
    for name in range(5):
        worker.start(job(name), errors.append)
        time.sleep(0.025)
    worker.stop()
    taken = len(steps)
    worker.thread.join(5)
    assert len(steps) <= taken + 1 and not errors
    assert [name for name, _ in steps] == sorted(name for name, _ in steps), "two jobs at once"
    assert lamp[-1] is False


# --- the page

def test_page(models):
    "Generate, two pictures; the files know their seeds; restore; a word."
    page = Playground()
    page.models = models
    page.controls.restore(asked("<i>two</i> orange fish", seed=5, num_images=2, checkpoint="tiny"))
    page.generate()
    assert finish(page).startswith("finished 3 of 3 steps")
    files = [base64.b64decode(data) for data in re.findall(r'href="data:image/png;base64,([^"]+)"', page.stage.pictures.value)]
    assert [(read_settings(BytesIO(file))["seed"], read_settings(BytesIO(file))["prompt"]) for file in files] == [
        (5, "<i>two</i> orange fish"), (6, "<i>two</i> orange fish")]
    everything = page.stage.pictures.value + "".join(entry.children[1].value for entry in page.history.children) + page.inside.words.frame.value
    assert "<i>" not in everything, "a prompt is not HTML"
    page.controls.restore(asked("something else", seed=1, checkpoint="tiny"))
    page.history.children[1].children[0].click()
    assert (page.controls.prompt.value, page.controls.seed.value, page.controls.lock.value) == ("<i>two</i> orange fish", 6, True)
    assert page.inside.repaint.image.tobytes() == Image.open(BytesIO(files[1])).tobytes(), "the picture that was clicked"
    page.inside.words.word.index = 1
    assert "orange, step 3" in page.inside.words.frame.value


def test_files_are_opened_as_everywhere():
    "Turned as the camera says, its middle, transparent becomes white, and what is no picture gets a line."
    page, file = Playground(), BytesIO()
    turned = Image.Exif()
    turned[0x0112] = 6
    lying = Image.new("RGB", (400, 200), "red")
    lying.paste("blue", (200, 0, 400, 200))
    lying.save(file, format="jpeg", exif=turned)
    page.inside.repaint.open_file(file.getvalue())
    red, blue = (page.inside.repaint.image.getpixel((128, y)) for y in (10, 246))
    assert page.inside.repaint.image.size == (256, 256) and red[0] > 250 > 5 > red[2] and blue[2] > 250 > 5 > blue[0]
    Image.new("RGBA", (40, 20), (0, 0, 0, 0)).save(file := BytesIO(), format="png")
    page.inside.repaint.open_file(file.getvalue())
    assert page.inside.repaint.image.getpixel((3, 3)) == (255, 255, 255)
    page.inside.repaint.open_file(b"no picture")
    assert "not a picture that can be opened" in page.inside.repaint.frame.value


def test_seed_rolls_unless_locked(models):
    page = Playground()
    page.models = models
    page.controls.restore(asked(seed=77, steps=1))
    page.generate()
    finish(page)
    assert page.controls.seed.value == 77
    page.controls.lock.value = False
    seeds = set()
    for _ in range(3):
        page.generate()
        seeds.add(page.controls.seed.value)
        finish(page)
    assert len(seeds) > 1


def test_errors_are_one_line():
    page = Playground({"flow": "/no/such/folder"})
    assert "no checkpoint '/no/such/folder'" in finish(page)
    page.generate()
    assert "no checkpoint" in finish(page) and "Traceback" not in page.stage.status.value
    page.inside.guidance.button.click()
    finish(page)
    assert "no checkpoint" in page.inside.guidance.frame.value
    assert page.controls.stop.disabled


def test_empty_prompt(models):
    page = Playground()
    page.models = models
    page.controls.restore(asked("", steps=1))
    page.generate()
    assert finish(page).startswith("finished")
    assert "no words" in page.inside.words.frame.value


def test_pictures_without_settings_have_no_link():
    assert "download" not in pictures_html([Image.new("RGB", (8, 8))], ["x"])


# --- the command

def test_app_is_here_only(tmp_path):
    arguments = voila_arguments(AppConfig(port=9000, browser=False), tmp_path / "x.ipynb")
    assert "--Voila.ip=127.0.0.1" in arguments and "--strip_sources=True" in arguments and "--no-browser" in arguments


def test_app_plays_with_any_model(models, tmp_path, monkeypatch):
    "A folder by its whole path, wherever the app runs; every sampler that can walk its path."
    monkeypatch.chdir(tmp_path)
    models("ddpm").save_pretrained("mine")
    assert walked_with("tiny") == CHECKPOINTS
    assert walked_with("mine") == dict.fromkeys(("ddpm", "ddim"), str((tmp_path / "mine").resolve()))
    write_notebook(tmp_path / "x.ipynb", walked_with("mine"))
    page = {}
    exec("".join(json.loads((tmp_path / "x.ipynb").read_text())["cells"][0]["source"]).replace("Playground(", "page = Playground("), page)
    assert "Error" not in finish(page["page"]) and list(page["page"].models.opened) == [str((tmp_path / "mine").resolve())]


@pytest.mark.parametrize("flags, message", [(["--checkpoint", "runs/none"], "there is no folder 'runs/none'"), (["--port", "0"], "port must be"), (["--port", "99999"], "at most 65535"), (["--idle", "0"], "idle must be")])
def test_app_refuses(flags, message, monkeypatch, capsys):
    from tinydiff import playground
    monkeypatch.setattr(sys, "argv", ["tinydiff-app", *flags])
    with pytest.raises(SystemExit) as stop:
        playground.main()
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and message in lines[0]


def test_app_without_voila_says_what_to_install(monkeypatch, capsys):
    from tinydiff import playground
    monkeypatch.setattr(sys, "argv", ["tinydiff-app"])
    monkeypatch.setitem(sys.modules, "voila.app", None)
    with pytest.raises(SystemExit) as stop:
        playground.main()
    assert stop.value.code == 2 and "pip install voila" in capsys.readouterr().err


def test_app_without_widgets_says_what_to_install(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "tinydiff.playground")
    monkeypatch.setitem(sys.modules, "anywidget", None)
    with pytest.raises(SystemExit) as stop:
        start_app()
    assert stop.value.code == 2 and capsys.readouterr().err == "error: tinydiff-app needs another package: pip install anywidget\n"
