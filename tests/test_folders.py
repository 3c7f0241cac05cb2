"Folders: ours opened by diffusers, diffusers' opened by us, the same picture from both; and files that must be refused."
import ast
import dataclasses
import gzip
import importlib.util
import json
import os
import pickle
import shutil
import struct
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import AutoencoderKL as DiffusersVAE
from diffusers import (
    DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig as TransformersTextConfig
from transformers import CLIPTextModel
from transformers import CLIPTokenizer as TransformersTokenizer

import tinydiff
import tinydiff.train
from tinydiff.models.clip import CLIP, CLIPTextConfig, CLIPTextEncoder, CLIPTokenizer, CLIPVisionConfig
from tinydiff.models.unet import UNet, UNetConfig
from tinydiff.models.vae import AutoencoderKL, VAEConfig
from tinydiff.sample import TextToImage, start_noise
from tinydiff.schedulers.flow_matching import make_scheduler
from tinydiff.stable_diffusion import (
    check_parts, fetch, load_clip, load_scheduler, load_text_encoder, load_tokenizer, load_unet, load_vae, read_json,
    read_weights, save_component, text_to_transformers, unet_to_diffusers, vae_to_diffusers, write_json,
)

torch.set_num_threads(1)
CAPTIONS = ["a red boat at night", "a small cabin in the woods", "it's 2 o'clock, isn't it?", "a watercolor landscape! 123 stars", "a blue boat"]
TOKENIZER = CLIPTokenizer.train(3 * CAPTIONS, vocab_size=620, max_length=16)
N = len(TOKENIZER.vocab)
UNET = UNetConfig(sample_size=8, block_out_channels=(16, 32), cross_attention=(True, False), num_heads=4, cross_attention_dim=32, norm_num_groups=8)
VAE = VAEConfig(block_out_channels=(8, 16), norm_num_groups=4, sample_size=16, scaling_factor=0.18215)
TEXT = CLIPTextConfig(vocab_size=N, hidden_size=32, intermediate_size=64, num_hidden_layers=2, max_position_embeddings=16, projection_dim=32)
SD_BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
SCHEDULERS = {"ddpm": make_scheduler("ddpm"), "ddim": make_scheduler("ddpm", eta=0.0, timestep_spacing="leading", steps_offset=1),
              "v": make_scheduler("ddpm", prediction_type="v_prediction", eta=0.0, rescale_betas_zero_snr=True), "flow": make_scheduler("flow", shift=2.0)}


@torch.no_grad()
def randomize(model, rng):
    "Fresh values in every parameter; zero convolutions and norms too."
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=rng)
        parameter.copy_(noise / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.1 * noise + (parameter == 1).float())
    return model.eval()


@pytest.fixture
def ours(rng):
    "A small pipeline of our own with random weights."
    models = (randomize(UNet(UNET), rng), randomize(AutoencoderKL(VAE), rng), randomize(CLIPTextEncoder(TEXT), rng))
    return TextToImage(*models, TOKENIZER, SCHEDULERS["ddim"]).to("cpu")  # in the layout of a pipeline from a folder


@pytest.fixture
def theirs(rng, tmp_path):
    "A small StableDiffusionPipeline with random weights, made without a download."
    TOKENIZER.save(tmp_path / "made")
    parts = dict(
        unet=randomize(UNet2DConditionModel.from_config(unet_to_diffusers(UNET)), rng),
        vae=randomize(DiffusersVAE.from_config(vae_to_diffusers(VAE)), rng),
        text_encoder=randomize(CLIPTextModel(TransformersTextConfig(**text_to_transformers(TEXT))), rng),
        tokenizer=TransformersTokenizer.from_pretrained(tmp_path / "made"),
    )
    pipe = StableDiffusionPipeline(**parts, scheduler=DDIMScheduler(**SD_BETAS, set_alpha_to_one=False), safety_checker=None,
                                   feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixels(image):
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).int()


def draw_ours(pipe, seed, size=(16, 16), **settings):
    return pixels(pipe(CAPTIONS[0], seed=seed, num_inference_steps=4, height=size[0], width=size[1], **settings)[0])


def draw_theirs(pipe, seed, size=(16, 16), **settings):
    "From the same noise, at the start and on the way."
    generator = torch.Generator().manual_seed(seed)
    latents = start_noise((4, size[0] // 2, size[1] // 2), [generator])
    pipe.set_progress_bar_config(disable=True)
    return pixels(pipe(CAPTIONS[0], latents=latents, generator=generator, num_inference_steps=4, height=size[0], width=size[1], **settings).images[0])


def assert_same_picture(ours, theirs, seed, guidance_scale=3.0, **settings):
    settings["guidance_scale"] = guidance_scale
    a, b = draw_ours(ours, seed, **settings), draw_theirs(theirs, seed, **settings)
    assert (a - b).abs().max() <= 1
    assert b.float().std() > 5 and len(b.unique()) > 30  # a picture, not a gray plane


def rename_weights(folder, table):
    "Other names in a component's file; a value of None drops the weight."
    path = next(folder.glob("*.safetensors"))
    save_file({new: weight for key, weight in load_file(path).items() if (new := table(key))}, path, metadata={"format": "pt"})


def edit_json(path, **changes):
    write_json(path, {k: v for k, v in {**read_json(path), **changes}.items() if v is not ...})


# --- round trips of our own

def test_each_component_comes_back(ours, tmp_path):
    for part, load in [("unet", load_unet), ("vae", load_vae), ("text_encoder", load_text_encoder)]:
        model = getattr(ours, part)
        save_component(model, tmp_path / part)
        again = load(tmp_path / part)
        assert again.config == model.config and not again.training
        assert again.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(again.state_dict()[key], weight) for key, weight in model.state_dict().items())
        assert all(weight.requires_grad for weight in again.parameters())
        assert sorted(os.listdir(tmp_path / part)) == ["config.json", "model.safetensors" if part == "text_encoder" else "diffusion_pytorch_model.safetensors"]


def test_a_subclass_is_saved_as_what_it_is(ours, tmp_path):
    class Mine(type(ours.unet)): pass
    save_component(Mine(ours.unet.config), tmp_path)
    assert load_unet(tmp_path).config == ours.unet.config


@pytest.mark.parametrize("more", (0, 7))
def test_transformers_pools_where_we_do(more, rng, tmp_path):
    "Also where the encoder knows more tokens than the tokenizer makes."
    encoder, ids = randomize(CLIPTextEncoder(dataclasses.replace(TEXT, vocab_size=N + more)), rng), TOKENIZER(CAPTIONS)
    save_component(encoder, tmp_path)
    with torch.no_grad():
        pooled = CLIPTextModel.from_pretrained(tmp_path)(ids).pooler_output
        assert (encoder.pool(ids, encoder(ids)) - pooled).abs().max() < 1e-4 < pooled.std()


def test_what_is_no_part_is_not_saved(tmp_path):
    with pytest.raises(TypeError, match="no part of a pipeline: Linear"): save_component(torch.nn.Linear(2, 2), tmp_path)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_come_back(name, tmp_path):
    save_component(SCHEDULERS[name], tmp_path)
    assert load_scheduler(tmp_path) == SCHEDULERS[name]


def test_tokenizer_comes_back(tmp_path):
    save_component(TOKENIZER, tmp_path)
    again = load_tokenizer(tmp_path)
    assert (again.vocab, again.merges, again.max_length) == (TOKENIZER.vocab, TOKENIZER.merges, 16)
    assert torch.equal(again(CAPTIONS), TOKENIZER(CAPTIONS))


def test_clip_comes_back(tmp_path, rng):
    vision = CLIPVisionConfig(image_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    clip = randomize(CLIP(TEXT, vision), rng)
    save_component(clip, tmp_path)
    again = load_clip(tmp_path)
    assert (again.text_encoder.config, again.image_encoder.config) == (TEXT, vision)
    assert all(torch.equal(again.state_dict()[key], weight) for key, weight in clip.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_open_in_float32(dtype, ours, tmp_path):
    ours.save_pretrained(tmp_path, dtype)
    assert {w.dtype for w in load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors").values()} == {dtype}
    again = TextToImage.from_pretrained(tmp_path)
    for key, weight in again.unet.state_dict().items():
        assert torch.equal(weight, ours.unet.state_dict()[key].to(dtype).float())


def test_scaling_factor_is_stored(ours, tmp_path, rng):
    "Measured latents have a standard deviation of 1 before the folder and after it."
    images = torch.randn(8, 3, 16, 16, generator=rng)
    with torch.no_grad():
        factor = 1 / ours.vae.encode(images).mean.std().item()
        ours.vae.config = VAEConfig(**{**VAE.__dict__, "scaling_factor": factor})
        ours.save_pretrained(tmp_path)
        again = TextToImage.from_pretrained(tmp_path).vae
        assert 0.9 < (again.encode(images).mean * again.config.scaling_factor).std() < 1.1


def test_a_saved_pipeline_draws_the_same(ours, tmp_path, seed):
    for name, scheduler in SCHEDULERS.items():
        ours.scheduler = scheduler
        ours.save_pretrained(tmp_path / name)
        assert torch.equal(draw_ours(TextToImage.from_pretrained(tmp_path / name), seed), draw_ours(ours, seed))


# --- a folder that diffusers wrote

def test_diffusers_folder_draws_the_same(theirs, tmp_path, seed):
    theirs.save_pretrained(tmp_path / "sd")
    ours = TextToImage.from_pretrained(tmp_path / "sd")
    assert_same_picture(ours, theirs, seed, guidance_scale=5.0)
    assert_same_picture(ours, theirs, seed, guidance_scale=1.0)
    assert_same_picture(ours, theirs, seed, size=(16, 24), negative_prompt=CAPTIONS[3])


def test_diffusers_fp16_variant(theirs, tmp_path, seed):
    theirs.to(torch.float16).save_pretrained(tmp_path / "sd", variant="fp16")
    weights = load_file(tmp_path / "sd" / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    assert_same_picture(TextToImage.from_pretrained(tmp_path / "sd"), theirs.to(torch.float32), seed)


def test_original_files(theirs, tmp_path, seed):
    "As Stable Diffusion 1.5 was published: old VAE names, `text_model.` and position_ids, vocab.json, PNDM, no scaling factor."
    theirs.save_pretrained(sd := tmp_path / "sd")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def old_name(key):
        for new, name in old.items(): key = key.replace(f"attentions.0.{new}.", f"attentions.0.{name}.")
        return key

    rename_weights(sd / "vae", old_name)
    rename_weights(sd / "text_encoder", lambda key: "text_model." + key.removeprefix("text_model."))
    path = sd / "text_encoder" / "model.safetensors"
    save_file({**load_file(path), "text_model.embeddings.position_ids": torch.arange(16)[None]}, path)
    assert any(".attentions.0.query." in key for key in load_file(sd / "vae" / "diffusion_pytorch_model.safetensors"))
    edit_json(sd / "vae" / "config.json", **dict.fromkeys(("scaling_factor", "force_upcast", "latents_mean", "use_quant_conv"), ...))
    edit_json(sd / "text_encoder" / "config.json", eos_token_id=2, bos_token_id=0, pad_token_id=1, projection_dim=...)
    shutil.rmtree(sd / "tokenizer")
    shutil.copytree(tmp_path / "made", sd / "tokenizer")
    PNDMScheduler(**{k: v for k, v in SD_BETAS.items() if k != "clip_sample"}, set_alpha_to_one=False, skip_prk_steps=True).save_pretrained(sd / "scheduler")
    pipe = TextToImage.from_pretrained(sd)
    assert pipe.vae.config.scaling_factor == 0.18215
    assert pipe.scheduler.eta == 0 and pipe.scheduler.steps_offset == 1 and not pipe.scheduler.set_alpha_to_one
    assert_same_picture(pipe, theirs, seed)  # PNDM's configuration, walked as DDIM


def test_attention_as_convolutions(theirs, tmp_path):
    "The oldest VAE files hold query, key and value as 1x1 convolutions."
    theirs.vae.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = {k: w[..., None, None] if "attentions" in k and w.ndim == 2 else w for k, w in load_file(path).items()}
    save_file({k: w.contiguous() for k, w in weights.items()}, path)
    z = torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(load_vae(tmp_path).decode(z), theirs.vae.decode(z).sample)


def test_text_encoder_without_prefix(theirs, ours, tmp_path):
    theirs.text_encoder.save_pretrained(tmp_path)
    ids = TOKENIZER(CAPTIONS)
    for prefix in ("", "text_model."):
        rename_weights(tmp_path, lambda key: prefix + key.removeprefix("text_model."))
        torch.testing.assert_close(load_text_encoder(tmp_path)(ids), theirs.text_encoder(ids).last_hidden_state)


@pytest.mark.parametrize("layout", ["vocab.json", "tokenizer.json", "pairs as strings"])
def test_tokenizer_layouts(layout, theirs, tmp_path):
    "vocab.json and merges.txt, or transformers 5's tokenizer.json; merges there as pairs or, in older files, as strings."
    folder = tmp_path / "made"
    if layout != "vocab.json":
        theirs.tokenizer.save_pretrained(folder := tmp_path / "saved")
        (folder / "vocab.json").unlink(missing_ok=True)
    if layout == "pairs as strings":
        content = read_json(folder / "tokenizer.json")
        content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
        write_json(folder / "tokenizer.json", content)
    assert torch.equal(load_tokenizer(folder)(CAPTIONS), TOKENIZER(CAPTIONS))


def test_words_that_a_tokenizer_was_taught_are_refused(theirs, tmp_path):
    "Textual inversion: a word with an embedding of its own, which byte pairs would take apart without a complaint."
    taught = TransformersTokenizer.from_pretrained(TOKENIZER.save(tmp_path / "plain") or tmp_path / "plain")
    taught.add_tokens(["<cat-toy>"])
    taught.save_pretrained(tmp_path / "new")
    TOKENIZER.save(tmp_path / "old")
    write_json(tmp_path / "old/added_tokens.json", {"<cat-toy>": len(TOKENIZER.vocab)})
    for layout in ("new", "old"):
        with pytest.raises(ValueError, match="taught words of its own .<cat-toy>., which are not supported"): load_tokenizer(tmp_path / layout)


def test_nothing_is_left_of_what_was_overwritten(theirs, ours, tmp_path):
    "Parts that diffusers would prefer to our weights, and a tokenizer.json that transformers would."
    theirs.unet.save_pretrained(tmp_path / "unet", max_shard_size="200KB")
    theirs.tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "unet/diffusion_pytorch_model-mine.safetensors").write_bytes(b"a copy that somebody kept")
    assert len(list((tmp_path / "unet").glob("*.safetensors*"))) > 2 and (tmp_path / "tokenizer/tokenizer.json").is_file()
    with torch.no_grad(): ours.unet.conv_in.weight.fill_(7)
    save_component(ours.unet, tmp_path / "unet")
    save_component(TOKENIZER, tmp_path / "tokenizer")
    assert (UNet2DConditionModel.from_pretrained(tmp_path / "unet").conv_in.weight == 7).all()
    assert {path.name for path in (tmp_path / "unet").iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-mine.safetensors"}
    assert not (tmp_path / "tokenizer/tokenizer.json").exists()


def test_tokenizer_without_length_is_clips(tmp_path):
    TOKENIZER.save(tmp_path)
    edit_json(tmp_path / "tokenizer_config.json", model_max_length=...)
    assert load_tokenizer(tmp_path).max_length == 77


# --- our folder, opened by diffusers

@pytest.mark.parametrize("name", ["ddpm", "ddim", "v"])
def test_our_folder_in_diffusers(name, ours, tmp_path, seed):
    ours.scheduler = SCHEDULERS[name]
    ours.save_pretrained(tmp_path)
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path)
    assert type(theirs.scheduler) is (DDPMScheduler if name == "ddpm" else DDIMScheduler)
    assert_same_picture(ours, theirs, seed)
    assert_same_picture(ours, theirs, seed, guidance_scale=1.0)
    assert_same_picture(ours, theirs, seed, size=(24, 16), negative_prompt=CAPTIONS[1])


def test_flow_components_in_diffusers(ours, tmp_path):
    ours.scheduler = SCHEDULERS["flow"]
    ours.save_pretrained(tmp_path)
    x, t, ids = torch.randn(2, 4, 8, 8), torch.tensor([3.5, 990.0]), TOKENIZER(CAPTIONS[:2])
    text = CLIPTextModel.from_pretrained(tmp_path / "text_encoder").eval()(ids).last_hidden_state
    torch.testing.assert_close(text, ours.text_encoder(ids))
    unet, vae = UNet2DConditionModel.from_pretrained(tmp_path / "unet"), DiffusersVAE.from_pretrained(tmp_path / "vae")
    torch.testing.assert_close(unet(x, t, text).sample, ours.unet(x, t, text), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vae.decode(x).sample, ours.vae.decode(x), rtol=1e-4, atol=1e-5)
    assert vae.config.scaling_factor == ours.vae.config.scaling_factor
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "scheduler")
    assert (scheduler.config.shift, scheduler.config.num_train_timesteps) == (2.0, 1000)


# --- the tokenizer against transformers

ODD = ["", "  ", "\n\t a  b\r\n", "A RED Boat", "it's they're WE'LL I'd", "12345 3.14", "na\u00efve caf\u00e9 \u00dcn\u00efc\u00f6d\u00e9", "\u65e5\u672c\u8a9e\u306e\u732b",
       "\U0001f469\u200d\U0001f469\u200d\U0001f467 family \U0001f1e9\U0001f1ea", "<|startoftext|> x", "<|endoftext|>", "a<|endoftext|>b", "\x00\x01 null",
       "<|STARTOFTEXT|>", "a <|StartOfText|> b<|ENDOFTEXT|>c", "<|startoftext", "|>'s", "".join(map(chr, range(32))), "".join(map(chr, range(127, 160))),
       "e\u0301", "\u200b zero", "\u00a0nbsp", "'s''s'''t", "!!!???'s...", "_a_b-c", "\u00bd \u00b2 \u2167", "\ufb01", "x" * 5000, 2000 * "boat ",
       "&amp; <b>html</b>", "\u0130stanbul", "\u00df \u1e9e", "\ufeffbom", "a\u0300\u0301\u0302b", "\ufdfa", "\U0001f600\ufe0f", "\u2028line", "\ufffd"]


def hostile(seed):
    "Captions, odd texts, noise from everywhere in Unicode, and 10,000 characters of it."
    generator = torch.Generator().manual_seed(seed)
    ranges = [(1, 127), (127, 0x500), (0x2000, 0x3000), (0x4E00, 0x9FFF), (0x1F300, 0x1F700)]
    pick = lambda low, high: int(torch.randint(low, high, (), generator=generator))
    noise = lambda length: "".join(chr(pick(*ranges[pick(0, len(ranges))])) for _ in range(length))
    return [*CAPTIONS, *ODD, *(noise(20) for _ in range(100)), noise(10_000), "x" * 10_000]


def assert_same_tokens(ours, theirs, texts):
    "In batches, padded and cut."
    expected = theirs(texts, padding="max_length", max_length=ours.max_length, truncation=True)["input_ids"]
    for text, mine, right in zip(texts, ours(texts).tolist(), expected, strict=True):
        assert mine == right, ascii(text)[:200]


def test_tokenizer_equals_transformers(theirs, seed):
    assert_same_tokens(TOKENIZER, theirs.tokenizer, hostile(seed))


def test_tokenizer_equals_transformers_with_clips_own_vocabulary(seed, tmp_path):
    "49,408 tokens, from the file that open_clip_torch brings along; the ids of a caption are those that CLIP is known for."
    path = Path(importlib.util.find_spec("open_clip").origin).parent / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(path.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    letters, merges = sorted(pre_tokenizers.ByteLevel.alphabet()), [tuple(line.split()) for line in lines]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer({token: i for i, token in enumerate(tokens)}, merges, 77).save(tmp_path)
    ours, theirs = load_tokenizer(tmp_path), TransformersTokenizer.from_pretrained(tmp_path)
    assert len(ours.vocab) == 49408 and ours.max_length == 77
    assert ours(["a photo of a cat"])[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 49407]
    assert_same_tokens(ours, theirs, hostile(seed))


@pytest.mark.parametrize("saved_by", ["us", "them"])
def test_a_tokenizer_that_pads_with_another_token(saved_by, tmp_path):
    "As Stable Diffusion 2's, whose special_tokens_map.json says `!`. (A ! in a caption stays a word, as in OpenCLIP; transformers takes it for padding.)"
    TOKENIZER.save(tmp_path)
    write_json(tmp_path / "special_tokens_map.json", {"pad_token": {"content": "!", "lstrip": False}})
    ours = load_tokenizer(tmp_path)
    if saved_by == "us": ours.save(tmp_path)
    assert_same_tokens(load_tokenizer(tmp_path), TransformersTokenizer.from_pretrained(tmp_path), [*(c.replace("!", "") for c in CAPTIONS), "", 2000 * "boat "])
    ids = ours("a red boat")[0]
    assert ids[-1] == ours.vocab["!"] != ours.end_id in ids and ours.decode(ids) == "a red boat"


def test_a_caption_alone_is_a_batch_of_one():
    assert torch.equal(TOKENIZER("a red boat"), TOKENIZER(["a red boat"]))


# --- refusals

def overwrite(path, **changes):
    return lambda root: edit_json(root / path, **changes)


def text(path, content):
    return lambda root: (root / path).write_text(content, encoding="utf-8")


def weights(part, change):
    "Change the dictionary of a component's weights."
    def apply(root):
        path = next((root / part).glob("*.safetensors"))
        content = load_file(path)
        change(content)
        save_file(content, path)
    return apply


def raw(part, change):
    "Change the bytes of a component's weights."
    def apply(root):
        path = next((root / part).glob("*.safetensors"))
        path.write_bytes(change(path.read_bytes()))
    return apply


def edited_header(change):
    "Another header for the same bytes; `change` gets its entries."
    def apply(data):
        size = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8:8 + size])
        change([value for key, value in header.items() if key != "__metadata__"])
        new = json.dumps(header).encode()
        return struct.pack("<Q", len(new)) + new + data[8 + size:]
    return apply


def index_that_climbs(root):
    "A sharded file's index, whose shard lies outside the folder, where a good file waits."
    file = next((root / "unet").glob("*.safetensors"))
    keys = load_file(file).keys()
    file.rename(root.parent / "outside.safetensors")
    write_json(root / "unet/diffusion_pytorch_model.safetensors.index.json",
               {"metadata": {}, "weight_map": dict.fromkeys(keys, "../../outside.safetensors")})


def lying(data):
    "A header that promises more bytes than there are."
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + size])
    entry = next(value for key, value in header.items() if key != "__metadata__")
    entry["shape"], entry["data_offsets"] = [1 << 40], [0, 4 << 40]
    new = json.dumps(header).encode()
    return struct.pack("<Q", len(new)) + new + data[8 + size:]


PARTS = {"unet": "diffusion_pytorch_model.safetensors", "vae": "diffusion_pytorch_model.safetensors", "text_encoder": "model.safetensors"}
FILES = [f"{part}/{name}" for part, weights_file in PARTS.items() for name in ("config.json", weights_file)] + \
    ["tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/tokenizer_config.json", "scheduler/scheduler_config.json"]
W = "conv_in.weight"
BAD = {
    **{f"without {name}": (lambda root, name=name: (root / name).unlink()) for name in FILES},
    **{f"without {part}/": (lambda root, part=part: shutil.rmtree(root / part)) for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler")},
    "truncated": raw("unet", lambda data: data[:-100]),
    "empty": raw("vae", lambda data: b""),
    "eight bytes": raw("vae", lambda data: data[:8]),
    "header of exabytes": raw("unet", lambda data: struct.pack("<Q", 1 << 60) + data[8:]),
    "lying header": raw("unet", lying),
    "tensors that overlap": raw("unet", edited_header(lambda entries: entries[1].update(data_offsets=entries[0]["data_offsets"]))),
    "a negative shape": raw("vae", edited_header(lambda entries: entries[0].update(shape=[-1]))),
    "a dtype of its own": raw("vae", edited_header(lambda entries: entries[0].update(dtype="PICKLE"))),
    "../ in an index file": index_that_climbs,
    "header is not JSON": raw("unet", lambda data: data[:8] + b"x" * 50 + data[58:]),
    "html instead": raw("text_encoder", lambda data: b"<!DOCTYPE html><html>not found</html>"),
    "weight missing": weights("unet", lambda w: w.pop(W)),
    "weight too many": weights("unet", lambda w: w.update(other=torch.ones(1))),
    "weight of another shape": weights("unet", lambda w: w.update({W: torch.ones(3)})),
    "weight of whole numbers": weights("unet", lambda w: w.update({W: w[W].int()})),
    "strange attention shape": weights("vae", lambda w: w.update({"encoder.mid_block.attentions.0.to_q.weight": torch.ones(16, 16, 3, 3)})),
    "no weights at all": weights("text_encoder", lambda w: w.clear()),
    "not JSON": text("unet/config.json", "{'a': 1}"),
    "not text": lambda root: (root / "vae/config.json").write_bytes(b"\xff\xfe\x00"),
    "a list": text("unet/config.json", "[1, 2]"),
    "a number": text("scheduler/scheduler_config.json", "7"),
    "deep": text("vae/config.json", 200_000 * "[" + 200_000 * "]"),
    "empty object": text("text_encoder/config.json", "{}"),
    "empty unet": text("unet/config.json", "{}"),
    "oversized": lambda root: (root / "unet/config.json").open("ab").write(60_000_000 * b" "),  # still valid JSON
    "channels as text": overwrite("unet/config.json", block_out_channels="many"),
    "channels nested": overwrite("unet/config.json", block_out_channels=[[16], [32]]),
    "no levels": overwrite("vae/config.json", block_out_channels=[]),
    "negative": overwrite("vae/config.json", block_out_channels=[-8, 16]),
    "fraction": overwrite("unet/config.json", layers_per_block=1.5),
    "a billion layers": overwrite("unet/config.json", layers_per_block=10**9),
    "a billion channels": overwrite("unet/config.json", block_out_channels=[10**9, 10**9]),
    "a huge vocabulary": overwrite("text_encoder/config.json", vocab_size=10**12),
    "groups that do not divide": overwrite("unet/config.json", norm_num_groups=7),
    "heads that do not divide": overwrite("unet/config.json", attention_head_dim=5),
    "heads per level": overwrite("unet/config.json", attention_head_dim=[2, 4]),
    "up does not mirror down": overwrite("unet/config.json", up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"]),
    "unknown block": overwrite("unet/config.json", down_block_types=["SkipDownBlock2D", "DownBlock2D"]),
    "blocks are a number": overwrite("unet/config.json", down_block_types=3),
    "another class": overwrite("unet/config.json", _class_name="UNet2DModel"),
    "linear projections": overwrite("unet/config.json", use_linear_projection=True),
    "unknown key": overwrite("unet/config.json", novel_attention="on"),
    "shifted latents": overwrite("vae/config.json", shift_factor=0.1),
    "scaling factor 0": overwrite("vae/config.json", scaling_factor=0),
    "scaling factor NaN": text("vae/config.json", json.dumps({**vae_to_diffusers(VAE), "scaling_factor": float("nan")})),
    "other activation": overwrite("text_encoder/config.json", hidden_act="relu"),
    "fewer blocks than levels": overwrite("unet/config.json", down_block_types=["CrossAttnDownBlock2D"]),
    "vocabulary size as text": overwrite("text_encoder/config.json", vocab_size="many"),
    "other eps": overwrite("text_encoder/config.json", layer_norm_eps=1e-3),
    "other model": overwrite("text_encoder/config.json", model_type="t5"),
    "unknown scheduler": overwrite("scheduler/scheduler_config.json", _class_name="LCMScheduler"),
    "scheduler of no class": overwrite("scheduler/scheduler_config.json", _class_name=...),
    "scheduler of a number": overwrite("scheduler/scheduler_config.json", _class_name=3),
    "unknown prediction": overwrite("scheduler/scheduler_config.json", prediction_type="dream"),
    "unknown scheduler key": overwrite("scheduler/scheduler_config.json", novel=1),
    "betas as text": overwrite("scheduler/scheduler_config.json", beta_start="small"),
    "a trillion timesteps": overwrite("scheduler/scheduler_config.json", num_train_timesteps=10**12),
    "vocabulary without an end": lambda root: write_json(root / "tokenizer/vocab.json", {"a": 0}),
    "vocabulary of text": overwrite("tokenizer/vocab.json", a="zero"),
    "ids out of range": overwrite("tokenizer/vocab.json", a=-1),
    "merges of unknown parts": text("tokenizer/merges.txt", "#version: 0.2\nzz yy\n"),
    "merges that make no token": lambda root: (root / "tokenizer/merges.txt").open("a").write("! !\n"),  # tokenizers panics here
    "ids with a hole": overwrite("tokenizer/vocab.json", a=10**6),
    "oversized vocabulary": lambda root: (root / "tokenizer/vocab.json").open("ab").write(60_000_000 * b" "),
    "oversized merges": lambda root: (root / "tokenizer/merges.txt").open("ab").write(60_000_000 * b"\n"),
    "merges of three": text("tokenizer/merges.txt", "a b c\n"),
    "length as text": overwrite("tokenizer/tokenizer_config.json", model_max_length="long"),
    "length of 10^30": overwrite("tokenizer/tokenizer_config.json", model_max_length=10**30),
    "longer than the text encoder": overwrite("tokenizer/tokenizer_config.json", model_max_length=77),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    "A folder that opens."
    folder = tmp_path_factory.mktemp("good")
    TextToImage(UNet(UNET), AutoencoderKL(VAE), CLIPTextEncoder(TEXT), TOKENIZER, SCHEDULERS["ddim"]).save_pretrained(folder)
    TextToImage.from_pretrained(folder)
    return folder


def refused(folder):
    "The one line with which a folder is refused."
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        pipe = TextToImage.from_pretrained(folder)
        check_parts(pipe.unet, pipe.vae, pipe.text_encoder, pipe.tokenizer)
    message = str(error.value)
    assert type(error.value) in (ValueError, FileNotFoundError)
    assert "\n" not in message and 20 < len(message) < 500, message
    return message


@pytest.mark.parametrize("name", BAD)
def test_bad_folders_are_refused_in_one_line(name, good, tmp_path):
    root = shutil.copytree(good, tmp_path / "bad")
    BAD[name](root)
    message = refused(root)
    assert "these parts" in message or str(root) in message, message


def test_the_message_says_what_is_wrong(good, tmp_path):
    cases = {"linear projections": "use_linear_projection is True, only False is supported", "weight missing": "weight 'conv_in.weight' is missing",
             "unknown key": "novel_attention", "without vae/config.json": "vae/config.json is missing", "a billion layers": "layers_per_block is 1000000000",
             "longer than the text encoder": "a tokenizer of 77 tokens"}
    for i, (name, words) in enumerate(cases.items()):
        root = shutil.copytree(good, tmp_path / str(i))
        BAD[name](root)
        assert words in refused(root)


def test_a_missing_folder_is_refused(tmp_path):
    assert "nowhere" in refused(tmp_path / "nowhere")
    assert "missing" in refused(tmp_path)


def test_parts_of_different_models_are_refused(good, tmp_path):
    for part, model in [("unet", UNet(UNetConfig(**{**UNET.__dict__, "cross_attention_dim": 40}))),
                        ("unet", UNet(UNetConfig(**{**UNET.__dict__, "in_channels": 9}))),
                        ("vae", AutoencoderKL(VAEConfig(**{**VAE.__dict__, "latent_channels": 16})))]:
        root = shutil.copytree(good, tmp_path / "mixed", dirs_exist_ok=True)
        save_component(model, root / part)
        assert "these parts do not fit" in refused(root)


# --- pickles

class Bomb:
    "What an attacker would pickle: opening it writes a file."
    def __init__(self, target): self.target = target
    def __reduce__(self): return Path.write_text, (self.target, "boom")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("suffix", ["bin", "pt", "ckpt", "safetensors"])
def test_pickles_are_never_opened(part, suffix, good, tmp_path):
    root, target = shutil.copytree(good, tmp_path / "bad"), tmp_path / "executed"
    weights_file = root / part / PARTS[part]
    weights_file.unlink()
    bomb = weights_file.with_suffix(f".{suffix}") if suffix != "bin" or part == "unet" else root / part / "pytorch_model.bin"
    if suffix == "pt":
        torch.save({"conv_in.weight": Bomb(target)}, bomb)
    else:
        bomb.write_bytes(pickle.dumps(Bomb(target)))
    message = refused(root)
    assert "pickle" in message or suffix == "safetensors"
    assert not target.exists()
    pickle.loads(pickle.dumps(Bomb(target)))  # the bomb is live
    assert target.exists()


def test_a_pickle_beside_safetensors_is_ignored(good, tmp_path):
    root, target = shutil.copytree(good, tmp_path / "both"), tmp_path / "executed"
    for name in ("model_index.pkl", "unet/diffusion_pytorch_model.bin", "unet/random_states_0.pkl", "vae/diffusion_pytorch_model.ckpt"):
        (root / name).write_bytes(pickle.dumps(Bomb(target)))
    TextToImage.from_pretrained(root)
    assert not target.exists()


def test_nothing_in_the_package_can_unpickle():
    "No import of a pickling library, no torch.load or numpy.load, no eval or exec of what was read."
    modules, calls = {"pickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}, {"eval", "exec", "__import__"}
    for path in Path(tinydiff.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & modules, path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in calls | {"torch.load", "np.load", "numpy.load", "torch.hub.load", "yaml.load"}, f"{path}: {called}"


def test_remote_code_is_not_run(good, tmp_path):
    "model_index.json may name any class; it is not even read."
    root, target = shutil.copytree(good, tmp_path / "remote"), tmp_path / "executed"
    (root / "pipeline.py").write_text(f"open({str(target)!r}, 'w')")
    edit_json(root / "model_index.json", _class_name=["pipeline", "Evil"], unet=["pipeline", "Evil"], vae=["../../..", "../pipeline.py"])
    TextToImage.from_pretrained(root)
    assert not target.exists()


# --- the hub

@pytest.fixture
def hub(monkeypatch, tmp_path):
    "A repository on the hub, as a list of its files, and where a download would put those that are asked for."
    repository, asked = [], []

    def download(hub_id, **options):
        asked.append((hub_id, options["revision"]))
        for name in repository:
            if any(fnmatch(name, pattern) for pattern in options["allow_patterns"]):
                (tmp_path / "snapshot" / name).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / "snapshot" / name).touch()
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return repository, asked


SHARED = ["model_index.json", "tokenizer/tokenizer.json", *(name for name in FILES if not name.endswith(".safetensors"))]
HALVES = [name.replace(".safetensors", ".fp16.safetensors") for name in FILES if name.endswith(".safetensors")]
UNWANTED = ["v1-5-pruned.ckpt", "v1-5-pruned.safetensors", "unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.non_ema.safetensors",
            "safety_checker/model.safetensors", "unet/pipeline.py", "README.md", "vae/model.pt", "text_encoder/pytorch_model.fp16.bin"]
WHOLE = [name for name in FILES if name.endswith(".safetensors")]


MIXED = [*HALVES[:-1], WHOLE[-1]]  # one part was exchanged


@pytest.mark.parametrize("weights, taken", [(WHOLE, WHOLE), (WHOLE + HALVES, WHOLE), (HALVES, HALVES), (MIXED, MIXED), (MIXED + WHOLE[:-1], WHOLE)],
                         ids=["fp32", "both", "fp16", "mixed", "mixed, and both"])
def test_fetch_asks_for_what_we_read_and_nothing_else(weights, taken, hub):
    repository, asked = hub
    repository += [*SHARED, *weights, *UNWANTED]
    folder = fetch("org/name", "abc123")
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == {*SHARED, *taken}
    assert set(asked) == {("org/name", "abc123")}


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_fetch_takes_a_part_alone(part, hub):
    repository, _ = hub
    files = ["config.json", PARTS[part], *(["vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"] if part == "text_encoder" else [])]
    repository += [*files, "model.ckpt", "pytorch_model.bin", "README.md"]
    assert {path.name for path in fetch("org/name").iterdir()} == set(files)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    "The cache of the real hub library; a function that puts a folder there, as if it had been downloaded."
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(hub_id, folder, commit, branch="main"):
        top = tmp_path / "hub" / f"models--{hub_id.replace('/', '--')}"
        shutil.copytree(folder, top / "snapshots" / commit)
        (top / "refs").mkdir(exist_ok=True)
        (top / "refs" / branch).write_text(commit)

    return put


def test_a_hub_id_with_a_pinned_revision(theirs, cache, tmp_path, rng):
    "Two commits, two models: a pinned one stays what it was when the branch moves on."
    theirs.save_pretrained(tmp_path / "old")
    before = theirs.unet.conv_in.weight.clone()
    randomize(theirs.unet, rng)
    theirs.save_pretrained(tmp_path / "new", variant="fp16")
    cache("org/name", tmp_path / "old", "a" * 40)
    cache("org/name", tmp_path / "new", "b" * 40)
    for revision, weight in [("a" * 40, before), ("b" * 40, theirs.unet.conv_in.weight), ("main", theirs.unet.conv_in.weight), (None, theirs.unet.conv_in.weight)]:
        assert torch.equal(TextToImage.from_pretrained("org/name", revision=revision).unet.conv_in.weight, weight)
    with pytest.raises(FileNotFoundError, match="^there is no folder 'org/name', and cannot fetch") as error:
        TextToImage.from_pretrained("org/name", revision="c" * 40)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("where", ["folder", "hub", "parts alone"])
def test_training_on_stable_diffusions_parts(where, learns, theirs, cache, tmp_path, monkeypatch):
    "--vae and --text_encoder of a folder that diffusers wrote, or of hub ids: a UNet of ours that fits them, and a pipeline of all."
    theirs.save_pretrained(sd := tmp_path / "sd")
    vae, text = str(sd), str(sd)
    if where == "hub":
        cache("org/sd", sd, "a" * 40)
        vae = text = "org/sd"
    if where == "parts alone":
        shutil.copytree(sd / "tokenizer", alone := tmp_path / "alone")
        shutil.copytree(sd / "text_encoder", alone, dirs_exist_ok=True)
        cache("org/vae", sd / "vae", "b" * 40)
        vae, text = "org/vae", str(alone)
    tiny = tinydiff.train.ARCHITECTURES["tiny"]
    small = tinydiff.train.dataclasses.replace(tiny, unet=UNetConfig(block_out_channels=(8, 16), cross_attention=(False, True), num_heads=2,
                                                                     cross_attention_dim=48, norm_num_groups=4))
    monkeypatch.setitem(tinydiff.train.ARCHITECTURES, "tiny", small)
    flags = ["--vae", vae, "--text_encoder", text, "--out", str(tmp_path / "run"), "--steps", "1", "--batch_size", "2", "--image_size", "16",
             "--subset_size", "4", "--num_workers", "0", "--device", "cpu", "--precision", "fp32", f"--{'' if learns else 'no_'}train_text_encoder"]
    pipe = TextToImage.from_pretrained(tinydiff.train.train(tinydiff.train.read_config(flags)))
    assert pipe.unet.config.cross_attention_dim == theirs.text_encoder.config.hidden_size == 32
    assert pipe.vae.config == load_vae(sd / "vae").config and pipe.vae.config.scaling_factor == 0.18215
    assert all(torch.equal(weight, pipe.vae.state_dict()[key]) for key, weight in load_vae(sd / "vae").state_dict().items())
    moved = [key for key, w in load_text_encoder(sd / "text_encoder").state_dict().items() if not torch.equal(w, pipe.text_encoder.state_dict()[key])]
    assert bool(moved) == learns
    assert torch.equal(pipe.tokenizer(CAPTIONS), TOKENIZER(CAPTIONS))
    assert pipe(CAPTIONS[0], num_inference_steps=1)[0].size == (16, 16)


def test_help_names_stable_diffusion(capsys):
    with pytest.raises(SystemExit): tinydiff.train.read_config(["--help"])
    shown = " ".join(capsys.readouterr().out.replace("\u2502", " ").split())
    assert "hub id, ours or Stable Diffusion's" in shown


@pytest.mark.parametrize("error", [ConnectionError("no route\nto host"), ValueError(""), RuntimeError("Repository Not Found\nat https://...")])
def test_fetch_fails_in_one_line(error, monkeypatch):
    def fail(*args, **options): raise error
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match=r"^cannot fetch 'org/name' from the Hugging Face hub: [^\n]+$"): fetch("org/name")


def test_fetch_offline(monkeypatch, tmp_path):
    "With the real library, which is offline in the tests: not in the cache, so one line."
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for name in ("no-such-org/no-such-name", "a/b/c", "../secret"):
        with pytest.raises(FileNotFoundError, match="^cannot fetch") as error: fetch(name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("text, unet, complaint", [({}, {}, None), (dict(vocab_size=N - 1), {}, "a tokenizer of 16 tokens up to"), ({}, dict(out_channels=8), "a UNet of 4 channels in and 8 out")])
def test_parts_that_do_not_fit(text, unet, complaint):
    with torch.device("meta"):
        parts = UNet(UNetConfig(cross_attention_dim=32, **unet)), AutoencoderKL(), CLIPTextEncoder(dataclasses.replace(TEXT, **text)), TOKENIZER
    if not complaint:
        return check_parts(*parts)
    with pytest.raises(ValueError, match=f"do not fit: {complaint}"):
        check_parts(*parts)


def test_float32_weights_come_first(tmp_path):
    for name, value in (("model", 1.0), ("model.fp16", 2.0)): save_file({"a": torch.tensor([value])}, tmp_path / f"{name}.safetensors")
    assert read_weights(tmp_path)["a"] == 1
