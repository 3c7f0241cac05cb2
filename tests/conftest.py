"Shared by all tests: offline, on the CPU (where results are exact), one thread a worker, fresh random inputs with a printed seed, a closing count."
import os

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")

import pytest


@pytest.fixture
def seed():
    "A fresh seed, printed where a test fails; `TINYDIFF_SEED=123 pytest ...` repeats it."
    value = int(os.environ.get("TINYDIFF_SEED") or int.from_bytes(os.urandom(4), "little"))
    print(f"TINYDIFF_SEED={value}")
    return value


@pytest.fixture
def rng(seed):
    "A torch.Generator on the CPU with that seed."
    import torch
    return torch.Generator().manual_seed(seed)


def pytest_unconfigure(config):
    "The last line: N passed, N failed."
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or hasattr(config, "workerinput"):
        return
    count = {kind: len(reporter.stats.get(kind, [])) for kind in ("passed", "failed", "error", "skipped")}
    skipped = f", {count['skipped']} skipped" if count["skipped"] else ""
    reporter.write_line(f"{count['passed']} passed, {count['failed'] + count['error']} failed{skipped}")
