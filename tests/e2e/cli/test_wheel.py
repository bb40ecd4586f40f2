"""The wheel alone is enough: built from the sdist, installed without the sources, run in an empty folder."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.e2e.console.vendor import LICENCES
from tests.support import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built like a release's: the sdist first, and the wheel from it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    (found,) = folder.glob("*.whl")
    return found


def test_it_has_the_package_its_licence_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name.split("/")[0] for name in names} == {"f2l_vllm", f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"}
    built = {name for name in names if name.startswith("f2l_vllm/")}
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "f2l_vllm"]
    assert built == set(subprocess.check_output(listing, cwd=ROOT, text=True).splitlines())
    licences = {name.rpartition("/")[2] for name in names if ".dist-info/licenses/" in name}
    assert licences == {"LICENSE", *(f"{library}-licence.txt" for library in LICENCES)}


def test_the_demo_runs_from_it_in_an_empty_folder(wheel, tmp_path):
    """The environment has this wheel, and borrows what it depends on from the environment of the tests."""
    home, empty = tmp_path / "venv", tmp_path / "empty"
    empty.mkdir()
    venv.create(home, symlinks=True)
    python = home / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True)
    (packages,) = home.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")  # not what its own .pth files add
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"PATH": f"{home / 'bin'}:{environment['PATH']}", "HOME": str(tmp_path)}

    def run(*command: str | Path) -> str:
        ran = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, timeout=570)
        assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
        return ran.stdout

    assert Path(run(python, "-c", "import f2l_vllm; print(f2l_vllm.__file__)").strip()).is_relative_to(packages)
    shown = run(home / "bin" / "f2l-vllm", "demo")
    assert "uploaded and internalized" in shown
    assert "server stopped" in shown
    assert list(empty.iterdir()) == []
