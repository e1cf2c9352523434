"""`make licences`: the licence of every package that comes with this one.

Exit code 1 for one that nobody has found compatible with Apache-2.0."""

import re
import sys
from importlib import metadata

ROOTS = ("flow_policy_rl[all,warp]",)
PERMISSIVE = re.compile(
    r"apache|bsd|\bmit\b|isc|psf|python software|zlib|unlicense|public domain|hpnd|cc0|boost|zope|mozilla|mpl",
    re.IGNORECASE,
)
# Looked up by hand: the metadata says nothing, or says it needs care.
KNOWN = {
    "apsw": "any OSI licence, at the user's choice",
    "qpsolvers": "LGPL-3.0 (used as a library, unchanged, by mink for scripted demonstrations only)",
    "av": "BSD-3-Clause; its wheels contain FFmpeg with x264 (GPL-2.0): separate work, loaded for films only",
}
NVIDIA = ("nvidia-", "cuda-toolkit")  # what PyTorch's CUDA build wants


def requirements(roots: tuple[str, ...] = ROOTS) -> list[str]:
    """Distributions that are installed because of the roots, themselves not included."""
    from packaging.requirements import Requirement

    found: dict[str, None] = {}
    queue = [Requirement(root) for root in roots]
    while queue:
        requirement = queue.pop()
        key = requirement.name.lower().replace("_", "-")
        try:
            wants = metadata.requires(key) or []
        except metadata.PackageNotFoundError:
            continue
        seen = key in found
        found[key] = None
        if seen and not requirement.extras:
            continue
        for want in map(Requirement, wants):
            extras = requirement.extras or {""}
            if want.marker is None or any(want.marker.evaluate({"extra": e}) for e in extras):
                queue.append(want)
    names = {root.partition("[")[0].replace("_", "-") for root in roots}
    return sorted(name for name in found if name not in names)


def licence(name: str) -> str:
    """What a distribution says of its licence, in one line."""
    if name in KNOWN:
        return KNOWN[name]
    if name.startswith(NVIDIA):
        return (
            "NVIDIA's own; comes with PyTorch's CUDA build, is loaded by it, and is no part of ours"
        )
    about = metadata.metadata(name)
    marks = [c.rpartition(":: ")[2] for c in about.get_all("Classifier") or [] if "License" in c]
    said = about.get("License-Expression") or ", ".join(marks) or about.get("License") or "?"
    return said.strip().splitlines()[0][:90] if said.strip() else "?"


def unknown(name: str) -> bool:
    """Whether nobody has said that this licence is fine."""
    looked_at = name in KNOWN or name.startswith(NVIDIA)
    return not looked_at and not PERMISSIVE.search(licence(name))


def main() -> int:
    """Print the list."""
    names = requirements()
    for name in names:
        print(
            f"{'??' if unknown(name) else '  '} {name:<28} {metadata.version(name):<14} {licence(name)}"
        )
    return 1 if any(map(unknown, names)) else 0


if __name__ == "__main__":
    sys.exit(main())
