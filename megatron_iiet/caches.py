"""Where libraries keep what they compile, for a user whose home folder takes nothing: containers and batch
systems start processes without a home, with another's, or with a read-only one."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

_KEPT = {
    "TORCH_EXTENSIONS_DIR": ("XDG_CACHE_HOME", ".cache", "torch_extensions"),
    "TRITON_HOME": ("", "", ".triton"),  # not TRITON_CACHE_DIR: DeepSpeed looks for it too
    "MPLCONFIGDIR": ("XDG_CONFIG_HOME", ".config", "matplotlib"),
}
"""Variable that names a folder; without it, the variable that names the one above, what that is in the home
folder by default, and the folder's name in it. What is downloaded has no place here: it may be in a read-only
home already."""


def keep_where_it_can_be() -> None:
    """Give libraries a folder of this user's among the temporary ones, where they have none that takes
    anything. Processes that are started from here inherit it."""
    for variable, (above, in_home, name) in _KEPT.items():
        folder = os.environ.get(above) or os.path.join(os.path.expanduser("~"), in_home)
        if not os.environ.get(variable) and not _takes_files(Path(folder)):
            with suppress(OSError):  # there is no temporary folder either, which is told by who needs one
                os.environ[variable] = str(_own_folder() / name)


def _takes_files(folder: Path) -> bool:
    """Whether folders can be made at a path. A home that is not there is nobody's to make."""
    home = Path(os.path.expanduser("~"))
    if folder.is_relative_to(home) and not home.is_dir():
        return False
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _own_folder() -> Path:
    """This user's for all processes, or one of this process's if somebody else has put something there."""
    import tempfile  # most processes have a home

    folder = Path(tempfile.gettempdir(), f"megatron_iiet-{os.getuid()}")
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
        return folder
    return Path(tempfile.mkdtemp(prefix="megatron_iiet-"))
