"""Find the models that come with the package.

A shipped model never changes: its name ends in a number, such as `photo-1`. The name without the number is that of the
newest one.
"""

from pathlib import Path

from latent_codec.errors import UserError

FOLDERS = [parent / "checkpoints" for parent in Path(__file__).parents[1:3]]
"""Folders that are searched for models by name: the installed package's, then the source checkout's. A program with
models of its own may append theirs."""


def resolve(source: str | Path) -> Path:
    """Return the file of a model given by its path or by a shipped model's name; raise `UserError` if there is none.
    A folder that happens to be called like a shipped model does not hide it."""
    path = Path(source)
    if path.is_file():
        return path
    for folder in FOLDERS:
        if (folder / f"{path}.safetensors").is_file():
            return folder / f"{path}.safetensors"
    name = newest(str(source))
    if name is not None:
        return resolve(name)
    names = ", ".join(shipped_names()) or "none"
    raise UserError(f"{source}: neither a file nor a shipped model; shipped are: {names}")


def newest(name: str) -> str | None:
    """Return the shipped model that a name without a number stands for, None if there is none."""
    numbers = [own.removeprefix(f"{name}-") for own in shipped_names() if own.startswith(f"{name}-")]
    number = max((int(number) for number in numbers if number.isdecimal()), default=None)
    return None if number is None else f"{name}-{number}"


def shipped_names() -> list[str]:
    """Return the names of the shipped models, sorted."""
    return sorted({file.stem for folder in FOLDERS for file in folder.glob("*.safetensors")})
