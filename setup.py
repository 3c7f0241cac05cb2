"Hands the metadata in settings.ini, which nbdev reads too, to setuptools."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="], interpolation=None)
config.read_string((here / "settings.ini").read_text(encoding="utf-8"))
cfg = config["DEFAULT"]
suffix = "_requirements"
classifiers = ["Intended Audience :: Education", "Intended Audience :: Science/Research",
               "Programming Language :: Python :: 3", "Topic :: Scientific/Engineering :: Artificial Intelligence"]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    author=cfg["author"],
    author_email=cfg["author_email"],
    keywords=cfg["keywords"].split(),
    url=cfg["git_url"],
    project_urls={"Documentation": cfg["doc_host"] + cfg["doc_baseurl"]},
    classifiers=classifiers,
    packages=find_packages(include=["tinydiff", "tinydiff.*"]),
    package_data={"tinydiff": ["pretrained/**"]},
    include_package_data=False,
    install_requires=cfg["requirements"].split(),
    extras_require={k.removesuffix(suffix): v.split() for k, v in cfg.items() if k.endswith(suffix)},
    entry_points={"console_scripts": cfg["console_scripts"].split()},
)
