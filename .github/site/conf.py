"The site: every notebook as a page, with the outputs it was committed with. `make site` builds it into _docs/html/."
import re
from configparser import ConfigParser
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[2]
config = ConfigParser(delimiters=["="], interpolation=None)
config.read(ROOT / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]

project, author, release = settings["title"], settings["author"], settings["version"]
copyright = settings["copyright"]
extensions = ["myst_nb"]
exclude_patterns = ["**/.ipynb_checkpoints", "_*"]
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = settings["title"]
html_baseurl = settings["doc_host"] + settings["doc_baseurl"] + "/"
html_theme_options = {"source_repository": settings["git_url"], "source_branch": settings["branch"],
                      "source_directory": "nbs/"}

TAGS = {"hide": "remove-cell", "code-fold: true": "hide-input", "echo: false": "remove-input"}
TOCTREE = "```{toctree}\n:hidden:\n:glob:\n\n[0-9]*\n```"


def prepare(app, docname, source):
    "Turn nbdev's `#|` directives into tags, and give the first page the list of the others."
    notebook = nbformat.reads(source[0], as_version=4)
    notebook.metadata["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        directives = re.findall(r"^#\|\s*(.*?)\s*$", cell.source, re.M)
        cell.metadata["tags"] = cell.metadata.get("tags", []) + [TAGS[d] for d in directives if d in TAGS]
        cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip()
        if not cell.source:
            cell.metadata["tags"].append("remove-cell")
    if docname == "index":
        notebook.cells.append(nbformat.v4.new_markdown_cell(TOCTREE))
    source[0] = nbformat.writes(notebook)


def setup(app):
    app.connect("source-read", prepare)
