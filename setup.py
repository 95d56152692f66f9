"""The package's metadata, all of it from settings.ini (pyproject.toml cannot read that file)."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]


class WithPublished(build_py):
    "Copies data/published into a built package, for outside a checkout the library finds the study's numbers there; one source, no second copy in Git."

    def run(self):
        super().run()
        if self.editable_mode:
            return
        folder = Path(self.build_lib) / "micronet_nb" / "published"
        self.mkpath(str(folder))
        for file in sorted((here / "data" / "published").glob("*.json")):
            self.copy_file(str(file), str(folder / file.name))


setup(
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8") if (here / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    license="Apache-2.0",
    keywords=cfg["keywords"].split(),
    classifiers=[
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Framework :: Jupyter",
    ],
    url=cfg["git_url"],
    python_requires=f">={cfg['min_python']}",
    cmdclass={"build_py": WithPublished},
    packages=find_packages(include=["micronet_nb", "micronet_nb.*"]),
    package_data={"micronet_nb": ["templates/*.j2"]},
    install_requires=cfg["requirements"].split(),
    extras_require={extra: cfg[f"{extra}_requirements"].split() for extra in ("dev", "docs", "bench", "cluster")},
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"],
    },
)
