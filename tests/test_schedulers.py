"""Schedulers against diffusers, closed forms and the pitfalls that others fell into."""
import dataclasses
import json
import math

import diffusers
import pytest
import torch

from tinydiff.schedulers import base
from tinydiff.schedulers.base import step_weights
from tinydiff.schedulers.ddpm import SOLVERS, DDPMScheduler
from tinydiff.schedulers.flow_matching import FlowMatchingScheduler, make_scheduler, scheduler_from_config

torch.set_num_threads(1)
SPACINGS = ("trailing", "leading", "linspace")
BETAS = ("scaled_linear", "linear", "squaredcos_cap_v2")
TARGETS = ("epsilon", "x0", "v_prediction")
STEPS = (1, 2, 7, 30, 50)


@pytest.fixture(autouse=True)
def seeded(seed):
    torch.manual_seed(seed)


def toy_model(dim=6):
    "A smooth model of no merit: the same answer for the same question."
    weight = torch.randn(dim, dim, dtype=torch.float64) / dim**0.5
    return lambda x, t: torch.tanh(x.double() @ weight + float(t) / 1000).to(x.dtype)


def walk(scheduler, timesteps, model, x, seed, **kwargs):
    "All the samples on the way from x to the clean end."
    generator, xs = torch.Generator().manual_seed(seed), [x]
    for t in timesteps:
        xs.append(scheduler.step(model(xs[-1], t), t, xs[-1], generator=generator, **kwargs).prev_sample)
    return xs


def assert_same_walk(ours, theirs, tolerance):
    "No sample on the way differs by more than `tolerance`, relative to the largest number in it, or to 1."
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1)


# ---- parity with diffusers -------------------------------------------------------------------------------------------

PRECISIONS = ((torch.float32, 1e-5), (torch.float64, 1e-10))


class Leap:
    "A divisor by which every whole number, divided, gives `length`."
    def __init__(self, length): self.length = length
    def __rfloordiv__(self, number): return self.length


class ChainedDDIM(diffusers.DDIMScheduler):
    """diffusers' DDIM takes T // N off a timestep and calls that the previous one. Where the steps are not all of that
    length, it is none of its timesteps. Here it is led along them."""
    def step(self, model_output, timestep, sample, **kwargs):
        chain = [*self.timesteps.tolist(), -1]
        steps, here = self.num_inference_steps, chain.index(int(timestep))
        self.num_inference_steps = Leap(chain[here] - chain[here + 1])
        out = super().step(model_output, timestep, sample, **kwargs)
        self.num_inference_steps = steps
        return out


def reference(ours, cls=None):
    """diffusers' scheduler of our configuration, with our table of alpha-bar, in float64.

    Its own is float32, and 1 - alpha-bar from it is wrong by up to 5e-4 of itself; `test_tables` compares the two.
    """
    config = ours.to_config()
    theirs = (cls or getattr(diffusers, config["_class_name"])).from_config(config)
    theirs.alphas_cumprod = ours.alphas_cumprod
    theirs.final_alpha_cumprod = ours.alphas_cumprod[0] if not ours.set_alpha_to_one else torch.ones((), dtype=torch.float64)
    return theirs


def assert_same_walks(ours, theirs, steps, seed, last=slice(None), **kwargs):
    "From the same noise, with the same fresh noise: 1e-5 in float32, 1e-10 in float64."
    ours.set_timesteps(steps), theirs.set_timesteps(steps)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    model = toy_model()
    for dtype, tolerance in PRECISIONS:
        torch.set_default_dtype(dtype)  # both draw their noise in it
        try:
            x = torch.randn(3, 6, generator=torch.Generator().manual_seed(seed))
            a, b = walk(ours, ours.timesteps, model, x, seed), walk(theirs, theirs.timesteps, model, x, seed, **kwargs)
        finally: torch.set_default_dtype(torch.float32)
        assert a[-1].dtype == b[-1].dtype == dtype
        assert_same_walk(a[:-1], b[:-1], tolerance)
        assert_same_walk(a[last][-1:], b[last][-1:], 10 * tolerance)  # diffusers' DDPM adds noise of 1e-10 in the last step, too


@pytest.mark.parametrize("beta_schedule", BETAS)
@pytest.mark.parametrize("num_train_timesteps", (100, 1000, 4000))
@pytest.mark.parametrize("zero_snr", (False, True))
def test_tables(zero_snr, num_train_timesteps, beta_schedule):
    "The betas of diffusers, which are float32, multiplied up in float64."
    ours = DDPMScheduler(num_train_timesteps=num_train_timesteps, beta_schedule=beta_schedule, prediction_type="v_prediction",
                         rescale_betas_zero_snr=zero_snr)
    theirs = diffusers.DDPMScheduler.from_config(ours.to_config())
    table = (1 - theirs.betas.double()).cumprod(0)
    torch.testing.assert_close(ours.alphas_cumprod, table, rtol=1e-5, atol=1e-6 if zero_snr else 1e-9)


@pytest.mark.parametrize("prediction_type", TARGETS)
@pytest.mark.parametrize("beta_schedule", BETAS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddpm_equals_diffusers(spacing, beta_schedule, prediction_type, seed):
    ours = DDPMScheduler(timestep_spacing=spacing, beta_schedule=beta_schedule, prediction_type=prediction_type)
    for n in STEPS: assert_same_walks(ours, reference(ours), n, seed)


@pytest.mark.parametrize("eta", (0.0, 1.0))
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("num_train_timesteps", (100, 250, 4000))
def test_other_train_lengths_equal_diffusers(num_train_timesteps, spacing, eta, seed):
    ours = DDPMScheduler(num_train_timesteps=num_train_timesteps, timestep_spacing=spacing, eta=eta)
    for n in (7, 30): assert_same_walks(ours, reference(ours, None if eta else ChainedDDIM), n, seed)


@pytest.mark.parametrize("prediction_type", TARGETS)
@pytest.mark.parametrize("spacing, steps_offset", [("trailing", 0), ("linspace", 0), ("leading", 0), ("leading", 1)])
@pytest.mark.parametrize("eta", (0.0, 0.5, 1.0))
@pytest.mark.parametrize("set_alpha_to_one", (True, False))
def test_ddim_equals_diffusers(set_alpha_to_one, eta, spacing, steps_offset, prediction_type, seed):
    ours = DDPMScheduler(eta=eta, timestep_spacing=spacing, steps_offset=steps_offset, prediction_type=prediction_type,
                         set_alpha_to_one=set_alpha_to_one)
    config = dataclasses.replace(ours, eta=0.0).to_config()
    assert config["_class_name"] == "DDIMScheduler" and config["set_alpha_to_one"] == set_alpha_to_one
    theirs = ChainedDDIM.from_config(config)
    theirs.alphas_cumprod = ours.alphas_cumprod
    if not set_alpha_to_one: theirs.final_alpha_cumprod = ours.alphas_cumprod[0]
    for n in (7, 30): assert_same_walks(ours, theirs, n, seed, eta=eta)


@pytest.mark.parametrize("prediction_type", TARGETS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_fixed_large_equals_diffusers_until_the_last_step(spacing, prediction_type, seed):
    "In the last one diffusers adds noise, and we do not."
    ours = DDPMScheduler(variance_type="fixed_large", timestep_spacing=spacing, prediction_type=prediction_type)
    assert_same_walks(ours, reference(ours), 30, seed, last=slice(-1))


@pytest.mark.parametrize("clip_sample", (False, True))
@pytest.mark.parametrize("eta", (0.0, 1.0))
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction_type", ("x0", "v_prediction"))
def test_clip_sample_and_zero_terminal_snr_equal_diffusers(prediction_type, spacing, eta, clip_sample, seed):
    "Where x_0 is clipped, eps follows it: diffusers' DDIM does that when asked."
    ours = DDPMScheduler(prediction_type=prediction_type, rescale_betas_zero_snr=True, clip_sample=clip_sample, eta=eta,
                         timestep_spacing=spacing)
    theirs = reference(ours, None if eta else ChainedDDIM)
    for n in (7, 30): assert_same_walks(ours, theirs, n, seed, **({} if eta else {"use_clipped_model_output": True}))


@pytest.mark.parametrize("ours", [DDPMScheduler(), DDPMScheduler(eta=0.0), DDPMScheduler(prediction_type="v_prediction")], ids=str)
def test_diffusers_as_it_comes(ours, seed):
    "With its own float32 table, at a step count that divides T."
    theirs = getattr(diffusers, ours.to_config()["_class_name"]).from_config(ours.to_config())
    ours.set_timesteps(50), theirs.set_timesteps(50)
    model, x = toy_model(), torch.randn(3, 6)
    assert_same_walk(walk(ours, ours.timesteps, model, x, seed), walk(theirs, theirs.timesteps, model, x, seed), 1e-4)


@pytest.mark.parametrize("spacing, steps, wrong", [("trailing", 30, 10), ("linspace", 30, 29), ("trailing", 50, 0), ("leading", 30, 0)])
def test_where_diffusers_leaves_the_chain(spacing, steps, wrong):
    "The timesteps from which arithmetic leads beside the next one, as in diffusers' DDIM; ours never does."
    scheduler = DDPMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps.tolist()
    assert sum(t - 1000 // steps != s for t, s in zip(times, times[1:])) == wrong
    assert [scheduler.previous_timestep(t) for t in times] == [*times[1:], -1]


@pytest.mark.parametrize("shift", (1.0, 3.0))
@pytest.mark.parametrize("steps", STEPS)
def test_flow_euler_equals_diffusers(steps, shift, seed):
    "float32 alone: diffusers casts every sample to it. It would shift sigma_min twice; these sigmas it shifts once."
    ours = FlowMatchingScheduler(shift=shift)
    theirs = diffusers.FlowMatchEulerDiscreteScheduler.from_config(ours.to_config())
    ours.set_timesteps(steps)
    theirs.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    torch.testing.assert_close(ours.timesteps, theirs.timesteps)
    model, x = toy_model(), torch.randn(3, 6)
    assert_same_walk(walk(ours, ours.timesteps, model, x, seed), walk(theirs, theirs.timesteps, model, x, seed), 1e-5)


@pytest.mark.parametrize("shift", (1.0, 3.0))
@pytest.mark.parametrize("steps", STEPS)
def test_flow_heun_equals_diffusers(steps, shift, seed):
    ours = FlowMatchingScheduler(shift=shift, solver="heun")
    theirs = diffusers.FlowMatchHeunDiscreteScheduler.from_config(ours.to_config())
    ours.set_timesteps(steps), theirs.set_timesteps(steps)
    assert len(ours.timesteps) == len(theirs.timesteps) == 2 * steps - 1
    times = ours.timesteps[[0, *range(1, 2 * steps - 1, 2)]]  # each once
    theirs.timesteps, sigmas = ours.timesteps, torch.cat([times / 1000, torch.zeros(1)])
    theirs.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])  # its own end at sigma_min, shifted twice
    model, x = toy_model(), torch.randn(3, 6)
    assert_same_walk(walk(ours, ours.timesteps, model, x, seed), walk(theirs, theirs.timesteps, model, x, seed), 1e-5)


@pytest.mark.parametrize("shift", (1.0, 3.0))
@pytest.mark.parametrize("solver", ("euler", "heun"))
def test_flow_in_float64(solver, shift, seed):
    "Where diffusers has float32 alone: the two methods as a textbook writes them."
    scheduler, model = FlowMatchingScheduler(shift=shift, solver=solver), toy_model()
    scheduler.set_timesteps(30)
    x = start = torch.randn(3, 6, dtype=torch.float64)
    times = [*dict.fromkeys(scheduler.timesteps.tolist()), 0.0]
    for t, s in zip(times, times[1:]):
        h, u = (s - t) / 1000, model(x, t)
        x = x + h * (u if solver == "euler" or s == 0 else (u + model(x + h * u, s)) / 2)
    assert_same_walk(walk(scheduler, scheduler.timesteps, model, start, seed)[-1:], [x], 1e-10)


@pytest.mark.parametrize("beta_schedule", BETAS)
@pytest.mark.parametrize("prediction_type", TARGETS)
def test_training_side_equals_diffusers(prediction_type, beta_schedule, seed):
    ours = DDPMScheduler(prediction_type=prediction_type, beta_schedule=beta_schedule)
    theirs = reference(ours, diffusers.DDPMScheduler)
    t = torch.randint(0, 1000, (64,))
    for dtype, tolerance in PRECISIONS:
        x_0, noise = torch.randn(64, 3, 4, dtype=dtype), torch.randn(64, 3, 4, dtype=dtype)
        assert_same_walk([ours.add_noise(x_0, noise, t.float()), ours.get_velocity(x_0, noise, t)],
                         [theirs.add_noise(x_0, noise, t), theirs.get_velocity(x_0, noise, t)], tolerance)
        right = {"epsilon": noise, "x0": x_0, "v_prediction": theirs.get_velocity(x_0, noise, t)}[prediction_type]
        assert_same_walk([ours.get_target(x_0, noise, t)], [right], tolerance)


@pytest.mark.parametrize("shift", (1.0, 3.0))
def test_flow_training_side_equals_diffusers(shift, seed):
    flow, x_0, noise = FlowMatchingScheduler(shift=shift), torch.randn(64, 3, 4), torch.randn(64, 3, 4)
    theirs = diffusers.FlowMatchEulerDiscreteScheduler.from_config(flow.to_config())
    times = theirs.timesteps[torch.randint(0, 1000, (64,))]
    assert_same_walk([flow.add_noise(x_0, noise, times)], [theirs.scale_noise(x_0, times, noise)], 1e-5)
    assert torch.equal(flow.get_target(x_0, noise, times), noise - x_0)


# ---- configurations --------------------------------------------------------------------------------------------------

SCHEDULERS = [DDPMScheduler(), DDPMScheduler(eta=0.0, variance_type="fixed_large"), DDPMScheduler(eta=0.3),
              DDPMScheduler(num_train_timesteps=100, prediction_type="x0"), DDPMScheduler(set_alpha_to_one=False),
              DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True),
              FlowMatchingScheduler(), FlowMatchingScheduler(shift=3.0, weighting_scheme="logit_normal", logit_mean=0.5),
              FlowMatchingScheduler(solver="heun")]


@pytest.mark.parametrize("ours", SCHEDULERS, ids=str)
def test_config_survives_json_and_diffusers(ours, caplog):
    config = json.loads(json.dumps(ours.to_config()))
    assert scheduler_from_config(config) == ours
    assert type(ours).from_config(json.loads(json.dumps(ours.config))) == ours
    theirs = getattr(diffusers, config["_class_name"]).from_config(config)  # diffusers reads ours ...
    assert "will be ignored" not in caplog.text
    again = scheduler_from_config({k: v for k, v in theirs.config.items()})  # ... and we read what it wrote
    for name in ("num_train_timesteps", "prediction_type"): assert getattr(again, name) == getattr(ours, name)
    if isinstance(ours, DDPMScheduler):
        torch.testing.assert_close(theirs.alphas_cumprod.double(), ours.alphas_cumprod, rtol=1e-3, atol=1e-6)


def test_stable_diffusion_config():
    config = {"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012, "beta_start": 0.00085,
              "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "set_alpha_to_one": False,
              "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None, "clip_sample": False}
    scheduler = scheduler_from_config(config)
    scheduler.set_timesteps(50)
    assert scheduler.timesteps[[0, -1]].tolist() == [981, 1]  # "leading", which this file does not even mention
    assert scheduler.eta == 0 and not scheduler.set_alpha_to_one and not scheduler.clip_sample


@pytest.mark.parametrize("name", SOLVERS)
def test_what_other_solvers_files_may_not_ask(name):
    "What changes the road is refused; what is none of theirs, or about the steps, counts for nothing."
    file = {"_class_name": name, "beta_schedule": "scaled_linear", "clip_sample": True, "clip_sample_range": 2.0, "solver_order": 3}
    assert not scheduler_from_config(file).clip_sample
    for key, value in (("use_flow_sigmas", True), ("timestep_type", "continuous"), ("trained_betas", [0.1])):
        with pytest.raises(ValueError, match=f"{key} must be"): scheduler_from_config({**file, key: value})


@pytest.mark.parametrize("name", ["ddpm", "flow"])
def test_a_whole_float_is_a_number_of_timesteps(name):
    scheduler = make_scheduler(name, num_train_timesteps=100.0)
    scheduler.set_timesteps(5.0)
    assert scheduler == make_scheduler(name, num_train_timesteps=100) and len(scheduler.timesteps) == 5
    with pytest.raises(ValueError, match="num_train_timesteps must be a whole number of at least 1; got '1000'"): make_scheduler(name, num_train_timesteps="1000")


@pytest.mark.parametrize("name", SOLVERS)
def test_other_solvers_files_are_walked_as_ddim(name):
    "As diffusers' own DDIM reads such a file: the same timesteps, the same alpha-bar."
    file = getattr(diffusers, name)(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    ours, theirs = scheduler_from_config(json.loads(file.to_json_string())), diffusers.DDIMScheduler.from_config(file.config, timestep_spacing="linspace")
    ours.set_timesteps(7); theirs.set_timesteps(7)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist() and ours.eta == 0 and ours.set_alpha_to_one and not ours.clip_sample
    torch.testing.assert_close(theirs.alphas_cumprod.double(), ours.alphas_cumprod, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler"))
def test_what_a_file_does_not_say_means_what_diffusers_means(name):
    ours, theirs = scheduler_from_config({"_class_name": name}), getattr(diffusers, name)()
    common = set(ours.config) & set(theirs.config)
    assert len(common) >= 2 and all(ours.config[key] == theirs.config[key] for key in common)


@pytest.mark.parametrize("config, word", [
    (dict(name="ddpm", beta_begin=0.1), "beta_begin"), (dict(name="flow", eta=1.0), "eta"),
    (dict(name="euler"), "scheduler must be one of ddpm, flow"),
    (dict(name="ddpm", prediction_type="sample"), "prediction_type must be one of epsilon, x0, v_prediction"),
    (dict(name="ddpm", prediction_type="flow"), "prediction_type"),
    (dict(name="ddpm", beta_schedule="quadratic"), "beta_schedule"),
    (dict(name="ddpm", variance_type="learned"), "variance_type"),
    (dict(name="ddpm", timestep_spacing="even"), "timestep_spacing"),
    (dict(name="ddpm", rescale_betas_zero_snr=True), "rescale_betas_zero_snr"),
    (dict(name="ddpm", eta=1.5), "eta"), (dict(name="ddpm", beta_end=1.5), "betas"),
    (dict(name="ddpm", num_train_timesteps=0), "num_train_timesteps"), (dict(name="ddpm", num_train_timesteps=9.5), "num_train_timesteps"),
    (dict(name="ddpm", num_train_timesteps=1, beta_end=0.0009, rescale_betas_zero_snr=True, prediction_type="x0"), "at least 2"),
    (dict(name="ddpm", beta_start=-1.0), "beta_start and beta_end must be above 0"), (dict(name="flow", num_train_timesteps=0.5), "num_train_timesteps"),
    (dict(name="flow", shift=math.inf), "shift"), (dict(name="flow", logit_mean=math.nan), "logit_mean"), (dict(name="ddpm", steps_offset=-5), "steps_offset"),
    (dict(name="flow", solver="rk4"), "solver"), (dict(name="flow", shift=0), "shift"),
    (dict(name="flow", weighting_scheme="cosmap"), "weighting_scheme")], ids=str)
def test_refusals(config, word):
    with pytest.raises(ValueError, match=word) as error: make_scheduler(**config)
    assert "\n" not in str(error.value)


def test_refuses_what_it_cannot_do_in_a_diffusers_config():
    for change in (dict(thresholding=True), dict(trained_betas=[0.1]), dict(no_such_key=1), dict(clip_sample_range=2.0)):
        with pytest.raises(ValueError, match=next(iter(change))):
            scheduler_from_config(DDPMScheduler().to_config() | change)
    for change in (dict(use_dynamic_shifting=True), dict(use_karras_sigmas=True), dict(no_such_key=1)):
        with pytest.raises(ValueError, match=next(iter(change))):
            scheduler_from_config(FlowMatchingScheduler().to_config() | change)
    with pytest.raises(ValueError, match="_class_name"): scheduler_from_config({})
    with pytest.raises(ValueError, match="LCMScheduler"): scheduler_from_config({"_class_name": "LCMScheduler"})


@pytest.mark.parametrize("scheduler, steps", [(DDPMScheduler(), 1001), (DDPMScheduler(), 0), (DDPMScheduler(), 2.5), (FlowMatchingScheduler(), 0), (FlowMatchingScheduler(), "7")])
def test_refuses_step_counts(scheduler, steps):
    with pytest.raises(ValueError, match="num_inference_steps"): scheduler.set_timesteps(steps)


def test_refuses_a_timestep_outside_the_chain():
    scheduler = DDPMScheduler()
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match="500"): scheduler.step(torch.zeros(1, 2), 500, torch.zeros(1, 2))


def test_ddpm_knows_no_time_beyond_its_last():
    "A time in [0, 1000], as flow matching has them, is not the clean end of the table."
    scheduler = DDPMScheduler()
    last, beyond = (scheduler.alpha_sigma(torch.tensor(t)) for t in ((999.0, 999.0), (999.6, 1000.0)))
    for a, b in zip(last, beyond): assert torch.equal(a, b)
    assert [c.item() for c in scheduler.alpha_sigma(torch.tensor([-1.0]))] == [1, 0]


# ---- pitfalls --------------------------------------------------------------------------------------------------------

def test_stable_diffusion_alpha_bar():
    assert abs(DDPMScheduler().alphas_cumprod[999].item() - 0.0046601) < 5e-8
    assert abs(DDPMScheduler(beta_schedule="linear").alphas_cumprod - DDPMScheduler().alphas_cumprod).max() > 0.1


@pytest.mark.parametrize("beta_schedule", BETAS[:2])
def test_betas_follow_the_number_of_timesteps(beta_schedule):
    log_snr = [DDPMScheduler(beta_schedule=beta_schedule, num_train_timesteps=n).get_snr(torch.tensor(n - 1)).log()
               for n in (100, 1000, 4000)]
    assert max(log_snr) - min(log_snr) < 0.4  # without the factor 1000 / T it would be 5 and more


def test_zero_terminal_snr():
    scheduler = DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert scheduler.get_snr(torch.tensor(999)) == 0
    torch.testing.assert_close(scheduler.alphas_cumprod[0], DDPMScheduler().alphas_cumprod[0])


CHAINS = [DDPMScheduler(timestep_spacing=s) for s in SPACINGS] + [FlowMatchingScheduler(), FlowMatchingScheduler(shift=3.0)]


@pytest.mark.parametrize("scheduler", CHAINS, ids=str)
@pytest.mark.parametrize("steps", (7, 30, 50, 1000))
def test_steps_form_a_chain(scheduler, steps):
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps.tolist()
    assert len(times) == steps and times == sorted(set(times), reverse=True)
    assert [scheduler.previous_timestep(t) for t in scheduler.timesteps] == times[1:] + [scheduler.clean_timestep]
    assert scheduler.timesteps.dtype == torch.float32 and 0 <= times[-1] and times[0] <= 1000


@pytest.mark.parametrize("scheduler", [*CHAINS, DDPMScheduler(variance_type="fixed_large"),
                                       FlowMatchingScheduler(solver="heun")], ids=str)
def test_last_step_is_deterministic_and_clean(scheduler, seed):
    scheduler.set_timesteps(7)
    x, m = torch.randn(4, 3), torch.randn(4, 3)
    out = [scheduler.step(m, scheduler.timesteps[-1], x) for _ in range(2)]
    assert torch.equal(out[0].prev_sample, out[1].prev_sample)
    assert torch.equal(out[0].prev_sample, out[0].pred_original_sample)
    clean = torch.tensor([scheduler.clean_timestep])
    assert [c.item() for c in scheduler.alpha_sigma(clean)] == [1, 0]


@pytest.mark.parametrize("shift", (1.0, 3.0))
def test_shift_is_applied_once(shift):
    scheduler = FlowMatchingScheduler(shift=shift)
    first = scheduler.timesteps.clone()
    scheduler.set_timesteps(1000)
    assert torch.equal(scheduler.timesteps, first)
    assert abs(first[-1] - 1000 * shift * 0.001 / (1 + (shift - 1) * 0.001)) < 1e-6


@pytest.mark.parametrize("scheduler", [
    DDPMScheduler(), DDPMScheduler(eta=0.0), DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True),
    DDPMScheduler(prediction_type="x0", timestep_spacing="linspace", beta_schedule="squaredcos_cap_v2"),
    FlowMatchingScheduler(), FlowMatchingScheduler(solver="heun", shift=3.0)], ids=str)
def test_gaussian_oracle(scheduler, seed):
    "Data N(0, 1) has an exact denoiser, E[x_0 | x_t] = alpha x_t / (alpha^2 + sigma^2): samples must have std 1."
    scheduler.set_timesteps(1000)  # each step loses a little of the variance, in proportion to its length squared
    x = torch.randn(20_000 if scheduler.eta else 100, dtype=torch.float64)
    x = (x - x.mean()) / x.std()
    for t in scheduler.timesteps:
        alpha, sigma = scheduler.coefficients(t, x)
        x_0 = alpha * x / (alpha**2 + sigma**2)
        eps = sigma * x / (alpha**2 + sigma**2)
        x = scheduler.step(scheduler.get_target(x_0, eps, t), t, x).prev_sample
    assert abs(x.std() - 1) < (0.02 if scheduler.eta else 3e-3)


# ---- closed forms: data whose exact denoiser is known ----------------------------------------------------------------

PURE = dict(num_train_timesteps=4096, prediction_type="v_prediction", rescale_betas_zero_snr=True)  # timestep T - 1 is pure noise
SAMPLERS = {"DDPM": (DDPMScheduler(**PURE), 1), "DDIM, eta 0.5": (DDPMScheduler(**PURE, eta=0.5), 1), "DDIM": (DDPMScheduler(**PURE, eta=0.0), 1),
            "Euler": (FlowMatchingScheduler(), 1), "Heun": (FlowMatchingScheduler(solver="heun"), 2)}
each_sampler = pytest.mark.parametrize("name", SAMPLERS)


def denoised(log_density, x, alpha, sigma):
    "E[x_0 | x_t] = (x_t + sigma^2 grad log p_t(x_t)) / alpha (Tweedie's formula; Efron 2011), and the noise that goes with it."
    x = x.clone().requires_grad_()
    score, = torch.autograd.grad(log_density(x).sum(), x)
    return (x.detach() + sigma**2 * score) / alpha, -sigma * score


def exact(scheduler, make_log_density):
    "The model that answers with the exact mean of the target; where there is no signal, x_0 is the mean of the data."
    def model(x, t):
        alpha, sigma = scheduler.coefficients(t, x)
        if alpha == 0: alpha = alpha + 1e-9
        return scheduler.get_target(*denoised(make_log_density(alpha, sigma), x, alpha, sigma), t)
    return model


def fresh_noise(scheduler, t):
    "The standard deviation of what a step adds."
    return scheduler.step_weights(float(t), scheduler.previous_timestep(t))[2]


def silent_step(monkeypatch, scheduler, model, t, x):
    "A step without its fresh noise."
    monkeypatch.setattr(base, "random_like", lambda draw, shape, device, generator=None: torch.zeros(shape))
    return scheduler.step(model(x, t), t, x).prev_sample


def orders(errors):
    "By which power of 2 an error falls where the steps are doubled."
    return [math.log2(a / b) for a, b in zip(errors, errors[1:])]


@each_sampler
def test_gaussian_with_full_covariance(name, seed, monkeypatch):
    "Each step is linear here: mean and covariance follow from where zero and the unit vectors go. No sample, no luck."
    scheduler, order = SAMPLERS[name]
    mean = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    root = torch.tensor([[0.9, 0, 0], [0.5, 0.4, 0], [-0.3, 0.2, 0.6]], dtype=torch.float64)
    covariance, eye = root @ root.T, torch.eye(3, dtype=torch.float64)
    normal = torch.distributions.MultivariateNormal
    model = exact(scheduler, lambda a, s: normal(a * mean, a**2 * covariance + s**2 * eye).log_prob)
    errors = []
    for steps in (32, 64, 128):
        scheduler.set_timesteps(steps)
        start = points = torch.cat([torch.zeros(1, 3, dtype=torch.float64), eye])
        m, P = start[0], eye
        for t in scheduler.timesteps:
            c, points = fresh_noise(scheduler, t), silent_step(monkeypatch, scheduler, model, t, points)
            if c:  # otherwise more steps may follow at once, as Heun's must
                A = points[1:] - points[0]
                m, P, points = m @ A + points[0], A.T @ P @ A + c**2 * eye, start
        A = points[1:] - points[0]
        errors.append(max((m @ A + points[0] - mean).abs().max().item(), (A.T @ P @ A - covariance).abs().max().item()))
    assert errors[-1] < (0.1 if order == 1 else 2e-3), errors
    assert all(abs(o - order) < 0.3 for o in orders(errors)), (errors, orders(errors))


WEIGHTS, MEANS, WIDTHS = (torch.tensor(v, dtype=torch.float64) for v in ([0.3, 0.5, 0.2], [-1.5, 0.4, 1.6], [0.4, 0.5, 0.3]))


@each_sampler
def test_mixture_of_gaussians(name, seed, monkeypatch):
    "The density itself is carried along a fine grid: points move with the step, fresh noise is a Gaussian kernel."
    scheduler, order = SAMPLERS[name]
    D = torch.distributions
    mixture = lambda a, s: D.MixtureSameFamily(D.Categorical(WEIGHTS), D.Normal(a * MEANS, (a**2 * WIDTHS**2 + s**2).sqrt()))
    model = exact(scheduler, lambda a, s: lambda x: mixture(a, s).log_prob(x))
    mean, variance = mixture(torch.ones(()), torch.zeros(())).mean, mixture(torch.ones(()), torch.zeros(())).variance
    grid = torch.linspace(-6, 6, 801, dtype=torch.float64)
    mass = D.Normal(0.0, 1.0).log_prob(grid).exp() * (grid[1] - grid[0])
    errors = []
    for steps in (16, 32, 64):
        scheduler.set_timesteps(steps)
        x, p = grid, mass
        for t in scheduler.timesteps:
            c, x = fresh_noise(scheduler, t), silent_step(monkeypatch, scheduler, model, t, x)
            if c: x, p = grid, D.Normal(x[:, None], c).log_prob(grid).exp().T @ p * (grid[1] - grid[0])
        assert abs(p.sum() - 1) < 1e-6
        errors.append(max(abs(m - e).item() for m, e in [((p * x).sum(), mean), ((p * x**2).sum() - (p * x).sum() ** 2, variance)]))
    assert errors[-1] < (0.1 if order == 1 else 2e-3), errors
    assert all(abs(o - order) < 0.35 for o in orders(errors)), (errors, orders(errors))


@pytest.mark.parametrize("eta", (0.0, 0.3, 1.0))
def test_step_keeps_the_marginal(eta, seed):
    "Whatever eta: with the true x_0 and eps, x_s has the mean and the variance of the path at s."
    scheduler = DDPMScheduler(eta=eta)
    for t, s in ((999, 979), (500, 100), (20, -1)):
        (alpha_t, alpha_s), (sigma_t, sigma_s) = scheduler.alpha_sigma(torch.tensor([t, s], dtype=torch.float64))
        a, b, c = step_weights(*map(float, (alpha_t, sigma_t, alpha_s, sigma_s)), eta)
        assert abs(a - alpha_s) < 1e-12 and abs(b**2 + c**2 - sigma_s**2) < 1e-12


def test_ddpm_step_is_the_posterior(seed):
    "Ho et al. 2020, eq. 6 and 7, for every pair of neighbors."
    scheduler = DDPMScheduler()
    bar = torch.cat([scheduler.alphas_cumprod, torch.ones(1, dtype=torch.float64)])
    x, x_0 = 1.3, -0.7
    for t in range(1, 1000):
        beta = 1 - bar[t] / bar[t - 1]
        mean = (bar[t - 1].sqrt() * beta * x_0 + (1 - beta).sqrt() * (1 - bar[t - 1]) * x) / (1 - bar[t])
        variance = (1 - bar[t - 1]) / (1 - bar[t]) * beta
        a, b, c = scheduler.step_weights(t, t - 1)
        eps = (x - bar[t].sqrt() * x_0) / (1 - bar[t]).sqrt()
        assert abs(a * x_0 + b * eps - mean) < 1e-9 and abs(c**2 - variance) < 1e-12


@pytest.mark.parametrize("scheduler", [*[DDPMScheduler(prediction_type=p) for p in TARGETS], FlowMatchingScheduler()], ids=str)
def test_predict_inverts_get_target(scheduler, seed):
    x_0, noise = torch.randn(64, 2, 5, dtype=torch.float64), torch.randn(64, 2, 5, dtype=torch.float64)
    t = scheduler.sample_timesteps(64).clamp(min=1)
    x_t = scheduler.add_noise(x_0, noise, t)
    got = scheduler.predict(scheduler.get_target(x_0, noise, t), t, x_t)
    for a, b in zip(got, (x_0, noise)): torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def test_min_snr_weights():
    t = torch.arange(1000)
    for prediction_type, weight in (("epsilon", lambda w, snr: w / snr), ("x0", lambda w, snr: w),
                                    ("v_prediction", lambda w, snr: w / (snr + 1))):
        scheduler = DDPMScheduler(prediction_type=prediction_type)
        snr = scheduler.get_snr(t)
        torch.testing.assert_close(scheduler.loss_weight(t, snr_gamma=5.0), weight(snr.clamp(max=5), snr), rtol=1e-4, atol=0)
        assert (scheduler.loss_weight(t) == 1).all()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32, torch.float64))
@pytest.mark.parametrize("scheduler", (DDPMScheduler(), FlowMatchingScheduler()), ids=str)
def test_dtypes_and_shapes(scheduler, dtype, seed):
    x_0, noise = torch.randn(4, 3, 8, 8).to(dtype), torch.randn(4, 3, 8, 8).to(dtype)
    t = torch.tensor([1, 300, 600, 999])
    exact = scheduler.add_noise(x_0.double(), noise.double(), t)
    for times in (t, t.float(), t.double()):
        noisy = scheduler.add_noise(x_0, noise, times)
        assert noisy.dtype == dtype
        torch.testing.assert_close(noisy, exact.to(dtype), rtol=2e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-5)
    one = scheduler.timesteps[10]
    out = scheduler.step(noise, one, x_0)
    assert out.prev_sample.dtype == out.pred_original_sample.dtype == dtype
    for single in (float(one), one.item()): assert torch.equal(scheduler.step(noise, single, x_0).pred_original_sample, out.pred_original_sample)


@pytest.mark.parametrize("scheduler", (DDPMScheduler(), FlowMatchingScheduler(), FlowMatchingScheduler(weighting_scheme="logit_normal", logit_mean=0.5, logit_std=0.8)), ids=str)
def test_a_batch_has_one_timestep_of_each_quantile(scheduler):
    "In random order; a row by itself has the whole distribution."
    draw = lambda seed, n=20: scheduler.sample_timesteps(n, generator=torch.Generator().manual_seed(seed)) / 1000
    uniform = (lambda s: torch.special.ndtr((s.logit() - 0.5) / 0.8)) if getattr(scheduler, "weighting_scheme", "") == "logit_normal" else lambda s: s
    batches = uniform(torch.stack([draw(seed) for seed in range(1000)])) + 1e-6
    parts = (batches * 20).floor()
    assert torch.equal(parts.sort(dim=1).values, torch.arange(20.0).expand(1000, 20))
    for row in (0, 19):
        assert (parts[:, row].long().bincount(minlength=20) - 50).abs().max() < 30, "50 in each part, up to four standard deviations"
        assert abs(batches[:, row].mean() - 0.5) < 0.04
    assert abs(torch.corrcoef(parts.T)[0, 1]) < 0.15
    assert uniform(torch.cat([draw(seed, 1) for seed in range(1000)])).std().sub(12**-0.5).abs() < 0.02, "a batch of one"


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float64))
@pytest.mark.parametrize("name", ("ddpm", "flow"))
def test_random_timesteps_are_float32_whatever_the_default(name, dtype):
    scheduler, before = make_scheduler(name), torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        timesteps = scheduler.sample_timesteps(256)
    finally:
        torch.set_default_dtype(before)
    assert timesteps.dtype == torch.float32 and len(timesteps.unique()) == 256


def test_random_timesteps_depend_on_the_generator_alone():
    for scheduler in (DDPMScheduler(), FlowMatchingScheduler(), FlowMatchingScheduler(weighting_scheme="logit_normal")):
        draw = [scheduler.sample_timesteps(4096, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
        assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])
        assert draw[0].dtype == torch.float32 and 0 <= draw[0].min() and draw[0].max() <= 1000
    assert (draw[0] / 1000).logit().mean().abs() < 0.1 and abs((draw[0] / 1000).logit().std() - 1) < 0.1
    assert (DDPMScheduler().sample_timesteps(4096) % 1 == 0).all()


def test_heun_forgets_a_walk_that_was_left(seed):
    scheduler, model = FlowMatchingScheduler(solver="heun"), toy_model()
    scheduler.set_timesteps(5)
    x = torch.randn(2, 6)
    whole = walk(scheduler, scheduler.timesteps, model, x, seed)[-1]
    walk(scheduler, scheduler.timesteps[:1], model, x, seed)  # stops between the two halves of a step
    assert torch.equal(walk(scheduler, scheduler.timesteps, model, x, seed)[-1], whole)


def test_no_noise_without_eta_whatever_its_variance():
    assert DDPMScheduler(eta=0.0, variance_type="fixed_large").step_weights(500, 400)[2] == 0
