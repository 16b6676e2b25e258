"""The package of third-party models, installed beside the project."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

_SOURCE = Path(__file__).parent / "data" / "third_party"


def config_of_gated(folder: Path) -> str:
    """Write the configuration of the cheap model ``gated``, whose stages nothing holds; return its section."""
    gates = folder / "gates"
    gates.mkdir()
    return f'[[models]]\nname = "gated"\nmodel_params = {{ gates = "{gates}" }}\n'


def install(folder: Path) -> dict[str, str]:
    """Install the package by pip into a folder; return the environment in which servers find it."""
    source, site = folder / "source", folder / "site"
    shutil.copytree(_SOURCE, source)
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, "--target", str(site), str(source)], check=True)
    found = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(found)}
