"The models against diffusers and transformers, in float64 with every parameter random; and the traps of mixed precision."
import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL as DiffusersVAE
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig as TransformersTextConfig
from transformers import CLIPTextModel

from tinydiff.models.attention import Attention, FeedForward, GroupNorm, SpatialTransformer, dot_product_attention
from tinydiff.models.clip import CLIP, CLIPTextConfig, CLIPTextEncoder, CLIPTokenizer, CLIPVisionConfig, contrastive_loss
from tinydiff.models.time_embed import TimestepEmbedding, sinusoidal_embedding
from tinydiff.models.unet import UNet, UNetConfig
from tinydiff.models.vae import AutoencoderKL, ResnetBlock, Upsample, VAEConfig
from tinydiff.scenes import Scenes
from tinydiff.stable_diffusion import (
    SD15_TEXT, SD15_UNET, SD15_VAE, TEXT_KEYS, load_weights, rename, text_from_transformers, text_key, text_to_transformers,
    unet_from_diffusers, unet_to_diffusers, vae_from_diffusers, vae_to_diffusers,
)

torch.set_num_threads(1)


@torch.no_grad()
def randomize(model, rng, scale=1.0):
    "Fresh values in every parameter, norms and biases too; of a size that keeps activations near 1."
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
        if parameter.ndim > 1:
            parameter.copy_(scale * noise / math.sqrt(parameter[0].numel()))
        else:
            parameter.copy_(0.3 * noise + (parameter == 1).double())  # norm weights begin at 1
    return model.double().eval()


def randn(rng, *shape):
    return torch.randn(shape, generator=rng, dtype=torch.float64)


def close(ours, theirs, atol=1e-10):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)
    assert theirs.std() > 1e-3  # not equal because both are nothing


# --- the same numbers as diffusers and transformers

UNETS = {
    "laptop": UNetConfig(block_out_channels=(32, 64, 96), num_heads=4, cross_attention_dim=24),
    "sd": UNetConfig(block_out_channels=(32, 64, 64, 64), cross_attention=(True, True, True, False), layers_per_block=2, cross_attention_dim=48),
    "deep": UNetConfig(block_out_channels=(16, 32), cross_attention=(True, False), transformer_layers_per_block=2, layers_per_block=3,
                       num_heads=2, cross_attention_dim=16, norm_num_groups=8),
    "inpainting": UNetConfig(in_channels=9, block_out_channels=(16,), cross_attention=(True,), num_heads=1, norm_num_groups=4, cross_attention_dim=8),
}


@pytest.mark.parametrize("config", UNETS.values(), ids=UNETS)
def test_unet_equals_diffusers(config, rng):
    theirs = randomize(UNet2DConditionModel.from_config(unet_to_diffusers(config)), rng)
    ours = UNet(config).double().eval()
    load_weights(ours, theirs.state_dict(), "unet")
    x, context = randn(rng, 2, config.in_channels, 8, 16), randn(rng, 2, 7, config.cross_attention_dim)
    t = torch.tensor([3.0, 981.25])
    with torch.no_grad():
        close(ours(x, t, context), theirs(x, t, context).sample)
        close(ours(x, torch.tensor(998), context), theirs(x, 998, context).sample)  # one whole timestep for all


VAES = {
    "laptop": VAEConfig(block_out_channels=(16, 24, 32)),
    "sd": VAEConfig(block_out_channels=(16, 32, 32, 32), layers_per_block=2, norm_num_groups=16),
    "wide": VAEConfig(in_channels=1, out_channels=2, latent_channels=16, block_out_channels=(8, 16), layers_per_block=3, norm_num_groups=4),
}


@pytest.mark.parametrize("config", VAES.values(), ids=VAES)
def test_vae_equals_diffusers(config, rng):
    theirs = randomize(DiffusersVAE.from_config(vae_to_diffusers(config)), rng)
    ours = AutoencoderKL(config).double().eval()
    load_weights(ours, theirs.state_dict(), "vae")
    x = randn(rng, 2, config.in_channels, 16, 24)
    with torch.no_grad():
        mine, posterior = ours.encode(x), theirs.encode(x).latent_dist
        close(mine.mean, posterior.mean)
        close(mine.logvar, posterior.logvar)
        close(mine.kl(), posterior.kl())
        close(ours.decode(mine.mean), theirs.decode(mine.mean).sample)


def test_vae_log_variance_is_clamped_as_in_diffusers(rng):
    theirs = randomize(DiffusersVAE.from_config(vae_to_diffusers(VAES["laptop"])), rng)
    with torch.no_grad():
        theirs.quant_conv.weight *= 100
    ours = AutoencoderKL(VAES["laptop"]).double().eval()
    load_weights(ours, theirs.state_dict(), "vae")
    x = randn(rng, 1, 3, 16, 16)
    with torch.no_grad():
        mine, posterior = ours.encode(x), theirs.encode(x).latent_dist
    assert mine.logvar.min() == -30 and mine.logvar.max() == 20
    close(mine.logvar, posterior.logvar, atol=1e-8)


TEXTS = {
    "laptop": CLIPTextConfig(vocab_size=60, hidden_size=32, intermediate_size=64, max_position_embeddings=12, projection_dim=8),
    "gelu": CLIPTextConfig(vocab_size=60, hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2,
                           max_position_embeddings=12, hidden_act="gelu"),
}


@pytest.mark.parametrize("config", TEXTS.values(), ids=TEXTS)
def test_text_encoder_equals_transformers(config, rng):
    theirs = randomize(CLIPTextModel(TransformersTextConfig(**text_to_transformers(config))), rng)
    ours = CLIPTextEncoder(config).double().eval()
    weights = {rename(key, TEXT_KEYS): weight for key, weight in theirs.state_dict().items()}
    weights.pop("", None)
    load_weights(ours, weights, "text_encoder")
    ids = torch.randint(1, 58, (3, 12), generator=rng)
    ids[0, 5:], ids[1, 2], ids[1, 9], ids[2, 11] = 59, 59, 59, 59  # padded with the end token; two ends; an end at the last place
    with torch.no_grad():
        mine, other = ours(ids), theirs(ids)
        close(mine, other.last_hidden_state)
        close(ours.pool(ids, mine), other.pooler_output)
        close(ours(ids[:, :7]), theirs(ids[:, :7]).last_hidden_state)  # shorter than the positions
    assert {text_key(key).removeprefix("text_model.") for key in ours.state_dict()} == \
        {key.removeprefix("text_model.") for key in theirs.state_dict() if "position_ids" not in key}


# --- Stable Diffusion 1.5 itself: its published configuration files, no weights

SD15 = {
    "unet": {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "act_fn": "silu", "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": False, "cross_attention_dim": 768,
        "down_block_types": 3 * ["CrossAttnDownBlock2D"] + ["DownBlock2D"], "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0,
        "in_channels": 4, "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4,
        "sample_size": 64, "up_block_types": ["UpBlock2D"] + 3 * ["CrossAttnUpBlock2D"]},
    "vae": {"_class_name": "AutoencoderKL", "_diffusers_version": "0.6.0", "act_fn": "silu", "block_out_channels": [128, 256, 512, 512],
        "down_block_types": 4 * ["DownEncoderBlock2D"], "in_channels": 3, "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32,
        "out_channels": 3, "sample_size": 512, "up_block_types": 4 * ["UpDecoderBlock2D"]},
    "text": {"architectures": ["CLIPTextModel"], "attention_dropout": 0.0, "bos_token_id": 0, "dropout": 0.0, "eos_token_id": 2,
        "hidden_act": "quick_gelu", "hidden_size": 768, "initializer_factor": 1.0, "initializer_range": 0.02, "intermediate_size": 3072,
        "layer_norm_eps": 1e-05, "max_position_embeddings": 77, "model_type": "clip_text_model", "num_attention_heads": 12,
        "num_hidden_layers": 12, "pad_token_id": 1, "projection_dim": 768, "torch_dtype": "float32", "transformers_version": "4.22.0.dev0",
        "vocab_size": 49408},
}


def shapes(model):
    return {key: tuple(weight.shape) for key, weight in model.state_dict().items()}


@pytest.mark.parametrize("part, count", [("unet", 859_520_964), ("vae", 83_653_863), ("text", 123_060_480)])
def test_stable_diffusion_15_at_full_size(part, count):
    "Every name and shape of the 1.07 billion parameters, on the meta device, where weights take no memory."
    translate, ours, constant = {"unet": (unet_from_diffusers, UNet, SD15_UNET), "vae": (vae_from_diffusers, AutoencoderKL, SD15_VAE),
                                 "text": (text_from_transformers, CLIPTextEncoder, SD15_TEXT)}[part]
    assert translate(SD15[part]) == constant
    with torch.device("meta"):
        model = ours(translate(SD15[part]))
        theirs = {"unet": UNet2DConditionModel.from_config, "vae": DiffusersVAE.from_config,
                  "text": lambda config: CLIPTextModel(TransformersTextConfig(**config))}[part](SD15[part])
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    expected = shapes(theirs)
    if part == "text":
        expected = {rename(key, TEXT_KEYS): shape for key, shape in expected.items()}
        expected.pop("", None)
    assert shapes(model) == expected


def test_configurations_survive_translation():
    for config in UNETS.values(): assert unet_from_diffusers(unet_to_diffusers(config)) == config
    for config in VAES.values(): assert vae_from_diffusers(vae_to_diffusers(config)) == config
    for config in TEXTS.values(): assert text_from_transformers(text_to_transformers(config)) == config


# --- time

def test_timesteps_stay_apart_under_autocast():
    "bf16 knows only 507 of 1000 timesteps: they must become embeddings before they become bf16."
    embed, t = TimestepEmbedding(64, 256), torch.arange(1000.0)
    assert len(t.bfloat16().unique()) < 600
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert sinusoidal_embedding(t, 64).dtype == torch.float32
        rows = embed(t)
    assert len(rows.unique(dim=0)) == 1000
    assert (rows[998] - rows[999]).abs().max() > 0.01


def test_time_embedding_sees_ten_steps():
    "Timesteps run to 1000, not to 1: ten of them turn most of the angles."
    a, b = sinusoidal_embedding(torch.tensor([500.0, 510.0]), 256)
    assert ((a - b).abs() > 1e-2).sum() > 128
    a, b = sinusoidal_embedding(torch.tensor([0.500, 0.510]), 256)
    assert ((a - b).abs() > 1e-2).sum() < 40


def test_unet_hears_the_time_and_the_text(rng):
    "Under autocast, two neighboring timesteps and two texts give different answers; pictures of a batch do not mix."
    config = UNETS["laptop"]
    unet = randomize(UNet(config), rng).float()
    x, context = randn(rng, 2, 4, 8, 8).float(), randn(rng, 2, 5, config.cross_attention_dim).float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        a, b = unet(x, torch.tensor([998.0, 5.0]), context), unet(x, torch.tensor([999.0, 5.0]), context)
        c = unet(x, torch.tensor([998.0, 5.0]), torch.cat([context[1:], context[1:]]))
    for other in (b, c):
        assert not torch.equal(a[0], other[0]) and torch.equal(a[1], other[1])


@pytest.mark.parametrize("config", UNETS.values(), ids=UNETS)
@pytest.mark.parametrize("times", [300.0, [300.0, 7.0]])
def test_one_sample_several_texts(config, times, rng):
    "As if the samples were given once for each text; with one time for all, what comes before the first text is computed once."
    unet = randomize(UNet(config), rng)
    x, context, t = randn(rng, 2, config.in_channels, 16, 8), randn(rng, 6, 5, config.cross_attention_dim), torch.tensor(times)
    rows = []
    unet.conv_in.register_forward_hook(lambda layer, inputs, output: rows.append(len(output)))
    first = next(module for name, module in unet.named_modules() if name.endswith("attn1"))
    first.register_forward_hook(lambda layer, inputs, output: rows.append(len(output)))
    with torch.no_grad():
        together = unet(x, t, context)
        assert rows == [2 if t.ndim == 0 else 6] * 2
        close(together, unet(torch.cat([x, x, x]), t if t.ndim == 0 else torch.cat([t, t, t]), context))
        for i in range(3):
            close(together[2 * i:2 * i + 2], unet(x, t, context[2 * i:2 * i + 2]))


# --- precision

@pytest.mark.parametrize("groups", [2, 8])  # of 16 channels, PyTorch's own; of 4, by way of float32
def test_group_norm_in_bf16_with_a_large_mean(groups, rng):
    "The statistics are taken in float32, whatever the input: a mean of 300 does not swallow the variance."
    block = ResnetBlock(32, 32, norm_num_groups=groups)
    x = (300 + 4 * torch.randn(2, 32, 16, 16, generator=rng)).bfloat16()
    reference = F.group_norm(x.double(), groups, eps=1e-6)
    close(block.norm1.bfloat16()(x).double(), reference, atol=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        close(block.norm1.float()(x).double(), reference, atol=0.02)


@pytest.mark.parametrize("groups", [2, 8])
def test_group_norm_in_bf16_learns_as_in_float64(groups, rng):
    norm = GroupNorm(groups, 32)
    randomize(norm, rng)
    x, weight = randn(rng, 2, 32, 8, 8).bfloat16().double().requires_grad_(), randn(rng, 2, 32, 8, 8)
    (norm(x) * weight).sum().backward()
    truth = [x.grad, norm.weight.grad, norm.bias.grad]
    short, rough = GroupNorm(groups, 32).bfloat16(), x.detach().bfloat16().requires_grad_()
    short.load_state_dict(norm.state_dict())
    (out := short(rough)).mul(weight).sum().backward()
    assert out.dtype == torch.bfloat16
    for exact, found in zip(truth, (rough.grad, short.weight.grad, short.bias.grad)):
        assert (found - exact).std() < 0.01 * exact.std()


def test_upsampling_in_bf16_learns_as_in_float64(rng):
    layer = randomize(Upsample(8), rng)
    x, weight = randn(rng, 2, 8, 6, 5).bfloat16().double().requires_grad_(), randn(rng, 2, 8, 12, 10)
    exact = layer(x)
    (exact * weight).sum().backward()
    short = Upsample(8).bfloat16()
    short.load_state_dict(layer.state_dict())
    rough = x.detach().bfloat16().requires_grad_()
    (learning := short(rough)).mul(weight).sum().backward()
    for truth, found in ((exact, learning), (x.grad, rough.grad), (layer.conv.weight.grad, short.conv.weight.grad), (layer.conv.bias.grad, short.conv.bias.grad)):
        assert (found - truth).std() < 0.01 * truth.std()


def test_upsampling_stays_in_autocasts_precision(rng):
    with torch.autocast("cpu", torch.bfloat16):
        assert Upsample(8)(randn(rng, 2, 8, 6, 5).float()).dtype == torch.bfloat16


@pytest.mark.parametrize("change", ("tiles", "wrapped", "forward", "hook", "before"))
def test_upsampling_by_another_convolution(rng, change):
    "Pictures that tile, adapters that learn, hooks: what stands in the convolution's place is asked."
    layer, x, plain = randomize(Upsample(4), rng), randn(rng, 2, 4, 5, 3), torch.nn.Conv2d.forward
    if change == "tiles": layer.conv.padding_mode = "circular"
    if change == "wrapped": layer.conv = torch.nn.Sequential(layer.conv, torch.nn.Conv2d(4, 4, 1).double())
    if change == "forward": layer.conv.forward = lambda x: 2 * plain(layer.conv, x)
    if change == "hook": layer.conv.register_forward_hook(lambda conv, inputs, out: 2 * out)
    if change == "before": layer.conv.register_forward_pre_hook(lambda conv, inputs: (2 * inputs[0],))
    close(layer(x), layer.conv(x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)), 1e-12)


def test_unet_in_bf16_stays_near_float32(rng):
    config = UNETS["laptop"]
    unet = randomize(UNet(config), rng).float()
    x, context, t = randn(rng, 2, 4, 8, 8).float(), randn(rng, 2, 5, config.cross_attention_dim).float(), torch.tensor([10.0, 900.0])
    with torch.no_grad():
        exact = unet(x, t, context)
        with torch.autocast("cpu", torch.bfloat16):
            rough = unet(x, t, context).float()
        whole = unet.bfloat16()(x.bfloat16(), t, context.bfloat16()).float()
    for result in (rough, whole):
        assert (result - exact).std() < 0.05 * exact.std()


def test_a_unet_of_bf16_weights_hears_one_step(rng):
    "Its timesteps stay float32: as bfloat16, 901 would be 900."
    unet = randomize(UNet(UNETS["laptop"]), rng).bfloat16()
    x, context = randn(rng, 1, 4, 8, 8).bfloat16(), randn(rng, 1, 5, 24).bfloat16()
    with torch.no_grad():
        assert not torch.equal(unet(x, torch.tensor([900.0]), context), unet(x, torch.tensor([901.0]), context))


def test_gradient_checkpointing_changes_nothing(rng):
    config = UNETS["laptop"]
    unet = randomize(UNet(config), rng).train()
    x, context, t = randn(rng, 2, 4, 8, 8), randn(rng, 2, 5, config.cross_attention_dim), torch.tensor([10.0, 900.0])
    gradients = []
    for unet.gradient_checkpointing in (False, True):
        unet.zero_grad()
        unet(x, t, context).square().mean().backward()
        gradients.append([parameter.grad for parameter in unet.parameters()])
    for plain, again in zip(*gradients):
        torch.testing.assert_close(plain, again, rtol=0, atol=1e-12)


# --- parts

def test_a_new_unet_predicts_nothing():
    unet = UNet(UNETS["laptop"])
    assert unet(torch.randn(1, 4, 8, 8), torch.tensor(500.0), torch.randn(1, 5, 24)).eq(0).all()


def test_spatial_transformer_is_blind_to_place(rng):
    "Attention and 1x1 convolutions know no neighborhood: shuffled pixels give the shuffled result."
    block = randomize(SpatialTransformer(16, 2, 8, norm_num_groups=4), rng)
    x, context, order = randn(rng, 1, 16, 4, 4), randn(rng, 1, 3, 8), torch.randperm(16, generator=rng)
    with torch.no_grad():
        shuffled = block(x.flatten(2)[..., order].view_as(x), context)
        close(shuffled.flatten(2), block(x, context).flatten(2)[..., order])


def test_attention_against_the_formula(rng):
    layer = randomize(Attention(12, 3, context_dim=5), rng)
    x, context = randn(rng, 2, 4, 12), randn(rng, 2, 6, 5)
    q, k, v = layer.to_q(x), layer.to_k(context), layer.to_v(context)
    heads = [(q[..., i:i + 4] @ k[..., i:i + 4].mT / 2).softmax(-1) @ v[..., i:i + 4] for i in (0, 4, 8)]
    close(layer(x, context), layer.to_out[0](torch.cat(heads, -1)))
    with pytest.raises(ValueError, match="10 cannot be split into 3 heads"): Attention(10, 3)


def test_a_clip_reads_to_the_end_whatever_its_tokenizers_size(rng):
    "The end of text is the last of the tokens there are, though the configuration allows for more."
    tokenizer = CLIPTokenizer.train(["a red cat", "a blue dog"] * 4)
    config = CLIPTextConfig()
    assert tokenizer.end_id < config.eos_token_id
    ids, encoder = tokenizer(["a red cat", "a blue dog"]), CLIPTextEncoder(config)
    states = encoder(ids)
    ends = [row.tolist().index(tokenizer.end_id) for row in ids]
    assert min(ends) > 1 and torch.equal(encoder.pool(ids, states), torch.stack([states[i, end] for i, end in enumerate(ends)]))


def test_a_timestep_may_be_a_number(rng):
    unet = randomize(UNet(UNETS["laptop"]), rng)
    x, context = randn(rng, 2, unet.config.in_channels, 8, 8), randn(rng, 2, 3, unet.config.cross_attention_dim)
    close(unet(x, 500, context), unet(x, torch.tensor([500.0, 500.0]), context))


def test_as_many_timesteps_as_samples(rng):
    unet = randomize(UNet(UNETS["laptop"]), rng)
    x, context = randn(rng, 4, 4, 8, 8), randn(rng, 4, 3, 24)
    for n in (2, 3, 8):
        with pytest.raises(ValueError, match=f"4 samples need as many timesteps, or one; got {n}"):
            unet(x, torch.rand(n), context)
    assert unet(x[:0], torch.rand(0), context[:0]).shape == x[:0].shape
    close(unet(x[:2], t := torch.rand(4), context), unet(x[[0, 1, 0, 1]], t, context))  # a time for each text


@pytest.mark.parametrize("contexts", (0, 1, 6))
def test_contexts_that_do_not_fit_the_samples_are_refused(rng, contexts):
    block = randomize(SpatialTransformer(8, 2, 6, norm_num_groups=4), rng)
    with pytest.raises(ValueError, match=f"4 samples need as many contexts, or a multiple; got {contexts}"):
        block(randn(rng, 4, 8, 2, 2), randn(rng, contexts, 3, 6))


@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_in_bfloat16_where_it_learns(rng, is_causal):
    "What is written out gives the kernel's results and gradients, but for the last of eight bits."
    exact = [randn(rng, 2, 3, 7, 16).requires_grad_() for _ in range(3)]
    short = [x.detach().bfloat16().requires_grad_() for x in exact]
    results = []
    for attend, inputs in ((F.scaled_dot_product_attention, exact), (dot_product_attention, short)):
        out = attend(*inputs, is_causal=is_causal)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for truth, value in zip(*results):
        assert (value - truth).norm() < 0.02 * truth.norm()


def test_feed_forward_gates_with_exact_gelu(rng):
    layer = randomize(FeedForward(6), rng)
    x = randn(rng, 3, 6)
    value, gate = layer.net[0].proj(x).split(24, dim=-1)
    close(layer(x), layer.net[2](value * gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))))


def test_text_encoder_reads_from_left_to_right(rng):
    encoder = randomize(CLIPTextEncoder(TEXTS["laptop"]), rng)
    ids = torch.randint(1, 58, (1, 12), generator=rng)
    changed = ids.clone()
    changed[0, 6] = (ids[0, 6] + 1) % 58
    a, b = encoder(ids)[0], encoder(changed)[0]
    assert torch.equal(a[:6], b[:6]) and all((a[i] - b[i]).abs().max() > 1e-6 for i in range(6, 12))


# --- CLIP

@pytest.fixture
def clip():
    return CLIP(TEXTS["laptop"], CLIPVisionConfig(image_size=16, patch_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                                  num_attention_heads=2))


def test_contrastive_loss_of_distinct_captions_is_clips(rng):
    logits, ids = 5 * randn(rng, 6, 6).float(), torch.arange(6)[:, None].expand(6, 3)
    right = torch.arange(6)
    expected = (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2
    torch.testing.assert_close(contrastive_loss(logits, ids), expected)


def test_equal_captions_are_not_negatives():
    "Two pictures of one caption: certain of both pairs, the loss is log 2, and it cannot be made smaller by telling them apart."
    ids = torch.tensor([[1, 2], [1, 2], [3, 4]])
    same = torch.tensor([[40.0, 40, 0], [40, 40, 0], [0, 0, 40]])
    apart = torch.tensor([[40.0, 0, 0], [0, 40, 0], [0, 0, 40]])
    torch.testing.assert_close(contrastive_loss(same, ids), torch.tensor(2 * math.log(2) / 3))
    assert contrastive_loss(apart, ids) > contrastive_loss(same, ids) + 5


def test_temperature_is_exponentiated_and_clamped(clip, rng):
    images, ids = torch.randn(4, 3, 16, 16, generator=rng), torch.randint(1, 60, (4, 12), generator=rng)
    cosine = clip.encode_image(images) @ clip.encode_text(ids).T
    torch.testing.assert_close(clip(images, ids), cosine / 0.07, rtol=1e-4, atol=1e-4)
    with torch.no_grad(): clip.logit_scale.fill_(9.0)
    torch.testing.assert_close(clip(images, ids), 100 * cosine, rtol=1e-4, atol=1e-4)
    slope, = torch.autograd.grad(clip(images, ids).square().sum(), clip.logit_scale)  # or it would stay above 100 for ever
    torch.testing.assert_close(slope, 2 * (100 * cosine).square().sum(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(clip.encode_text(ids).norm(dim=-1), torch.ones(4))


def test_upsampling_pads_its_weights_by_hand(monkeypatch):
    "Where avg_pool2d pads, its gradient is wrong on GPUs with channels_last (PyTorch issue 188344, mended after 2.11), and every upsampler would learn wrongly."
    pool, padding = torch.nn.functional.avg_pool2d, []

    def spy(*args, **settings):
        padding.append(settings.get("padding", args[3] if len(args) > 3 else 0))
        return pool(*args, **settings)

    monkeypatch.setattr(torch.nn.functional, "avg_pool2d", spy)
    Upsample(4)(torch.randn(1, 4, 3, 3))
    assert padding == [0]


def test_equal_captions_give_equal_merges():
    "Pairs that are equally frequent are merged in one order, however often a run is resumed."
    captions = [Scenes("train")[i]["caption"] for i in range(16)]
    assert len({str(CLIPTokenizer.train(captions).merges) for _ in range(12)}) == 1


def test_a_caption_fits_where_it_comes_back_whole():
    tokenizer = CLIPTokenizer.train(["a boat"] * 9, 520, max_length=6)
    for n in range(1, 8):
        caption = " ".join("x" * n)
        assert tokenizer.fits(caption) == (tokenizer.decode(tokenizer([caption])[0]) == caption) == (n <= 4)


def test_one_text_is_no_list_of_texts():
    with pytest.raises(TypeError, match="not one text"): CLIPTokenizer.train("a boat")


def test_both_sides_must_be_multiples():
    for height, width in ((18, 16), (16, 18)):
        with pytest.raises(ValueError, match=f"multiples of 4, not {height} x {width}"): AutoencoderKL().encode(torch.zeros(1, 3, height, width))


def test_an_entry_for_each_level():
    with pytest.raises(ValueError, match="one entry for each of the 3 levels"): UNetConfig(cross_attention=(True,) * 4)
