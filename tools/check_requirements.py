"""Checks that this interpreter has the packages of requirements.txt: a missing one is an error, another version is named."""

import sys
from importlib import metadata
from pathlib import Path

missing = []
for line in (Path(__file__).parent.parent / "requirements.txt").read_text().splitlines():
    if "==" not in line:
        continue
    name, wanted = line.split("==")
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        missing.append(line)
        continue
    if found.split("+")[0] != wanted:
        print(f"setup: {name} is {found}; the pinned version is {wanted}")
if missing:
    sys.exit(f"setup: {sys.executable} lacks {', '.join(missing)}")
