"""`python -m tests.e2e.console.vendor`: takes the console's libraries, and axe for its tests, from npm's registry.

No build: each file is the package's own. Only names of modules become paths, source maps are left out, and uPlot, whose
small build is a script, gets an export. Code is kept as it is sent, compressed.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path

from f2l_vllm.server.console.pages import FOLDER

# What the wheel has of each; their licences are in pyproject.toml, too.
LICENCES = {"preact": "MIT", "htm": "Apache-2.0", "uplot": "MIT"}
VERSIONS = {"preact": "11.2.0", "htm": "3.1.1", "uplot": "1.6.32", "axe-core": "4.14.1"}
_HERE = Path(__file__).parent
_VENDOR = FOLDER / "vendor"
# package, file in it, file here
_FILES = (
    ("preact", "dist/preact.mjs", _VENDOR / "preact.js"),
    ("preact", "hooks/dist/hooks.mjs", _VENDOR / "hooks.js"),
    ("preact", "LICENSE", _VENDOR / "preact-licence.txt"),
    ("htm", "dist/htm.mjs", _VENDOR / "htm.js"),
    ("htm", "LICENSE", _VENDOR / "htm-licence.txt"),
    ("uplot", "dist/uPlot.iife.min.js", _VENDOR / "uplot.js"),
    ("uplot", "dist/uPlot.min.css", _VENDOR / "uplot.css"),
    ("uplot", "LICENSE", _VENDOR / "uplot-licence.txt"),
    ("axe-core", "axe.min.js", _HERE / "axe" / "axe.js"),
    ("axe-core", "LICENSE", _HERE / "axe" / "LICENSE"),
)


def enter(bill: Path) -> None:
    """Add the console's libraries to a release's bill of materials (CycloneDX, JSON), which pip knows nothing of."""
    found = json.loads(bill.read_text())
    for name, licence in LICENCES.items():
        purl = f"pkg:npm/{name}@{VERSIONS[name]}"
        one = {"type": "library", "name": name, "version": VERSIONS[name], "bom-ref": purl, "purl": purl}
        found["components"].append({**one, "licenses": [{"license": {"id": licence}}]})
    bill.write_text(json.dumps(found, indent=2) + "\n")


def take() -> None:
    """Write all files."""
    with tempfile.TemporaryDirectory() as folder:
        for package, version in VERSIONS.items():
            subprocess.run(["npm", "pack", "--silent", f"{package}@{version}"], cwd=folder, check=True)
        for package, name, target in _FILES:
            with tarfile.open(Path(folder) / f"{package}-{VERSIONS[package]}.tgz") as archive:
                text = archive.extractfile(f"package/{name}").read().decode()
            target.parent.mkdir(parents=True, exist_ok=True)
            text = _adapted(package, target, text)
            if package == "axe-core" or name == "LICENSE":
                target.write_text(text)
            else:
                target.with_name(f"{target.name}.gz").write_bytes(gzip.compress(text.encode(), mtime=0))


def _adapted(package: str, target: Path, text: str) -> str:
    lines = [line for line in text.splitlines() if not line.startswith("//# sourceMappingURL=")]
    text = "\n".join(lines).strip() + "\n"
    if target.suffix != ".js" or package == "axe-core":
        return text
    text = text.replace('from"preact"', 'from"./preact.js"')
    return text + "export default uPlot;\n" * (package == "uplot")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bill", type=Path, help="take nothing, and enter the libraries into this bill of materials")
    given = parser.parse_args()
    if given.bill is not None:
        enter(given.bill)
    else:
        take()
