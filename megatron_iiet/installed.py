"""Which versions of other packages are installed, and whether they are ones that this package asks for."""

from __future__ import annotations

from contextlib import suppress
from importlib import metadata

PACKAGE = "megatron-iiet"


def version(name: str) -> str:
    """Of an installed distribution; "" if there is none."""
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return ""


def bounds() -> dict[str, str]:
    """What pyproject.toml bounds, by name, as it was when this package was installed: ``>=2.11,<2.15``. Empty
    where it runs without being installed."""
    from packaging.requirements import Requirement

    asked = metadata.requires(PACKAGE) if version(PACKAGE) else []
    requirements = [Requirement(text) for text in asked or []]
    return {each.name: str(each.specifier) for each in requirements if each.specifier and not each.marker}


def outside_bounds() -> list[str]:
    """The installed versions that were not tested: ``torch 2.16.0 (tested: <2.15,>=2.11)``."""
    from packaging.specifiers import SpecifierSet

    found = {name: version(name) for name in bounds()}
    return [
        f"{name} {found[name]} (tested: {asked})"
        for name, asked in bounds().items()
        if found[name] and not SpecifierSet(asked).contains(found[name], prereleases=True)
    ]
