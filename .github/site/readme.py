"Writes README.md from nbs/index.ipynb: `python .github/site/readme.py`, or `make readme`."
import json
import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r'(\]\(|(?:src|href)=")([^)"\s]+)')  # [text](target), ![alt](target), src="target", href="target"
ABSOLUTE = re.compile(r"[a-z]+:|[/#]")


def from_root(match):
    "The same link, seen from the folder above nbs/."
    start, target = match.groups()
    return start + (target if ABSOLUTE.match(target) else posixpath.normpath(posixpath.join("nbs", target)))


def markdown(cell):
    "One notebook cell as markdown; an empty string where there is nothing to show."
    source = "".join(cell["source"]).strip()
    if cell["cell_type"] == "markdown":
        parts = re.split(r"(^```.*?^```)", source, flags=re.M | re.S)  # links in code blocks stay as they are
        return "".join(part if part.startswith("```") else LINK.sub(from_root, part) for part in parts)
    if not source or re.search(r"^#\|\s*hide\b", source, re.M):
        return ""
    source = re.sub(r"^#\|.*\n+", "", source, flags=re.M)
    code = [f"```python\n{source}\n```"]
    for output in cell["outputs"]:
        text = "".join(output.get("text", output.get("data", {}).get("text/plain", ""))).strip()
        if any(kind.startswith("image/") for kind in output.get("data", {})):
            raise ValueError("a README shows no cell's picture: save it under nbs/images and link it from a markdown cell")
        if text:
            code.append(f"```text\n{text}\n```")
    return "\n\n".join(code)


def readme():
    "The text of README.md."
    cells = json.loads((ROOT / "nbs/index.ipynb").read_text(encoding="utf-8"))["cells"]
    header = "<!-- Written from nbs/index.ipynb by `make readme`: edit the notebook. -->"
    return "\n\n".join([header, *filter(None, map(markdown, cells))]) + "\n"


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")
