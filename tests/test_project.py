"The project as a whole: notebooks run, and package, README, site and wheel are what the notebooks say."
import ast
import filecmp
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
import zipfile
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, packages_distributions, requires, version
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
LESSONS = [path for path in NOTEBOOKS if path.stem != "index"]
BIN = Path(sys.executable).parent
EXECUTION_SECONDS = 300
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
each_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)


def run(*command, cwd=ROOT):
    "Run a command; where it fails, its output is the message."
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, timeout=EXECUTION_SECONDS)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def copy_tree(target):
    "The files of the project that make the package, the README and the site, without what was built."
    for name in ("settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for name in ("nbs", "tinydiff"):
        shutil.copytree(ROOT / name, target / name, ignore=ignore)
    return target


def out_of_step(left, right):
    "The .py files that differ between two folders, or stand in one alone."
    names = {path.relative_to(top).as_posix() for top in (left, right) for path in top.rglob("*.py")}
    same, _, _ = filecmp.cmpfiles(left, right, names, shallow=False)
    return sorted(names - set(same))


# --- notebooks

@each_notebook
def test_notebook_runs(path):
    "Top to bottom in a clean kernel; `#| eval: false` cells are left out. Processes are not forked, as on macOS and with Python 3.14: what a notebook defines they do not know."
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell("import multiprocessing; multiprocessing.set_start_method('forkserver')"))
    for cell in notebook.cells:
        if cell.cell_type == "code" and re.search(r"^#\|\s*eval:\s*false", cell.source, re.M):
            cell.metadata["tags"] = ["skip-execution"]
    deadline = time.monotonic() + EXECUTION_SECONDS
    client = NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}},
                            timeout_func=lambda cell: max(1, int(deadline - time.monotonic())))
    client.widget_registry = {}  # nobody looks at the widgets; answering them can stall the client until its timeout
    client.execute()


@each_notebook
def test_notebook_is_tidy(path):
    "Committed after a clean run, in short cells."
    cells = code_cells(path)
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output.ename for output in outputs if output.output_type == "error"]
    assert outputs or not cells, "no outputs: run it before the commit"
    for cell in cells:
        lines = [line for line in cell.source.splitlines() if line.strip() and not line.startswith("#|")]
        assert len(lines) <= 40, f"{len(lines)} lines in the cell that starts with {lines[0]!r}"
    assert path.stat().st_size < 1_500_000


def imported(path):
    "The packages that a notebook imports, wherever in its cells."
    names = set()
    for cell in code_cells(path):
        for node in ast.walk(ast.parse("".join(line + "\n" for line in cell.source.splitlines() if not line.startswith(("%", "!"))))):
            if isinstance(node, ast.Import): names |= {alias.name.split(".")[0] for alias in node.names}
            if isinstance(node, ast.ImportFrom) and node.level == 0: names.add(node.module.split(".")[0])
    return names - {*sys.stdlib_module_names, "tinydiff", "google"}  # google.colab, in Colab


def brought_by(extra):
    "The names of all packages that `pip install tinydiff[extra]` brings, and their packages'."
    found, waiting = set(), [Requirement(f"tinydiff[{extra}]")]
    while waiting:
        need = waiting.pop()
        for more in (requires(need.name) or []):
            more = Requirement(more)
            if any(more.marker is None or more.marker.evaluate({"extra": which}) for which in need.extras or {""}) and canonicalize_name(more.name) not in found:
                with suppress(PackageNotFoundError):
                    found.add(canonicalize_name(version(more.name) and more.name))
                    waiting.append(more)
    return found


@each_lesson
def test_notebook_needs_what_is_installed_with_it(path):
    "`make lab` and `pip install 'tinydiff[notebooks]'` are enough; in Colab, what its first cell installs, and what a notebook runs on."
    packages = packages_distributions()
    needed = {canonicalize_name(packages[name][0]) for name in imported(path)} - {"tensorboard", "voila"}  # those say so themselves
    assert needed <= brought_by("notebooks"), needed - brought_by("notebooks")
    install = next(cell.source for cell in code_cells(path) if "google.colab" in cell.source)
    for name in needed - brought_by("") - brought_by("app"): assert re.search(rf"\b{name}\b", install), f"{name} is not installed in Colab"


@each_lesson
def test_notebook_opens_in_colab(path):
    cells = nbformat.read(path, as_version=4).cells
    badges = [cell for cell in cells if "colab-badge.svg" in cell.source]
    assert len(badges) == 1 and badges[0].source.rstrip().endswith(f"/blob/main/nbs/{path.name})")
    assert any('"google.colab" in sys.modules' in cell.source for cell in cells if cell.cell_type == "code")


@each_lesson
def test_notebook_ends_with_exercises(path):
    "Numbered from 1, each with a check; and a solution that the notebook runs against the check."
    cells = nbformat.read(path, as_version=4).cells
    start = next(i for i, cell in enumerate(cells) if re.search(r"^## Exercises$", cell.source, re.M))
    text = "\n".join(cell.source for cell in cells[start:] if cell.cell_type == "markdown")
    code = [cell.source for cell in cells[start:] if cell.cell_type == "code"]
    numbers, checks = re.findall(r"^\*\*(\d+)\. ", text, re.M), re.findall(r"^def (check_\w+)", "\n".join(code), re.M)
    assert numbers == [str(i + 1) for i in range(len(checks))] and len(checks) >= 2
    for check in checks:
        assert any("code-fold" in source and re.search(rf"(assert|test_eq\().*{check}\(", source) for source in code), f"{check}: no solution that must pass it"


def test_notebooks_are_clean(tmp_path):
    "`nbdev_clean` finds nothing to do."
    copy_tree(tmp_path)
    run(BIN / "nbdev_clean", cwd=tmp_path)
    _, changed, _ = filecmp.cmpfiles(ROOT / "nbs", tmp_path / "nbs", [path.name for path in NOTEBOOKS], shallow=False)
    assert not changed, f"run nbdev_clean: {changed}"


# --- the package is what the notebooks export

@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    "A copy of the project in which nbdev has exported everything afresh."
    copy = copy_tree(tmp_path_factory.mktemp("exported"))
    for module in (copy / "tinydiff").rglob("*.py"):
        if module.name != "__init__.py":
            module.unlink()
    run(BIN / "nbdev_export", cwd=copy)
    return copy


def test_package_is_in_step(exported):
    changed = out_of_step(ROOT / "tinydiff", exported / "tinydiff")
    assert not changed, f"notebooks and package differ: change the notebook and run nbdev_export: {changed}"
    for name in ("pyproject.toml", "settings.ini"):
        assert (exported / name).read_bytes() == (ROOT / name).read_bytes(), f"nbdev_export rewrites {name}"


def test_hand_edit_is_noticed(exported, tmp_path):
    edited = tmp_path / "tinydiff"
    shutil.copytree(exported / "tinydiff", edited)
    module = next(path for path in sorted(edited.rglob("*.py")) if not path.name.startswith("_"))
    module.write_text(module.read_text() + "\n# by hand\n")
    (edited / "by_hand.py").touch()
    assert out_of_step(edited, exported / "tinydiff") == sorted(["by_hand.py", module.relative_to(edited).as_posix()])


def test_readme_is_in_step():
    readme = runpy.run_path(str(ROOT / ".github/site/readme.py"))["readme"]
    assert (ROOT / "README.md").read_text(encoding="utf-8") == readme(), "run `make readme`"


IMPORT_ALL = """
import importlib, pkgutil, sys
blocked = set(sys.argv[1].split(","))
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked: raise ModuleNotFoundError(f"{name} is blocked", name=name)
sys.meta_path.insert(0, Block())
import tinydiff
for module in pkgutil.walk_packages(tinydiff.__path__, "tinydiff."):
    if module.name.split(".")[-1] not in ("playground", "_modidx"): print(importlib.import_module(module.name).__name__)
"""


def test_package_needs_no_notebook_tools():
    "Every module but the playground, which is made of widgets, imports where none of these is installed."
    blocked = ("nbdev,fastcore,execnb,nbformat,jupyter,jupyter_client,IPython,ipykernel,ipywidgets,matplotlib,"
               "tensorboard,diffusers,transformers")
    modules = run(sys.executable, "-c", IMPORT_ALL, blocked).split()
    assert len(modules) >= 3, modules


def test_wheel_holds_modules_and_weights(tmp_path):
    copy_tree(tmp_path)
    run(sys.executable, "-c", "from setuptools import build_meta; build_meta.build_wheel('.')", cwd=tmp_path)
    packed = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    files = [path for path in (ROOT / "tinydiff").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    missing = {path.relative_to(ROOT).as_posix() for path in files} - packed
    assert not missing, f"not in the wheel: {sorted(missing)}"


# --- README and site

def exam_scores(name, number=0):
    "What `tinydiff-eval` wrote about a model."
    return json.loads((ROOT / f"tinydiff/pretrained/exams/{name}.json").read_text())["exams"][number]["scores"]


def test_results_table_is_of_the_bundled_exams():
    "The SceneEval table beside the weights, category by category."
    text = (ROOT / "tinydiff/pretrained/README.md").read_text(encoding="utf-8")
    lines = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in text.split("| | flow, seen |")[1].split("\n\n")[0].splitlines()[2:]]
    scores = {name: exam_scores(name) for name in ("flow", "ddpm")}
    cell = lambda table, name: "{:.1f} [{:.1f}, {:.1f}]".format(*table[name]) if name in table else "-"
    assert len(lines) == 9
    for name, *found, ceiling, chance in lines:
        assert found == [cell(scores[model]["model"][group], name) for model in ("flow", "ddpm") for group in ("seen", "heldout")], name
        assert [ceiling, chance] == [f"{scores['flow'][who]['seen'][name][0]:.1f}" for who in ("ceiling", "chance")], name


@pytest.mark.parametrize("model, exam", [("`tiny`", ["flow"]), ("`tiny-ddpm`", ["ddpm"]), ("`tiny-128`", ["flow-128"]), ("the same, `--seed 1`", ["laptop-end", 1]),
                                         ("`--stage all`, one core of D, 66 minutes", ["laptop-end"]), ("the same, `--seed 0 --scheduler ddpm`", ["laptop-ddpm"])])
def test_readme_has_the_scores_of_the_exams(model, exam):
    table = exam_scores(*exam)["model"]
    cells = ["100" if low == 100 else f"{mean:.1f} [{low:.1f}, {high:.1f}]" for mean, low, high in (table[group]["overall"] for group in ("seen", "heldout"))]
    assert f"| {model} | {cells[0]} | {cells[1]} |" in (ROOT / "README.md").read_text(encoding="utf-8")


def readme_commands():
    "(command, its flags) for every line of a README code block that calls one of our console scripts."
    text = (ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else ""
    blocks = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)).replace("\\\n", " ")
    found = re.findall(r"^(?:\$ )?(?:uv run )?(?:\S*/bin/)?(tinydiff-\w+)(.*)", blocks, re.M)
    return [(command, re.findall(r"(?<=\s)--[\w-]+", rest)) for command, rest in found]


@pytest.mark.parametrize("command", sorted({command for command, _ in readme_commands()}))
def test_readme_commands_have_these_flags(command):
    known = set(re.findall(r"--[\w-]+", run(BIN / command, "--help").replace("_", "-")))
    used = {flag.replace("_", "-") for name, flags in readme_commands() if name == command for flag in flags}
    assert used <= known | {"--help"}, f"{command} has no {sorted(used - known)}"


def test_site_builds(tmp_path):
    "Every page, with warnings as errors: a dead link, a missing picture, a skipped heading level."
    run(sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", ROOT / ".github/site",
        "-d", tmp_path / "doctrees", ROOT / "nbs", tmp_path / "site")
    assert {path.stem for path in NOTEBOOKS} <= {path.stem for path in (tmp_path / "site").glob("*.html")}
