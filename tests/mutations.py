"""Mistakes that others made, put into a copy of the package one at a time: some test must fail for each. `make mutations`

Libraries are imported once; every mutation is a process forked from here (so: Linux or macOS) that finds its own copy
of the package first. What must catch a mistake is named with it. `python tests/mutations.py WORD` tries those of which
the pitfall, the file or a test contains the word.
"""
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Mutation:
    pitfall: str
    file: str  # in tinydiff/
    old: str  # occurs once there
    new: str
    tests: tuple[str, ...]  # those meant to catch it, in tests/


def bug(pitfall, file, old, new, *tests):
    return Mutation(pitfall, file, old, new, tests)


BASE, DDPM, FLOW = "schedulers/base.py", "schedulers/ddpm.py", "schedulers/flow_matching.py"
S, M, F, T, P, X, D, E = (f"test_{name}.py::test_" for name in ("schedulers", "models", "folders", "train", "sample", "pitfalls", "data", "evaluate"))
RESUME = T + "resumed_equals_uninterrupted[vae-flip-grad_accum-vae_batch_size-batch_size]"
NAIVE_NORM = """type("Naive", (nn.GroupNorm,), {"forward": lambda self, x: (
            (g := x.unflatten(1, (self.num_groups, -1)).flatten(2)), (m := g.mean(2, keepdim=True)),
            ((g - m) / ((g * g).mean(2, keepdim=True) - m * m + self.eps).clamp(min=1e-6).sqrt()).view_as(x))[2]})(norm_num_groups, in_channels, eps=eps)"""

MUTATIONS = [
    # --- schedules
    bug("linear betas with Stable Diffusion's endpoints", DDPM, 'beta_schedule: str = "scaled_linear"', 'beta_schedule: str = "linear"', S + "stable_diffusion_alpha_bar"),
    bug("linear betas with Stable Diffusion's endpoints", DDPM, 'power = 2 if schedule == "scaled_linear" else 1', "power = 1", S + "stable_diffusion_alpha_bar"),
    bug("betas not rescaled for another T", DDPM, "betas = 1000 / T * torch.linspace(", "betas = torch.linspace(", S + "betas_follow_the_number_of_timesteps"),
    bug("betas not rescaled for another T", DDPM, "ours[key] * ours['num_train_timesteps'] / 1000", "ours[key]", S + "config_survives_json_and_diffusers"),
    bug("betas not rescaled for another T", DDPM, "theirs[key] * 1000 / theirs['num_train_timesteps']", "theirs[key]", S + "config_survives_json_and_diffusers"),
    bug("betas[t] where steps are skipped", BASE, "torch.tensor([t, s], dtype=torch.float64)", "torch.tensor([t, max(t - 1, s)], dtype=torch.float64)",
        S + "gaussian_with_full_covariance[DDPM]"),
    bug("betas[t] where steps are skipped", DDPM, "self.alphas_cumprod[[int(t), int(s)]]", "self.alphas_cumprod[[int(t), int(t) - 1]]", S + "fixed_large_equals_diffusers_until_the_last_step"),
    bug("x_0 clipped in latent space", DDPM, "clip_sample: bool = False ", "clip_sample: bool = True ", S + "gaussian_oracle"),
    bug("x_0 clipped in latent space", DDPM, "if not self.clip_sample: return x_0, eps", "", S + "gaussian_oracle"),
    bug("previous timestep by arithmetic", BASE, "return next((s for s in chain[here:] if s < chain[here]), self.clean_timestep)",
        "return max(chain[here] - self.num_train_timesteps // len(chain), self.clean_timestep)", S + "steps_form_a_chain"),
    bug("noise in the last step", BASE, "if c > 0: prev = prev + c *", "if c >= 0: prev = prev + max(c, 0.01) *", S + "last_step_is_deterministic_and_clean"),
    bug("noise in the last step", DDPM, ' or s == self.clean_timestep: return a, b, c', ': return a, b, c', S + "last_step_is_deterministic_and_clean"),
    bug("the end at alpha-bar_0", DDPM, "set_alpha_to_one: bool = True ", "set_alpha_to_one: bool = False", S + "last_step_is_deterministic_and_clean"),
    bug("the end at alpha-bar_0", DDPM, "end = self.alphas_cumprod.new_ones(1) if", "end = self.alphas_cumprod[:1] if", S + "last_step_is_deterministic_and_clean"),
    bug("a time beyond the last", DDPM, ".clamp(-1, self.num_train_timesteps - 1)", "", S + "ddpm_knows_no_time_beyond_its_last"),
    bug("shift applied twice", FLOW, "sigma = shift_sigma(1 - torch.arange(N, dtype=torch.float64) / N, self.shift)",
        "sigma = shift_sigma(shift_sigma(1 - torch.arange(N, dtype=torch.float64) / N, self.shift), self.shift)", S + "shift_is_applied_once"),
    bug("shift applied twice", FLOW, "return shift_sigma(sigma, self.shift) * self.num_train_timesteps", "return shift_sigma(shift_sigma(sigma, self.shift), self.shift) * self.num_train_timesteps",
        X + "training_times_are_shifted_once"),
    bug("zero-terminal-SNR with epsilon", DDPM, 'if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":', "if False:", S + "refusals"),
    bug("zero-terminal-SNR that is not zero", DDPM, "return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2", "return alphas_cumprod", S + "zero_terminal_snr"),
    bug("min-SNR weight of v", BASE, "(sigma / (alpha * d - sigma * c)) ** 2", "(sigma / alpha) ** 2", S + "min_snr_weights"),
    # --- time
    bug("timesteps of a batch in order", BASE, "order = torch.randperm(n, generator=generator, device=device if generator is None else generator.device)", "order = torch.arange(n)",
        S + "a_batch_has_one_timestep_of_each_quantile"),
    bug("timesteps without an offset", BASE, "return (order.to(device) + offset) / n", "return order.to(device) / n", S + "a_batch_has_one_timestep_of_each_quantile"),
    bug("t in [0, 1] into the sinusoid", FLOW, "times = (sigma * self.num_train_timesteps).float()", "times = sigma.float()", S + "shift_is_applied_once"),
    bug("t in [0, 1] into the sinusoid", "models/time_embed.py", "angles = timesteps.float()[:, None] *", "angles = timesteps.float()[:, None] / 1000 *", M + "time_embedding_sees_ten_steps"),
    bug("bf16 timesteps", "models/time_embed.py", "angles = timesteps.float()[:, None] *", "angles = timesteps.bfloat16().float()[:, None] *", M + "timesteps_stay_apart_under_autocast"),
    bug("bf16 timesteps", "models/unet.py", "self.time_embedding(timesteps.reshape(-1))", "self.time_embedding(timesteps.to(sample.dtype).reshape(-1))",
        M + "a_unet_of_bf16_weights_hears_one_step"),
    # --- latents
    bug("scaling factor missing", "sample.py", "self.vae.decode(latents / self.vae.config.scaling_factor)", "self.vae.decode(latents)", P + "decode_undoes_what_encoding_does"),
    bug("scaling factor missing", "train.py", "return (mean + (0.5 * logvar).exp() * eps) * self.scale", "return mean + (0.5 * logvar).exp() * eps", X + "latents_are_scaled_once"),
    bug("scaling factor twice", "train.py", "return (mean + (0.5 * logvar).exp() * eps) * self.scale", "return (mean + (0.5 * logvar).exp() * eps) * self.scale**2",
        X + "latents_are_scaled_once"),
    bug("scaling factor twice", "sample.py", "self.vae.decode(latents / self.vae.config.scaling_factor)", "self.vae.decode(latents / self.vae.config.scaling_factor**2)",
        P + "decode_undoes_what_encoding_does"),
    bug("scaling factor not stored", "stable_diffusion.py", '{"_class_name": "AutoencoderKL", **ours, "down', '{"_class_name": "AutoencoderKL", **ours, "scaling_factor": 1.0, "down', F + "scaling_factor_is_stored"),
    bug("scaling factor not measured", "train.py", "scaling_factor=scaling_factor(model, images.to(self.run.device))", "scaling_factor=1.0", T + "scaling_factor"),
    bug("negatives of one process alone", "train.py", "model(images, ids, self.run.gather), self.run.gather(ids)", "model(images, ids), ids", T + "two_processes_are_like_one[adamw-1e-06-clip]"),
    bug("cached latents freeze the posterior sample", "train.py", 'eps = self.run.noise("posterior", step,', 'eps = 0 * self.run.noise("posterior", step,', T + "cached_latents_are_fresh_each_epoch"),
    bug("cached latents freeze the flip", "train.py", 'coins = torch.randint(moments.shape[1], (len(rows),), generator=generator_at(self.run.config.seed, "flip", step))',
        "coins = torch.zeros(len(rows), dtype=torch.long)", T + "both_mirrors_are_used"),
    # --- captions and guidance
    bug("one coin a batch in caption dropout", "train.py", "dropped = torch.rand(len(rows), 1,", "dropped = torch.rand(1, 1,", T + "captions_are_dropped_one_by_one"),
    bug("another null in training than in sampling", "train.py", 'parts.tokenizer([""])', 'parts.tokenizer(["nothing"])', X + "training_and_sampling_mean_the_same_by_no_text"),
    bug("c + w (c - u)", "sample.py", "return unconditional + guidance_scale * (conditional - unconditional)", "return conditional + guidance_scale * (conditional - unconditional)",
        P + "scale_1_is_conditional_and_0_unconditional[flow]"),
    # --- average and resume
    bug("EMA loaded as the weights", "train.py", 'model.load_state_dict(tensors["model"])', 'model.load_state_dict(tensors["ema"])', RESUME),
    bug("EMA's counter lost", "train.py", "ema.update(model, step)", "ema.update(model, step - first)", RESUME),
    bug("EMA in bf16", "train.py", "copy.deepcopy(model).float().eval()", "copy.deepcopy(model).eval()", T + "ema_of_a_scalar"),
    bug("EMA touches the weights", "train.py", "torch._foreach_lerp_(list(self.model.parameters()), [p.float() for p in model.parameters()], 1 - decay)",
        "torch._foreach_lerp_(list(self.model.parameters()), [p.float() for p in model.parameters()], 1 - decay)\n        model.load_state_dict(self.model.state_dict())", T + "ema_of_a_scalar"),
    bug("EMA trained but not used", "train.py", "stage.finish(ema.model)", "stage.finish(stage.model)", X + "a_run_gives_its_average"),
    bug("resume restarts the epoch", "train.py", "stage.start(first)", "stage.start(0)", RESUME),
    bug("resume repeats noise", "train.py", "generator_at(self.config.seed, name, step)",
        "generator_at(self.config.seed, name, step - self.__dict__.setdefault('first', step))", RESUME),
    bug("every step has the same noise", "train.py", "generator=generator_at(self.config.seed, name, step)", "generator=generator_at(self.config.seed, name)", X + "every_step_has_noise_of_its_own"),
    bug("resume without the optimizer", "train.py", 'load_optimizer_tensors(optimizer, tensors["optimizer"])', "pass", RESUME),
    bug("a UNet that goes on with another VAE or tokenizer", "train.py", "        check_same_parts(Path(config.out), parts)\n", "", T + "a_run_keeps_its_vae_and_tokenizer"),
    bug("a tokenizer trained again under trained weights", "train.py", 'if checkpoints_in(run.folder / "checkpoints" / "clip") and', "if False and", T + "the_tokenizer_stays"),
    bug("latents of pictures that have changed", "train.py", "config.flip, data_fingerprint(dataset),", "config.flip, config.dataset,", T + "changed_captions_are_encoded_anew"),
    bug("a stage that forgets the stage before", "train.py", "named = with_own_parts(config)", "named = config", T + "stages_one_by_one"),
    bug("a UNet begun anew on a text encoder that another one taught", "train.py", 'parts.text_encoder = load_clip(Path(config.out) / "clip").text_encoder.requires_grad_(False)', "pass", T + "stage_diffusion_begun_anew"),
    bug("a folder deleted before the new one is in its place", "train.py", "        folder.rename(old)", "        shutil.rmtree(folder)", T + "a_folder_is_replaced_whole"),
    bug("a signal dropped between two stages", "train.py", "    if run.any_process(bool(run.stop)) and", "    if run.any_process(False) and", T + "signal_in_the_last_step_of_a_stage"),
    bug("a run that begins anew by itself", "train.py", "    if checkpoints_in(folder):\n        raise", "    if False:\n        raise", T + "no_checkpoint_can_be_read"),
    bug("a picture drawn before the step is saved", "train.py", """            if run.rank == 0 and (save or stopped):
                save_checkpoint(checkpoints, done, model, ema, optimizer, c.keep)
            if run.rank == 0 and look:
                progress.look(done, ema.model)
""", """            if run.rank == 0 and look:
                progress.look(done, ema.model)
            if run.rank == 0 and (save or stopped):
                save_checkpoint(checkpoints, done, model, ema, optimizer, c.keep)
""", T + "a_step_is_saved_before_it_is_drawn"),
    bug("a picture that a killed run owes", "train.py", "    progress.catch_up(first, ema.model)\n", "", T + "a_step_is_saved_before_it_is_drawn"),
    bug("a large JPEG decoded whole", "data.py", "                image.draft(", "                0 and image.draft(", D + "a_large_jpeg_is_decoded_to_what_is_needed"),
    bug("a large JPEG decoded to too little", "data.py", "(2 * self.image_size,) * 2", "(self.image_size // 2,) * 2", D + "a_large_jpeg_is_decoded_to_what_is_needed"),
    bug("pictures without a caption file that nobody counts", "data.py", "if t.exists() else []) for p, t in texts] if", ") for p, t in texts if t.exists()] if", D + "a_picture_without_its_text_file_is_counted"),
    bug("latents in bfloat16", "sample.py", "torch.promote_types(self.unet.conv_in.weight.dtype, torch.float32)", "self.unet.conv_in.weight.dtype", P + "half_precision"),
    bug("processes that hear of a signal where they report", "train.py", "stopped = run.any_process(bool(run.stop))", "stopped = report and run.any_process(bool(run.stop))", T + "two_processes_stop_at_once"),
    bug("what one process alone skipped", "train.py", "dataset.skipped |= skipped > 0", "pass", T + "what_either_process_skipped_is_named"),
    bug("skipped pictures forgotten when a run is killed", "train.py", "        recall_skipped(run.folder, dataset)", "        pass", T + "skipped_pictures_are_remembered_by_a_run_that_was_killed"),
    bug("a finished run's parts overwritten while it goes on", "train.py", 'return ["diffusion"] if stands else', "return", T + "a_finished_run_that_goes_on_is_whole_all_the_while"),
    bug("a VAE trained on below its UNet", "train.py", 'for stage in ("vae", "clip") if begun else ():', "for stage in ():", T + "what_a_unet_stands_on_is_not_trained_any_more"),
    bug("a model overwritten by a run", "train.py", '("run.json", "model_index.json", "checkpoints/*/[0-9]*")', '("run.json",)', T + "neither_a_model_nor_checkpoints_alone_are_overwritten"),
    bug("copies looked for in another training set", "evaluate.py", 'return settings.get("split", "train"), settings.get("seed", 0)', 'return "train", 0', E + "copies_are_looked_for_where_a_run_was_trained"),
    bug("processes that all encode everything", "train.py", "items.tensor_split(len(shares))[run.rank])", "items)", T + "two_processes_share_the_encoding"),
    bug("gathered rows whose gradients stay with one process", "train.py", "torch.distributed.all_reduce(total := gradient.clone(memory_format=torch.contiguous_format))", "total = gradient", T + "two_processes_are_like_one[adamw-1e-06-clip]"),
    bug("pictures for validation that are trained on", "data.py", "FOLDER_SPLITS[name.lower()] for name in within if name.lower() in FOLDER_SPLITS", "FOLDER_SPLITS[name] for name in within[:1] if name in FOLDER_SPLITS", D + "no_picture_for_validation_is_trained_on"),
    bug("scenes that a preset mirrors", "train.py", "config = dataclasses.replace(config, flip=False)", "pass", T + "a_preset_mirrors_no_scenes"),
    bug("repainting at two noise levels", "playground.py", "torch.tensor(chain[state.step])", "torch.tensor(scheduler.previous_timestep(state.timestep))",
        "test_playground.py::test_repaint_shows_the_model_one_noise_level[heun]"),
    # --- the sketch
    bug("a sketch that nobody asks for", "train.py", "loss + self.run.config.sketch_weight * sum(missed)", "loss + 0 * sum(missed)", T + "a_sketch_counts_with_its_weight[flow]"),
    bug("a sketch that does not teach the text encoder", "train.py", "(prediction, self.sketch(states))", "(prediction, self.sketch(states.detach()))", T + "a_sketch_counts_with_its_weight[flow]"),
    bug("a sketch of the places alone", "train.py", "self.places.weight.expand(len(states), -1, -1), states)", "self.places.weight.expand(len(states), -1, -1), states * 0)", T + "a_sketch_learns_the_mean_of_a_captions_pictures"),
    bug("a run's step with weights that only taught", "evaluate.py", ' if not name.startswith("sketch.")', "", T + "a_sketch_is_for_text_encoders_that_learn"),
    # --- CLIP
    bug("equal captions as negatives", "models/clip.py", "same = (ids[:, None] == ids[None]).all(dim=-1).float()", "same = torch.eye(len(ids))", M + "equal_captions_are_not_negatives"),
    bug("temperature without exp", "models/clip.py", "return s.exp() * gather", "return s * gather", M + "temperature_is_exponentiated_and_clamped"),
    bug("temperature unclamped", "models/clip.py", "s = s + (s.clamp(max=math.log(100)) - s).detach()", "pass", M + "temperature_is_exponentiated_and_clamped"),
    bug("temperature that cannot come down", "models/clip.py", "s = s + (s.clamp(max=math.log(100)) - s).detach()", "s = s.clamp(max=math.log(100))", M + "temperature_is_exponentiated_and_clamped"),
    bug("special tokens in capitals", "models/clip.py", "pre_tokenizers.ByteLevel(add_prefix_space=False)]", "pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]", F + "tokenizer_equals_transformers"),
    bug("another tokenizer after resuming", "models/clip.py", "special_tokens=base", "initial_alphabet=letters", M + "equal_captions_give_equal_merges"),
    bug("random numbers spent before the weights", "train.py", "worker_init_fn=ignore_signals, generator=torch.Generator())", "worker_init_fn=ignore_signals)", T + "reading_captions_changes_no_weights"),
    bug("checkpoints in the order of their names", "train.py", ", key=lambda path: int(path.name))", ")", T + "checkpoints_are_in_the_order_of_their_steps"),
    bug("two programs in one run", "train.py", "lock = lock_folder(folder)", "lock = nullcontext()", T + "one_program_in_a_folder"),
    bug("a damaged cache", "train.py", 'about.get("checksum") == tensor_checksum(tensors)', "True", T + "cache_is_made_anew_when_it_must"),
    bug("weights that are no numbers, saved", "train.py", "if not torch.stack([p.isfinite()", "if False and not torch.stack([p.isfinite()", T + "weights_that_are_not_finite_are_not_saved"),
    bug("pictures of another directory", "train.py", "config = with_absolute_paths(with_folder(config, rank, world))", "config = with_folder(config, rank, world)", T + "a_run_goes_on_from_another_directory"),
    bug("a model's own samples as data", "data.py", " and p.parent not in drawn", "", D + "pictures_of_a_run_in_the_folder_are_no_data"),
    # --- GPUs
    bug("avg_pool2d that pads", "models/vae.py", "F.avg_pool2d(padded, 2, stride=1, divisor_override=1)", "F.avg_pool2d(self.conv.weight, 2, stride=1, padding=1, divisor_override=1)",
        M + "upsampling_pads_its_weights_by_hand"),
    bug("waiting for the GPU in every step", "muon.py", "        for group in self.param_groups:\n            if not (weights", "        if stop: return\n        for group in self.param_groups:\n            if not (weights",
        T + "muon_does_not_look_whether_the_step_was_good"),
    bug("copies of the weights that were", "train.py", "zip(self.places, ToBFloat16.apply(*self.model.parameters()), strict=True)", "zip(self.places, self.__dict__.setdefault('once', [p.detach().bfloat16() for p in self.model.parameters()]))",
        T + "bfloat16_copies_compute_and_float32_weights_learn"),
    bug("an end that waits for the GPU", "train.py", 'if run.device.type == "cuda":  # a GPU waits', 'if False:  # a GPU waits', T + "a_process_that_lost_another_ends_at_once_on_a_gpu"),
    bug("a recorded model where a picture is drawn", "train.py", "copy.copy(model), inputs", "model, inputs", T + "cuda_graphs_are_recorded_for_what_the_loop_calls"),
    # --- configurations
    bug("a key silently ignored", BASE, "unknown = [k for k in config if k not in known]", "config, unknown = {k: v for k, v in config.items() if k in known}, []", S + "refusals"),
    bug("a key silently ignored", "train.py", "    for key in values:\n", "    values = {k: v for k, v in values.items() if k in known}\n    for key in values:\n", T + "stored_configuration_is_checked"),
    bug("a key silently ignored", "stable_diffusion.py", "key not in NO_EFFECT and (value or None)", "key in ours and (value or None)", F + "bad_folders_are_refused_in_one_line"),
    # --- shapes that happen to fit
    bug("two timesteps for four samples", "models/unet.py", "if timesteps.numel() not in (1, len(sample), len(context)):", "if False:", M + "as_many_timesteps_as_samples"),
    bug("one row of noise for all", BASE, "if len(generator) != shape[0]:", "if False:", P + "a_step_takes_a_list_of_generators"),
    bug("an adapter that nobody asks", "models/vae.py", 'if type(conv) is not nn.Conv2d or conv.padding_mode != "zeros" or', "if False and", M + "upsampling_by_another_convolution"),
    bug("a place that is right by the smaller axis", "evaluate.py", "return step == max(abs(across), abs(down))", "return step > 0", E + "a_position_counts_along_the_larger_axis"),
    # --- precision and details of Stable Diffusion
    bug("GroupNorm in bf16", "models/vae.py", "self.norm1 = GroupNorm(norm_num_groups, in_channels, eps=eps)", "self.norm1 = " + NAIVE_NORM, M + "group_norm_in_bf16_with_a_large_mean"),
    bug("GroupNorm in bf16", "models/attention.py", "self.weight.float(), self.bias.float(), self.eps", "None, None, self.eps", M + "group_norm_in_bf16_learns_as_in_float64"),
    bug("a text that reads another picture", "models/attention.py", "torch.cat([x] * (len(other) // len(x)))", "x.repeat_interleave(len(other) // len(x), dim=0)", M + "one_sample_several_texts"),
    bug("attention written out without its root", "models/attention.py", "q / q.shape[-1] ** 0.5 @ k", "q @ k", M + "attention_in_bfloat16_where_it_learns"),
    bug("attention that sees the next word", "models/attention.py", "dtype=scores.dtype).triu(1)", "dtype=scores.dtype).triu(2)", M + "attention_in_bfloat16_where_it_learns"),
    bug("a detail of Stable Diffusion", "models/attention.py", "self.norm = GroupNorm(norm_num_groups, channels, eps=1e-6)", "self.norm = GroupNorm(norm_num_groups, channels, eps=1e-5)", M + "unet_equals_diffusers"),
    bug("a detail of Stable Diffusion", "models/attention.py", "return value * F.gelu(gate)", 'return value * F.gelu(gate, approximate="tanh")', M + "unet_equals_diffusers"),
    bug("a detail of Stable Diffusion", "models/attention.py", "value, gate = self.proj(x).chunk(2, dim=-1)", "gate, value = self.proj(x).chunk(2, dim=-1)", M + "unet_equals_diffusers"),
    bug("a detail of Stable Diffusion", "models/time_embed.py", "torch.cat([angles.cos(), angles.sin()], dim=-1)", "torch.cat([angles.sin(), angles.cos()], dim=-1)", M + "unet_equals_diffusers"),
    bug("a detail of Stable Diffusion", "models/vae.py", "F.pad(x, (0, 1, 0, 1))", "F.pad(x, (1, 0, 1, 0))", M + "vae_equals_diffusers"),
    bug("a detail of Stable Diffusion", "models/clip.py", "F.silu(1.702 * x) / 1.702", "F.silu(1.7 * x) / 1.7", M + "text_encoder_equals_transformers"),
    # --- files
    bug("pickles", "stable_diffusion.py", "        but = f\"; {pickles[0]} is a pickle", "        if pickles: return torch.load(folder / pickles[0], weights_only=False)\n        but = f\"; {pickles[0]} is a pickle",
        F + "pickles_are_never_opened"),
    bug("pickles", "stable_diffusion.py", "import json\n", "import json\nimport pickle\n", F + "nothing_in_the_package_can_unpickle"),
    bug("JSON of any size", "stable_diffusion.py", "if path.stat().st_size > 20_000_000:", "if False:", F + "bad_folders_are_refused_in_one_line[oversized]"),
]


class Watch:
    "A pytest plugin: the first failure."
    failed, ran, broken = "", 0, False

    def pytest_runtest_logreport(self, report):
        self.ran += report.when == "call"
        if report.failed and not self.failed: self.failed = report.nodeid.split("::")[-1]

    def pytest_collectreport(self, report):
        self.broken = self.broken or report.failed


def run_tests(package: Path, tests) -> Watch:
    "Run tests of this project on the package in a folder, in this process."
    import pytest
    watch = Watch()
    sys.path.insert(0, str(package))
    os.environ["PYTHONPATH"] = str(package)
    os.chdir(package)
    with open(package / "log", "w") as log:
        os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
        pytest.main(["-x", "-q", "--tb=line", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"),
                     *(str(ROOT / "tests" / name) for name in tests)], plugins=[watch])
    import tinydiff
    assert Path(tinydiff.__file__).parent == package / "tinydiff", tinydiff.__file__
    return watch


def copy_package(folder: Path) -> Path:
    shutil.copytree(ROOT / "tinydiff", folder / "tinydiff", ignore=shutil.ignore_patterns("__pycache__", "pretrained"))
    (folder / "tinydiff" / "pretrained").symlink_to(ROOT / "tinydiff" / "pretrained")
    return folder


def verdict(mutation: Mutation) -> tuple[str, float]:
    "The test that caught it; or SURVIVED, or why it could not be tried."
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = copy_package(Path(folder).resolve()) / "tinydiff" / mutation.file
        source = path.read_text(encoding="utf-8")
        if source.count(mutation.old) != 1:
            return f"NO MATCH: the text occurs {source.count(mutation.old)} times", 0.0
        path.write_text(source.replace(mutation.old, mutation.new), encoding="utf-8")
        watch = run_tests(path.parents[1 + mutation.file.count("/")], mutation.tests)
        os.chdir(ROOT)
    result = "BROKEN: its tests cannot even be collected" if watch.broken or not (watch.ran or watch.failed) else watch.failed or "SURVIVED"
    return result, time.perf_counter() - start


def sound(tests: list[str]) -> str:
    "Without a mistake all of these tests pass; otherwise their failing says nothing."
    with tempfile.TemporaryDirectory() as folder:
        watch = run_tests(copy_package(Path(folder).resolve()), tests)
        os.chdir(ROOT)
    return watch.failed or ("cannot be collected" if watch.broken or not watch.ran else "")


def preload():
    "What takes long to import, and is not ours."
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", MPLBACKEND="agg")
    import diffusers, datasets, matplotlib.pyplot, pytest, safetensors.torch, tokenizers, torch, torchvision, transformers, tyro  # noqa: F401
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel  # noqa: F401
    from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401
    torch.set_num_threads(1)


def main(word: str = "") -> int:
    chosen = [m for m in MUTATIONS if word in " ".join((m.pitfall, m.file, *m.tests))]
    preload()
    sys.path = [p for p in sys.path if p not in (str(ROOT), "")]
    with multiprocessing.get_context("fork").Pool(os.cpu_count(), maxtasksperchild=1) as pool:
        unsound = pool.apply_async(sound, (sorted({test for m in chosen for test in m.tests}),))
        results = []
        for mutation, (result, seconds) in zip(chosen, pool.imap(verdict, chosen, chunksize=1)):
            results.append(result)
            print(f"{mutation.pitfall[:46]:46}  {mutation.file:25}  {result[:90]}  ({seconds:.0f} s)", flush=True)
        unsound = unsound.get()
    bad = [r for r in results if r.split(":")[0] in ("SURVIVED", "NO MATCH", "BROKEN")]
    print(f"{len(results) - len(bad)} of {len(results)} mistakes caught" + (f"; but {unsound} fails without any" if unsound else ""))
    return 1 if bad or unsound or not results else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
