# `make demo` draws and trains, `make test` checks everything, `make lab` opens the notebooks.
# Everything is installed into .venv, once, with uv where there is one and with venv and pip where not.
# Another Python: `make demo PYTHON=python3.12`.

BIN := .venv/bin

ifneq ($(shell command -v uv 2>/dev/null),)
PYTHON ?= >=3.11
VENV = uv venv --quiet --allow-existing --python '$(PYTHON)' .venv
INSTALL = uv pip install --quiet --python $(BIN)/python
else
PYTHON ?= python3
TOO_OLD = tinydiff needs Python 3.11 or newer: make PYTHON=/path/to/a/newer/python
VENV = $(PYTHON) -c 'import sys; sys.exit("$(TOO_OLD)" if sys.version_info < (3, 11) else 0)' && $(PYTHON) -m venv .venv
INSTALL = $(BIN)/python -m pip install --quiet
endif

PROMPTS = "a red boat at night" "a small cabin in the woods" "a watercolor landscape" \
	"three yellow stars at night" "a blue car to the left of a green tree" "pixel art of a red heart" \
	"a large pink flower in a meadow" "two orange fish under the sea" "a crayon drawing of a purple umbrella" \
	"a white bird above a brown boat at sunset" "a comic of a green balloon in the mountains" \
	"a watercolor painting of a large red mushroom in the snow"

.DEFAULT_GOAL := help
.PHONY: help demo test app mutations kill-report two-processes gpu-report lab site readme clean

help:  ## list these commands
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/make \1\t\2/p' Makefile | expand -t 20

# .venv/.with-X: the environment with the extra X of settings.ini, made again only when that file changes
.venv/.with-%: settings.ini setup.py
	@$(VENV)
	@echo "Installing tinydiff[$*] and what it needs into .venv: about 5 GB the first time, most of it PyTorch."
	@$(INSTALL) -e '.[$*]'
	@touch $@

demo: .venv/.with-notebooks  ## draw pictures with the bundled model, then train a few steps
	$(BIN)/tinydiff-sample --prompt $(PROMPTS) --steps 25 --seed 0 --out demo/contact_sheet.png
	rm -rf demo/run
	$(BIN)/tinydiff-train --steps 20 --scheduler flow --out demo/run
	@echo
	@echo "Look at demo/contact_sheet.png, then at demo/run/: its configuration, its losses and its samples."
	@echo "Next: make lab, and open nbs/00_quickstart.ipynb."

test: .venv/.with-dev  ## run every test and every notebook, offline (those of the page need chromium)
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

app: .venv/.with-app  ## serve the playground alone, at http://127.0.0.1:8866
	$(BIN)/tinydiff-app

mutations: .venv/.with-dev  ## put known mistakes into copies of the package: a test must catch each
	$(BIN)/python tests/mutations.py

kill-report: .venv/.with-dev  ## kill -9 training at random moments, resume, compare bit for bit
	$(BIN)/python tests/kill_report.py --kills 100

two-processes: .venv/.with-dev  ## the same run by one process and by two, their losses side by side
	$(BIN)/python tests/two_processes.py

gpu-report: .venv/.with-dev  ## training on a GPU beside the CPU: the same losses, no waiting, what each choice saves
	$(BIN)/python tests/gpu_report.py

lab: .venv/.with-notebooks  ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab --notebook-dir nbs

site: .venv/.with-site  ## build the web pages into _docs/html/
	$(BIN)/python -m sphinx -q -W --keep-going -c .github/site -d _docs/doctrees nbs _docs/html

readme: .venv/.with-notebooks  ## write README.md from nbs/index.ipynb
	$(BIN)/python .github/site/readme.py

clean:  ## remove what these commands made (your runs/ stay)
	rm -rf .venv uv.lock demo _docs build *.egg-info .pytest_cache
	find . \( -name __pycache__ -o -name .ipynb_checkpoints \) -not -path './.git/*' -exec rm -rf {} +
