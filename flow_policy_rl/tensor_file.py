"""Tensors and text in one safetensors file, which names its format. No pickle."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flow_policy_rl.errors import InputError, RunFailed


def write(path: Path, tensors: dict[str, Tensor], form: str, **texts: str) -> None:
    """Write to a neighbour and rename, so that an interruption leaves the old file whole.

    Raises:
        RunFailed: there is no room for it.
    """
    with replaced(path, tensors, form, **texts):
        pass


@contextlib.contextmanager
def replaced(path: Path, tensors: dict[str, Tensor], form: str, **texts: str) -> Iterator[None]:
    """The same in two steps: what is done here comes between writing and renaming; if that fails, the old file stays.

    Raises:
        RunFailed: there is no room for it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    try:
        try:
            save_file(tensors, partial, metadata={"format": form, **texts})
        except SafetensorError as error:
            raise RunFailed(f"'{path}' cannot be written: {error}") from None
        yield
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def read(path: Path, what: str, form: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and texts of a file that is there; `what` it is, for the errors.

    Raises:
        InputError: not a safetensors file, or one of another format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            texts = file.metadata() or {}
            # In a file they lie where they fit. Small matrix products depend on that in their last digit, so that a
            # run would not go on as it was: copies lie where torch puts its own.
            names = file.keys()
            tensors = {name: file.get_tensor(name).clone() for name in names}
    except SafetensorError as error:
        raise InputError(f"{what} '{path}' is not a safetensors file: {error}") from None
    if texts.get("format") != form:
        raise InputError(
            f"{what} '{path}' has format {texts.get('format')!r}; this version reads {form!r}"
        )
    return tensors, texts
