"""Constraints for pip: the oldest release that each dependency of a wheel allows. Usage: oldest.py WHEEL [EXTRA ...].

Dependencies of the wheel itself and of the named extras are pinned; those of other extras are left out.
"""

import re
import sys
import zipfile


def main(wheel: str, *extras: str) -> None:
    """Prints one ``name==version`` for each."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(name).decode()
    found = set()
    for line in re.findall(r"^Requires-Dist: (.*)$", metadata, flags=re.MULTILINE):
        requirement, _, marker = line.partition(";")
        extra = re.search(r"extra == ['\"](.*?)['\"]", marker)
        if extra and extra[1] not in extras:
            continue
        if parts := re.fullmatch(r"([\w.-]+)(?:\[.*?\])?>=([\w.]+)", requirement.replace(" ", "")):
            found.add(f"{parts[1]}=={parts[2]}")
        elif not requirement.startswith("lightning-prehab["):
            raise SystemExit(f"not of the form name>=version: {requirement}")
    print("\n".join(sorted(found)))


if __name__ == "__main__":
    main(*sys.argv[1:])
