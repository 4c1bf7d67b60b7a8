"""Finds another distribution's `vllm` package where it would mix with this one.

Upstream vLLM and this project share an import name. Two ways in which both may be installed go wrong without a word:
the files of both lie in one folder (whichever was installed last overwrote the other's), or upstream's folder comes
first on `sys.path`, so that this one runs only while Python is started from a source checkout. Both are an
ImportError that names the folder and the way out. A folder that this package itself shadows does no harm.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Files that upstream's wheels put into the package and this project never has: its build-time version, its compiled
# extensions (ours bear other names) and its second engine.
_UPSTREAM_MARKS = ("_version.py", "_C*.so", "_C*.pyd", "v1/__init__.py")


def check_installation(package_dir: Path | None = None) -> None:
    """Raises ImportError if another `vllm` is mixed with, or hides, the package in `package_dir` (ours by default)."""
    ours = (package_dir or Path(__file__).parent).resolve()
    mixed_with = _mixed_in(ours)
    if mixed_with is not None:
        raise ImportError(
            f"Two different packages called vllm lie over each other in {ours}: vllm-system-prompt-cache and "
            f"{mixed_with}. Remove both (pip uninstall vllm vllm-system-prompt-cache), delete what is left of that "
            "folder, and install the one you want again."
        )
    hidden_by = _hidden_by(ours)
    if hidden_by is not None:
        raise ImportError(
            f"Another package called vllm, in {hidden_by}, comes before vllm-system-prompt-cache ({ours}) on Python's "
            "path, so that most programs here would load that one. Remove it (pip uninstall vllm), or give "
            "vllm-system-prompt-cache a virtual environment of its own."
        )


def _mixed_in(ours: Path) -> str | None:
    """Says what else has files in our folder, or None."""
    for mark in _UPSTREAM_MARKS:
        found = next(ours.glob(mark), None)
        if found is not None:
            return _upstream_distribution(ours) or f"upstream vLLM (it left {found.relative_to(ours)})"
    return _upstream_distribution(ours)


def _upstream_distribution(ours: Path) -> str | None:
    """Name and version of a distribution called `vllm` whose recorded files lie in our folder, or None.

    A dist-info without a record of files (some packages ship one to satisfy a dependency) is no installation.
    """
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        upstream = distribution("vllm")
    except PackageNotFoundError:
        return None
    for file in upstream.files or ():
        if file.parts[:2] == ("vllm", "__init__.py"):
            if Path(str(upstream.locate_file(file))).parent.resolve() == ours:
                return f"vllm {upstream.version}"
            return None
    return None


def _hidden_by(ours: Path) -> Path | None:
    """The folder that `import vllm` finds when Python is not started in a source checkout, if it is not ours."""
    # The first entry is the script's folder or the current one, unless Python runs in safe-path mode.
    for entry in sys.path if sys.flags.safe_path else sys.path[1:]:
        found = Path(entry or ".") / "vllm"
        if (found / "__init__.py").is_file():
            found = found.resolve()
            return None if found == ours else found
    return None
