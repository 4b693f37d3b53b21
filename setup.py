"""Packaging. Everything it says stands in settings.ini; what it adds is that a wheel carries the stage notebooks too."""
from configparser import ConfigParser
from pathlib import Path
from shutil import copyfile

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here/"settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
extras = {k.removeprefix("extra_requirements_"): v.split() for k, v in cfg.items() if k.startswith("extra_requirements_")}
notebooks = [p.relative_to(here) for p in sorted((here/cfg["nbs_path"]).glob("[0-9]*.ipynb"))]


class BuildWithNotebooks(build_py):
    "Copies nbs/NN_name.ipynb to slml_nb/notebooks; an editable install uses nbs/ itself."

    def run(self):
        super().run()
        if self.editable_mode: return
        folder = Path(self.build_lib)/cfg["lib_path"]/"notebooks"
        folder.mkdir(parents=True, exist_ok=True)
        for p in notebooks: copyfile(here/p, folder/p.name)
        copyfile(here/"params"/"prices.yaml", Path(self.build_lib)/cfg["lib_path"]/"prices.yaml")


class SdistWithNotebooks(sdist):
    "A source distribution holds what a wheel is built from."

    def add_defaults(self):
        super().add_defaults()
        self.filelist.extend([str(p) for p in notebooks] + ["settings.ini", "constraints.txt", "CHANGELOG.md", "params/prices.yaml"])


readme = here/"README.md"
setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else cfg["description"],
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    keywords=cfg["keywords"],
    classifiers=["Development Status :: 3 - Alpha", "Intended Audience :: Developers", "Programming Language :: Python :: 3"],
    package_dir={"": "."},  # an editable install is then one line in a .pth file: nothing to import at every start
    packages=find_packages(include=[cfg["lib_path"], cfg["lib_path"] + ".*"]),
    package_data={cfg["lib_path"]: ["sample/**/*"]},
    python_requires=">=" + cfg["min_python"],
    install_requires=cfg["requirements"].split(),
    extras_require={**extras, "dev": cfg["dev_requirements"].split() + [r for own in extras.values() for r in own]},
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "papermill.engine": ["slml=slml_nb.engine:SlmlEngine"],
        "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
    },
    cmdclass={"build_py": BuildWithNotebooks, "sdist": SdistWithNotebooks},
    zip_safe=False,
)
