"""Check what ``make dist`` built, as a stranger would use it.

The sdist holds every tracked file and no other; the wheel holds the package and nothing else. The wheel is then
installed in a fresh environment, and used there from another folder. That environment borrows the dependencies of the
one that runs this script; with ``--with-dependencies`` it installs its own, several GB, as a user would.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
USE = """
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from lightning.pytorch import Trainer

import lightning_imaml
from lightning_imaml.data import GlyphDataModule
from lightning_imaml.inner import GradientDescent
from lightning_imaml.models import Conv4

assert Path(lightning_imaml.__file__).is_relative_to(Path(sys.prefix).resolve()), lightning_imaml.__file__
assert version("lightning-imaml") == lightning_imaml.__version__
module = lightning_imaml.IMAMLModule(Conv4(ways=2, filters=2), inner_solver=GradientDescent(0.1, 2))
before = module.backbone.classifier.weight.detach().clone()
data = GlyphDataModule(ways=2, shots=1, queries=1, tasks_per_batch=2, batches_per_epoch=2, val_tasks=2)
trainer = Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
trainer.fit(module, datamodule=data)
assert trainer.global_step == 2
assert torch.isfinite(module.backbone.classifier.weight).all()
assert not torch.equal(before, module.backbone.classifier.weight.detach())
print(f"lightning_imaml {lightning_imaml.__version__} of {lightning_imaml.__file__} trains")
"""


def require_same(found: set[str], expected: set[str], where: str) -> None:
    """End with the difference, if there is one."""
    if found != expected:
        raise SystemExit(f"{where}: missing {sorted(expected - found)}, too much {sorted(found - expected)}")
    print(f"{where}: {len(found)} files, as tracked")


def tracked() -> set[str]:
    """The files of the repository."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
    return set(listed.stdout.split("\0")) - {""}


def files_of_sdist(path: Path) -> set[str]:
    """What is in the sdist besides what setuptools writes."""
    with tarfile.open(path) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    return {name for name in names if name != "PKG-INFO" and not name.startswith("lightning_imaml.egg-info/")}


def files_of_wheel(path: Path) -> set[str]:
    """What is in the wheel besides its metadata."""
    with zipfile.ZipFile(path) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def use(wheel: Path, with_dependencies: bool) -> None:
    """Install the wheel in a fresh environment and train there."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder).resolve()
        venv.create(home / "venv", with_pip=False)
        programs = home / "venv" / ("Scripts" if os.name == "nt" else "bin")
        pip = [sys.executable, "-m", "pip", "--python", str(programs / "python"), "install", "--quiet"]
        subprocess.run([*pip, *([] if with_dependencies else ["--no-deps", "--no-index"]), str(wheel)], check=True)
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

        def run(program: str, *args: str) -> str:
            command = [str(programs / program), *args]
            done = subprocess.run(command, cwd=home, env=environment, text=True, stdout=subprocess.PIPE, check=True)
            return done.stdout

        if not with_dependencies:
            site = run("python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
            # After the environment's own packages, and without the .pth files there, so that no editable install wins.
            borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
            Path(site, "borrowed.pth").write_text("\n".join(sorted(borrowed)))
        print(run("python", "-c", USE).strip().splitlines()[-1])
        if "fit" not in run("lightning-imaml", "--help"):
            raise SystemExit("lightning-imaml --help does not name its subcommands")


def main() -> None:
    """Check the one wheel and the one sdist in ``dist``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--with-dependencies", action="store_true", help="install the dependencies too")
    options = parser.parse_args()
    (wheel,) = (ROOT / "dist").glob("*.whl")
    (sdist,) = (ROOT / "dist").glob("*.tar.gz")
    files = tracked()
    require_same(files_of_sdist(sdist), files, sdist.name)
    require_same(files_of_wheel(wheel), {name for name in files if name.startswith("lightning_imaml/")}, wheel.name)
    use(wheel, options.with_dependencies)


if __name__ == "__main__":
    main()
