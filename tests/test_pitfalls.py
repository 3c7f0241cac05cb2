"Pitfalls that no other test sees; and the list of mutations, which must not rot."
from dataclasses import replace

import pytest
import torch
from mutations import MUTATIONS, ROOT
from safetensors.torch import load_file
from test_train import base, on, small  # noqa: F401  (fixtures)

from tinydiff.sample import TextToImage
from tinydiff.schedulers.flow_matching import FlowMatchingScheduler
from tinydiff.train import EncodedData, Run, load_parts, open_dataset

torch.set_num_threads(1)


def test_every_mutation_still_fits():
    "What it changes occurs once, what should catch it exists. Whether it is caught: `make mutations`."
    for m in MUTATIONS:
        assert (ROOT / "tinydiff" / m.file).read_text(encoding="utf-8").count(m.old) == 1, f"{m.file}: {m.old}"
        assert m.tests and m.new != m.old
        for file, name in (test.split("::") for test in m.tests):
            assert f"def {name.split('[')[0]}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), name


@pytest.mark.parametrize("weighting_scheme", ("uniform", "logit_normal"))
def test_training_times_are_shifted_once(weighting_scheme, seed):
    s, shifted = (FlowMatchingScheduler(shift=m, weighting_scheme=weighting_scheme).sample_timesteps(
        1000, generator=torch.Generator().manual_seed(seed)) / 1000 for m in (1.0, 3.0))
    torch.testing.assert_close(shifted, 3 * s / (1 + 2 * s))


def test_training_and_sampling_mean_the_same_by_no_text(base, tmp_path):
    run = Run(on(base), tmp_path, torch.device("cpu"), False)
    data, pipe, asked = EncodedData(run, open_dataset(run.config), load_parts(base, base)), TextToImage.from_pretrained(base), []
    tokenizer = pipe.tokenizer
    pipe.tokenizer = lambda texts: asked.append(tokenizer(texts)) or asked[-1]
    next(pipe.stream("a red boat", guidance_scale=3.0))
    assert torch.equal(asked[1], data.null_ids) and not torch.equal(asked[0], data.null_ids)


def test_latents_are_scaled_once(base, tmp_path):
    "A latent that is surely 1 reaches the UNet as the VAE's scaling factor."
    run, parts = Run(on(base), tmp_path, torch.device("cpu"), False), load_parts(base, base)
    parts.vae.config = replace(parts.vae.config, scaling_factor=0.4)
    data = EncodedData(run, open_dataset(run.config), parts)
    data.cached["moments"][:, :, :4], data.cached["moments"][:, :, 4:] = 1.0, -30.0
    torch.testing.assert_close(data.latents(0), torch.full_like(data.latents(0), 0.4), rtol=1e-4, atol=1e-4)


def test_a_run_gives_its_average(base):
    "The UNet in the folder is the EMA, not the weights of the last step."
    saved = load_file(base / "unet/diffusion_pytorch_model.safetensors")
    average, last = (load_file(base / f"checkpoints/diffusion/0000002/{name}.safetensors") for name in ("ema", "model"))
    assert all(torch.equal(weight, average[f"unet.{key}"]) for key, weight in saved.items())
    assert any(not torch.equal(weight, last[f"unet.{key}"]) for key, weight in saved.items())


def test_every_step_has_noise_of_its_own(base, tmp_path):
    run = Run(on(base), tmp_path, torch.device("cpu"), False)
    first, again, next_step, other = (run.noise(*at, (8,)) for at in (("noise", 3), ("noise", 3), ("noise", 4), ("flip", 3)))
    assert torch.equal(first, again) and not torch.equal(first, next_step) and not torch.equal(first, other)
