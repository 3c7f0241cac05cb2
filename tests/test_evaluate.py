"SceneEval: the reader, the exam, the marks, and the distances between sets of pictures."
import dataclasses
import hashlib
import json
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from tinydiff import evaluate as ev
from tinydiff.data import bytes_to_tensor
from tinydiff.sample import SampleConfig, TextToImage
from tinydiff.scenes import COLORS, KINDS, Scenes, is_heldout, parse, sample_scene
from tinydiff.train import TrainConfig


@pytest.fixture(scope="module")
def reader():
    return ev.load_reader()


@pytest.fixture(scope="module")
def pipe():
    return TextToImage.from_pretrained("tiny")


def truths(seed, n):
    rng = random.Random(seed)
    return [ev.draw_and_tell(sample_scene(rng, heldout=i % 2 == 1), 64, rng.getrandbits(32)) for i in range(n)]


# --- the reader

def test_bundled_reader_reads_fresh_renders(reader, seed):
    "Every attribute, in scenes that training of the diffusion model sees and in those withheld from it."
    pictures, told = zip(*truths(seed, 300))
    for name, percent in ev.reading_accuracy(told, ev.read_pictures(reader, list(pictures))).items():
        assert percent >= 98, f"{name}: {percent:.2f} %"


def test_reader_sees_each_thing_for_itself(reader):
    "Where neighbors have different kinds and colors, as no caption of the grammar can say, it does not assume that they are alike."
    left, right = (ev.draw_and_tell(parse(f"four {words} in the snow"), 64, 3) for words in ("small red boats", "small blue stars"))
    picture, truth = ev.splice(left, right, "x")
    seen = ev.read_pictures(reader, [picture])[0]
    assert sorted((t.kind, t.color) for t in seen.things) == [("boat", "red")] * 2 + [("star", "blue")] * 2
    assert all(map(all, ev.compare(truth, seen).values()))


def test_mass_counts_and_places(rng):
    x, y = torch.rand(2, 50, generator=rng) * 7 / 8 + 1 / 16  # middles between the first and the last cells' middles
    mass, middles = ev.spread_mass(x, y, 8), (torch.arange(8) + 0.5) / 8
    torch.testing.assert_close(mass.sum((1, 2)), torch.ones(50))
    torch.testing.assert_close((mass * middles).sum((1, 2)), x)
    torch.testing.assert_close((mass * middles[:, None]).sum((1, 2)), y)
    assert ((mass > 0).sum((1, 2)) <= 4).all()


def test_reading_undoes_the_labels(seed):
    "Logits made from the truth, by a loop that knows nothing of the code's tensors, are read as the truth."
    for _, truth in truths(seed, 40):
        mass, words = torch.zeros(8, 8), {name: torch.zeros(len(known), 8, 8) for name, known in ev.EACH.items()}
        for t in truth.things:
            for i in range(8):
                for j in range(8):
                    w = max(0, 1 - abs(8 * t.x - j - 0.5)) * max(0, 1 - abs(8 * t.y - i - 0.5))
                    mass[i, j] += w
                    for name, known in ev.EACH.items():
                        words[name][known.index(getattr(t, name)), i, j] += w
        logits = {"mass": mass.clamp(1e-6, 1 - 1e-6).logit()[None], **{name: w[None] for name, w in words.items()}}
        for name, known in ev.WHOLE.items():
            logits[name] = F.one_hot(torch.tensor([known.index(getattr(truth, name))]), len(known)).float()
        seen = ev.read_logits(logits)[0]
        assert all(map(all, ev.compare(truth, seen).values())), f"{truth} read as {seen}"


def test_losses_of_a_reader_that_knows_nothing():
    _, whole, things = map(torch.stack, zip(*ev.ReaderScenes(32)))
    blank = {"mass": torch.full((32, 8, 8), -30.0), **{name: torch.zeros(32, len(w), 8, 8) for name, w in ev.EACH.items()},
             **{name: torch.zeros(32, len(w)) for name, w in ev.WHOLE.items()}}
    losses = ev.reader_losses(blank, whole, things)
    for name, words in (ev.WHOLE | ev.EACH).items():
        assert losses[name].item() == pytest.approx(np.log(len(words)), rel=1e-5)
    count = (things[..., 0] >= 0).sum().item()
    assert losses["mass"].item() == pytest.approx(30 * count / 32, rel=1e-3)  # every missed unit of mass costs the logit


def test_reader_learns(tmp_path):
    "A few steps on eight pictures lower every loss; what is saved is what is loaded."
    torch.manual_seed(0)
    images, whole, things = map(torch.stack, zip(*ev.ReaderScenes(8)))
    model, images = ev.Reader().train(), images / 127.5 - 1
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    history = []
    for _ in range(25):
        losses = ev.reader_losses(model(images), whole, things)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        history.append({name: loss.item() for name, loss in losses.items()})
    assert all(history[-1][name] < 0.7 * history[0][name] for name in history[0]), (history[0], history[-1])
    ev.save_reader(model, tmp_path)
    with torch.no_grad():
        ours, theirs = model.eval().features(images), ev.load_reader(tmp_path).features(images)
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)  # float16


def test_train_reader_is_this_loop(tmp_path):
    "Three steps against the same written out. The draws of spliced pictures are the data set's own."
    trained = ev.train_reader(tmp_path, steps=3, batch_size=4, num_workers=0)
    torch.manual_seed(0)
    reader, generator = ev.Reader().train(), torch.Generator().manual_seed(0)
    start = torch.cat([p.detach().flatten() for p in reader.parameters()])
    optimizer = torch.optim.AdamW(reader.parameters(), 3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=3, pct_start=0.15)
    for images, whole, things in DataLoader(ev.ReaderScenes(12, 0), 4):
        optimizer.zero_grad()
        sum(ev.reader_losses(reader(ev.soften(bytes_to_tensor(images), generator)), whole, things).values()).backward()
        optimizer.step(), schedule.step()
    ours, theirs = (torch.cat([p.detach().flatten() for p in model.parameters()]) for model in (trained, reader))
    assert (ours - theirs).norm() < 0.05 * (theirs - start).norm()


def test_a_reader_goes_on_from_another_one(tmp_path):
    for name, more in (("a", {}), ("b", dict(start=tmp_path / "a", seed=1))): ev.train_reader(tmp_path / name, steps=1, batch_size=2, num_workers=0, lr=1e-9, **more)
    a, b = (ev.load_reader(tmp_path / name).things.weight for name in "ab")
    torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-2)  # float16


@pytest.mark.parametrize("mass, things", [(0.4, 0), (0.6, 1)])
def test_half_a_thing_is_none(mass, things):
    logits = {"mass": torch.full((1, 8, 8), -30.0), **{name: torch.zeros(1, len(words), 8, 8) for name, words in ev.EACH.items()},
              **{name: torch.zeros(1, len(words)) for name, words in ev.WHOLE.items()}}
    logits["mass"][0, 3, 3] = torch.tensor(mass).logit()
    assert len(ev.read_logits(logits)[0].things) == things


def test_a_position_counts_along_the_larger_axis():
    things = tuple(ev.SeenThing(kind, "red", "small", x, y) for kind, x, y in (("boat", 0.45, 0.2), ("fish", 0.55, 0.8)))
    asked = lambda prompt: ev.is_right(ev.Question("position", False, 0, prompt), ev.Reading("plain", "sea", things))
    assert asked("a boat above a fish") and not asked("a boat to the left of a fish")


def report_of_nothing(pipe, reader):
    "The report about a model that draws black pictures."
    questions, blank = ev.exam(1), Image.new("RGB", (64, 64))
    readings = [ev.read_pictures(reader, [blank]) for _ in questions]
    done = ev.Evaluation(questions, [[0]] * len(questions), [[blank]] * len(questions), readings)
    return ev.report(done, pipe, reader, ev.small_pixels(Scenes("train")[i]["image"] for i in range(4)), reference_pictures=26)


def test_a_ceiling_is_what_the_vae_returns(pipe, reader, monkeypatch):
    "Of a VAE that returns black pictures, it is that of the black model; and the renders that distances refer to are others."
    seeds, draw = [], ev.renders_of
    monkeypatch.setattr(ev, "through_vae", lambda vae, images: [Image.new("RGB", (64, 64))] * len(images))
    monkeypatch.setattr(ev, "renders_of", lambda *args, **settings: seeds.append(settings["seed"]) or draw(*args, **settings))
    scores = report_of_nothing(pipe, reader)["scores"]
    assert scores["ceiling"]["seen"] == scores["model"]["seen"] and sorted(set(seeds)) == [0, 1]


def test_what_a_score_is_compared_with(pipe, reader):
    "Distances of the model's pictures, of renders through the VAE, and of as many fresh renders; the median of the nearest."
    nothing_drawn = report_of_nothing(pipe, reader)
    scores, distances = nothing_drawn["scores"], {name: value["fid"] for name, value in nothing_drawn["distances"].items()}
    assert scores["ceiling"]["seen"]["overall"][0] > 80 > scores["model"]["seen"]["overall"][0]
    assert distances["model"] > max(distances["vae"], distances["renders"]) and distances["vae"] != distances["renders"] > 1
    renders = ev.through_vae(pipe.vae, ev.renders_of(ev.exam(1), 1, 64, seed=0))
    nearest = ev.nearest(renders, ev.small_pixels(Scenes("train")[i]["image"] for i in range(4)))[0]
    assert nothing_drawn["nearest_training_picture"]["vae"] == pytest.approx(nearest.median().item(), rel=1e-4)
    lines = {line.split(None, 1)[0]: line.split(None, 1)[1] for line in ev.score_table(nothing_drawn).splitlines() if line}
    assert lines["FID"] == f"{distances['model']:.2f}; renders through the VAE {distances['vae']:.2f}; as many fresh renders {distances['renders']:.2f}"
    assert lines["overall"].split()[-2:] == [f"{scores[name]['seen']['overall'][0]:.1f}" for name in ("ceiling", "chance")]


def test_an_exam_by_its_settings(monkeypatch, reader):
    "The seed draws; copies are looked for where the sampler's own model was trained, or where the user says."
    seen = {}
    monkeypatch.setattr(ev, "training_pixels", lambda *args: seen.update(training=args))
    monkeypatch.setattr(ev, "evaluate", lambda *args, **settings: seen.update(seed=args[4]))
    monkeypatch.setattr(ev, "report", lambda *args: {})
    for training_seed, expected in ((None, 1), (5, 5)):
        config = ev.EvalConfig(scheduler=("ddim",), seed=7, training_seed=training_seed)  # with tiny: tiny-ddpm, whose seed was 1
        record, _ = ev.run_exam(config, config.combinations()[0], reader)
        assert (seen["seed"], seen["training"][1], record["training_set"]) == (7, expected, f"train, seed {expected}")


def test_paths_may_be_paths(tmp_path):
    "In Python they often are."
    exam, train = ev.EvalConfig(checkpoint=tmp_path, out=tmp_path), TrainConfig(dataset=tmp_path, vae=tmp_path, out=tmp_path)
    assert (exam.checkpoint, exam.out, train.dataset, train.vae, train.out) == ((str(tmp_path),), *4 * [str(tmp_path)])
    assert SampleConfig("a", checkpoint=tmp_path, out=tmp_path / "a.png").out == str(tmp_path / "a.png")


def test_so_many_images_that_seeds_overlap_are_refused():
    with pytest.raises(ValueError, match="--images up to 100"): ev.EvalConfig(images=101)


def test_reader_of_other_words_is_refused(tmp_path):
    ev.save_reader(ev.Reader(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["words"]["kind"][0] = "castle"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="other words"):
        ev.load_reader(tmp_path)


# --- the exam

def test_exam_stays_the_same():
    "Results of different versions can be compared only if the prompts are the same: whoever changes them changes this, and says so."
    questions = ev.exam()
    assert len(questions) == 650 and [q.prompt for q in ev.exam(3)] == [q.prompt for q in questions if q.number < 3]
    digest = hashlib.sha256("\n".join(f"{q.category} {q.heldout} {q.prompt}" for q in questions).encode()).hexdigest()
    assert digest[:16] == "4a2d40e1a2598b20"


def test_exam_asks_what_it_should():
    for q in ev.exam():
        assert is_heldout(q.scene) == q.heldout
        said = [(t.color is not None, t.count > 1) for t in q.scene.things]
        expected = {"single object": [(False, False)], "counting": [(False, True)], "two objects": [(False, False)] * 2,
                    "position": [(False, False)] * 2, "binding": [(True, False)] * 2}.get(q.category, [(True, False)])
        assert said == expected, q
        assert (q.scene.style != "plain") == (q.category == "style") and (q.scene.place is not None or q.category != "place")


def test_true_pictures_pass_and_false_ones_fail(seed):
    rng = random.Random(seed)
    for q in ev.exam(12):
        _, truth = ev.draw_and_tell(ev.fill(q.scene, rng), 64, rng.getrandbits(32))
        assert ev.is_right(q, truth), (q, truth)
        thing, *rest = truth.things
        change = lambda **new: dataclasses.replace(truth, things=(dataclasses.replace(thing, **new), *rest))
        other = lambda word, words: next(w for w in words if w not in (word, *(getattr(t, "kind") for t in rest), *(getattr(t, "color") for t in rest)))
        wrong = {"style": [dataclasses.replace(truth, style="plain")],
                 "place": [dataclasses.replace(truth, place=other(truth.place, ev.WHOLE["place"]))]}.get(q.category)
        if wrong is None:
            wrong = [change(kind=other(thing.kind, KINDS)), dataclasses.replace(truth, things=truth.things + (thing,)), dataclasses.replace(truth, things=tuple(rest))]
        if q.category in ("colors", "binding"):
            wrong.append(change(color=other(thing.color, COLORS)))
        if q.category == "binding":
            wrong.append(dataclasses.replace(truth, things=(dataclasses.replace(thing, color=rest[0].color), dataclasses.replace(rest[0], color=thing.color))))
        if q.category == "position":
            wrong.append(dataclasses.replace(truth, things=(dataclasses.replace(thing, kind=rest[0].kind), dataclasses.replace(rest[0], kind=thing.kind))))
        for seen in wrong:
            assert not ev.is_right(q, seen), (q, seen)


def test_reader_passes_renders_of_the_exam(reader):
    "The judge and the marks together: renders of the prompts score nearly 100."
    questions = ev.exam(8)
    seen = ev.read_pictures(reader, ev.renders_of(questions, 2, 64, seed=1))
    table = ev.summarize(questions, ev.question_scores(questions, [seen[2 * i : 2 * i + 2] for i in range(len(questions))]))
    assert table["seen"]["overall"][0] > 96 and table["heldout"]["overall"][0] > 96, table
    assert list(table["seen"]) == [*ev.CATEGORIES, "overall"] and list(table["heldout"]) == [*ev.WITHHOLDABLE, "overall"]


def test_chance_is_the_score_of_other_prompts():
    questions = [ev.Question("place", False, i, text) for i, text in enumerate(("a boat at night", "a car at night", "a star in the desert"))]
    readings = [[ev.Reading("plain", place)] * 2 for place in ("night", "desert", "sea")]
    assert ev.question_scores(questions, readings) == [1, 0, 0]
    assert ev.chance_scores(questions, readings) == [0, 0.5, 0.5]  # night is asked twice: shown by 1 of the 2 others of the second, and so on


# --- statistics

def test_bootstrap_covers(seed):
    "Of 200 intervals about 95 % hold the true mean, here of two groups of different difficulty."
    rng = np.random.default_rng(seed)
    hits = 0
    for i in range(200):
        _, low, high = ev.bootstrap([(rng.random(60) < p).astype(float) for p in (0.8, 0.5)], resamples=400, seed=i)
        hits += low <= 65 <= high
    assert 176 <= hits <= 199, hits


def test_overall_is_the_mean_of_categories():
    mean, low, high = ev.bootstrap([[1.0] * 50, [0.0]])
    assert (mean, low, high) == (50, 50, 50)


def test_frechet_distance(rng):
    "Against the definition, with a matrix root by numpy's eigenvectors; zero to itself; the shift alone where only the means differ."
    a, b = torch.randn(60, 5, generator=rng, dtype=torch.float64), 2 * torch.randn(80, 5, generator=rng, dtype=torch.float64) + 1
    c1, c2 = np.cov(a.numpy().T), np.cov(b.numpy().T)
    values, vectors = np.linalg.eig(c1 @ c2)
    root = (vectors * np.sqrt(values)) @ np.linalg.inv(vectors)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum().item() + np.trace(c1 + c2 - 2 * root).real
    assert ev.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert abs(ev.frechet_distance(a, a)) < 1e-9
    wide = torch.randn(20, 64, generator=rng, dtype=torch.float64)  # fewer pictures than dimensions: singular covariances
    assert abs(ev.frechet_distance(wide, wide)) < 1e-4 and ev.frechet_distance(wide, wide + 1) == pytest.approx(64, rel=1e-5)


def test_kernel_distance(rng):
    "Against the three sums of the definition, pair by pair."
    a, b = torch.randn(7, 4, generator=rng, dtype=torch.float64), torch.randn(9, 4, generator=rng, dtype=torch.float64) + 0.5
    k = lambda x, y: (sum(p * q for p, q in zip(x.tolist(), y.tolist())) / 4 + 1) ** 3
    within = lambda s: np.mean([k(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j])
    assert ev.kernel_distance(a, b) == pytest.approx(within(a) + within(b) - 2 * np.mean([k(x, y) for x in a for y in b]), rel=1e-9)


def test_distances_tell_sets_apart(reader):
    "Renders are near renders of the same prompts, and far from renders of others."
    boats, again = (ev.renders_of(ev.exam(4), 2, 64, seed) for seed in (0, 1))
    night = [image for image, _ in truths(0, 400) if np.asarray(image).mean() < 110]
    found = ev.distances(reader, {"same": boats, "other": night}, again)
    assert found["other"]["fid"] > 1.5 * found["same"]["fid"] and found["other"]["kid"] > found["same"]["kid"] + 0.005, found


def test_nearest_finds_copies():
    training = [item["image"] for item in map(Scenes("train").__getitem__, range(30))]
    small = ev.small_pixels(training)
    distance, index = ev.nearest(training[5:8], small)
    assert index.tolist() == [5, 6, 7] and distance.max() < 1e-3
    distance, _ = ev.nearest([image for image, _ in truths(1, 5)], small)
    assert distance.min() > 0.02


@pytest.mark.parametrize("copied", [0, 4, 13])
def test_report_finds_copies(copied, pipe, reader):
    "Even where most pictures are new: the median would not see four of thirteen."
    questions, training = ev.exam(1), [item["image"] for item in map(Scenes("train").__getitem__, range(40))]
    new = [image for image, _ in truths(1, len(questions))]
    pictures = [[image] for image in ev.through_vae(pipe.vae, training[:copied] + new[copied:])]
    done = ev.Evaluation(questions, [[0]] * len(questions), pictures, [[seen] for [image] in pictures for seen in ev.read_pictures(reader, [image])])
    results = ev.report(done, pipe, reader, ev.small_pixels(training), reference_pictures=26)
    share = results["nearest_training_picture"]["copies"]
    assert share == pytest.approx(copied / len(questions), abs=0.1), share
    assert f"copies          {100 * share:.1f} % are nearer" in ev.score_table(results)


def test_sweep_over_a_runs_steps_is_a_learning_curve():
    record = lambda name, step, score: {"checkpoint": f"runs/{name}/checkpoints/diffusion/{step:07}/ema.safetensors", "scheduler": "flow", "guidance_scale": 4.0, "steps": 25,
        "unet_calls": 50, "scores": {"model": {"seen": {"overall": (score, score - 5, score + 5)}}, "ceiling": {"seen": {"overall": (95, 90, 100)}}}}
    ax, = ev.plot_sweep([record("a", 1000, 50), record("a", 500, 20), record("b", 500, 30)]).axes
    assert [list(line.lines[0].get_xdata()) for line in ax.containers] == [[500, 1000], [500]] and ax.get_xlabel() == "steps of training"
    assert [text.get_text() for text in ax.get_legend().get_texts()][1:] == [f"{name}, ema, flow, guidance 4, 25 steps" for name in "ab"]
    for several in ([record("a", 500, 20), record("a", 500, 30) | {"steps": 10, "unet_calls": 20}], [record("a", 500, 20) | {"checkpoint": f"/{i}/m"} for i in (1, 2)]):
        assert ev.plot_sweep(several).axes[0].get_xlabel() == "UNet calls for a picture"


# --- drawing and the command

def test_pictures_do_not_depend_on_their_company(pipe):
    prompts, seeds = ["a red boat", "two blue fish", "a green balloon"], [7, 100, 3]
    many = ev.draw_pictures(pipe, prompts, seeds, steps=2, batch_size=2)
    for prompt, seed, picture in zip(prompts, seeds, many, strict=True):
        alone = pipe(prompt, num_inference_steps=2, seed=seed)[0]
        assert np.abs(np.asarray(alone, int) - np.asarray(picture, int)).max() <= 1


def test_mistakes_come_before_the_first_picture(monkeypatch, tmp_path):
    monkeypatch.setattr(ev, "run_exam", lambda *args: pytest.fail("a picture was drawn"))
    with pytest.raises(ValueError, match="2000"):
        ev.run_exams(ev.EvalConfig(scheduler=("ddpm",), steps=(25, 2000), out=str(tmp_path / "exam")))
    assert not (tmp_path / "exam").exists()


def test_every_picture_has_its_own_seed():
    seeds = [ev.first_seed(q) for q in ev.exam()]
    assert seeds == list(range(0, 65000, 100))


def test_one_step_of_a_run(pipe, tmp_path):
    "EMA or raw weights of a step, on top of the finished run's other parts."
    pipe.save_pretrained(tmp_path)
    step = tmp_path / "checkpoints" / "diffusion" / "0000500"
    step.mkdir(parents=True)
    weights = {f"{part}.{key}": (w + 1).contiguous() for part in ("unet", "text_encoder") for key, w in getattr(pipe, part).state_dict().items()}
    save_file(weights, step / "ema.safetensors")
    opened = ev.open_checkpoint(str(step / "ema.safetensors"))
    torch.testing.assert_close(opened.unet.conv_in.weight, pipe.unet.conv_in.weight + 1)
    torch.testing.assert_close(opened.text_encoder.token_embedding.weight, pipe.text_encoder.token_embedding.weight + 1)
    (step / "ema.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read"):
        ev.open_checkpoint(str(step / "ema.safetensors"))


def test_command(tmp_path, monkeypatch, capsys):
    "Two exams: tables, results, answers, failures and the figure."
    out = tmp_path / "eval"
    flags = "--prompts 1 --images 1 --steps 1 2 --guidance_scale 1 --training_pictures 20 --reference_pictures 26 --out"
    monkeypatch.setitem(Scenes.splits, "train", 15)  # more pictures may be asked for than the split usually has
    monkeypatch.setattr(sys, "argv", ["tinydiff-eval", *flags.split(), str(out)])
    out.mkdir()
    (out / "failures.png").write_bytes(b"an earlier exam's")
    (out / "failures-kept.png").write_bytes(b"somebody's")
    ev.main()
    printed = capsys.readouterr().out
    assert printed.count("overall") == 2 and printed.count("FID") == 2
    first, second = json.loads((out / "results.json").read_text())["exams"]
    answers = json.loads((out / "answers.json").read_text())
    assert (first["steps"], first["unet_calls"], second["steps"], second["unet_calls"], first["scheduler"]) == (1, 1, 2, 2, "flow")
    assert [len(a) for a in answers] == [13, 13] and all(len(a["right"]) == len(a["seeds"]) == len(a["read"]) == 1 for a in answers[0])
    mean = np.mean([np.mean(a["right"]) for a in answers[1] if a["category"] in ev.SIX and not a["heldout"]])
    assert second["scores"]["model"]["seen"]["overall"][0] == pytest.approx(100 * mean, abs=0.01)
    assert {path.name for path in out.iterdir()} == {"results.json", "answers.json", "failures-00.png", "failures-01.png", "failures-kept.png", "sweep.png"}


def test_copies_are_looked_for_where_a_run_was_trained(tmp_path, capsys, monkeypatch):
    "Its own split and seed, by run.json, also for one step of it; the default ones where there is none."
    step = tmp_path / "checkpoints/diffusion/0000002/ema.safetensors"
    step.parent.mkdir(parents=True)
    assert ev.training_set("tiny") == ev.training_set(str(tmp_path)) == ("train", 0) != ev.training_set("tiny-ddpm")
    for other in ("", "{}", "[]", '{"config": null}'):  # somebody else's file
        (tmp_path / "run.json").write_text(other)
        assert ev.training_set(str(tmp_path)) == ("train", 0)
    for dataset, expected in (("scenes", ("train-25", 7)), ("emoji", ("train", 0))):
        (tmp_path / "run.json").write_text(json.dumps({"config": {"dataset": dataset, "split": "train-25", "seed": 7}}))
        assert ev.training_set(str(tmp_path)) == ev.training_set(str(step)) == expected
    (tmp_path / "taken").touch()
    with pytest.raises(ValueError, match="cannot be made"):
        ev.run_exams(ev.EvalConfig(checkpoint=("tiny", "tiny-ddpm"), steps=(1, 2), out=tmp_path / "taken", device="cpu"))
    assert "note:" not in capsys.readouterr().err
    monkeypatch.setattr(ev, "run_settings", lambda checkpoint: {"dataset": "emoji"})
    with pytest.raises(ValueError, match="cannot be made"):
        ev.run_exams(ev.EvalConfig(steps=(1, 2), out=tmp_path / "taken", device="cpu"))
    assert capsys.readouterr().err == "note: tiny was trained on emoji; the exam is about scenes\n"
    assert not torch.equal(ev.training_pixels("train", 0, 2), ev.training_pixels("train", 1, 2))


def test_several_values_or_one():
    config = ev.EvalConfig(checkpoint=Path("run"), steps=range(1, 3), guidance_scale=2)
    assert (config.checkpoint, config.steps, config.guidance_scale, config.scheduler) == (("run",), (1, 2), (2,), ())
    with pytest.raises(ValueError, match="--training_seed must be"): ev.EvalConfig(training_seed=-1)


def test_a_place_that_cannot_be_written_is_noticed_first(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sys, "argv", ["tinydiff-eval", "--out", str(tmp_path / "file")])
    monkeypatch.setattr(ev, "training_pixels", None)
    with pytest.raises(SystemExit) as stop: ev.main()
    assert stop.value.code == 2 and re.fullmatch(r"error: --out .*/file cannot be made: File exists\n", capsys.readouterr().err)


@pytest.mark.parametrize("flags, complaint", [
    ("--checkpoint /no/such", "no checkpoint"), ("--prompts 51", "up to 50"), ("--steps 0", "whole number"), ("--seed -1", "whole number"),
    ("--scheduler euler", "euler"), ("--checkpoint tiny-ddpm --scheduler ddim heun", "not with heun"), ("--checkpoint x/y.safetensors", "cannot be read"),
])
def test_mistakes_are_one_line(flags, complaint, tmp_path, monkeypatch, capsys):
    out = tmp_path / "eval"
    monkeypatch.setattr(sys, "argv", ["tinydiff-eval", *flags.split(), "--out", str(out)])
    with pytest.raises(SystemExit) as stop:
        ev.main()
    said = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(said) == 1 and said[0].startswith("error:") and complaint in said[0], said
    assert not out.exists()
