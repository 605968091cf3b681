"""A module from a factory that the user names, and its weights from a safetensors file."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from runtime.errors import unknown
from runtime.errors.arguments import file_path, text
from runtime.errors.messages import described, printable

from ..errors import ExportError


def check_module(module: object) -> None:
    """Raises ExportError unless this is a PyTorch module."""
    if not isinstance(module, nn.Module):
        raise ExportError(
            f"module must be a torch.nn.Module, got {type(module).__name__}. Wrap a function in "
            f"one."
        )


def type_name(dtype: torch.dtype) -> str:
    """Return the name of a type of numbers, as in "float32"."""
    return str(dtype).removeprefix("torch.")


def load_module(spec: str) -> nn.Module:
    """Return what the factory `package.file:factory` makes without arguments, in evaluation mode.

    Runs that code. Raises ExportError if the module or the factory is missing or fails, or if the
    factory makes something else. Raises RequestError if `spec` is not a string.
    """
    path, colon, attribute = text("spec", spec, "mynet:net").rpartition(":")
    spec = printable(spec)
    # A Windows path has a colon of its own, so `path` may end in one.
    if not (path and colon and attribute) or re.search(r"[/\\]", attribute):
        raise ExportError(
            f"--module must be package.file:factory, got {spec!r}. "
            "Name the function that makes the network, such as mynet:net."
        )
    if re.search(r"[/\\:]|\.py$|^\.|\.\.|\.$", path):
        raise ExportError(_not_dotted(spec, path, attribute))
    code = _imported(spec, path)
    found = getattr(code, attribute, None)
    if not callable(found):
        known = [k for k, value in vars(code).items() if callable(value) and not k.startswith("_")]
        raise unknown(f"factory of {path}", attribute, known, ExportError)
    return _made(spec, found).eval()


def _not_dotted(spec: str, path: str, attribute: str) -> str:
    """Return the message for a file's path in place of a dotted name, with the dotted name."""
    parts = [part for part in re.split(r"[/\\]+", path) if part not in ("", ".")]
    stem = parts[-1].removesuffix(".py") if parts else ""
    stem = printable(stem.strip(".")) or "mynet"
    folder = printable(re.sub(r"[/\\]*[^/\\]*$", "", path))
    # The folders in front, which the import path must list: none for ./mynet.
    if folder in ("", "."):
        return (
            f"--module must be a dotted name, not a path, got {spec!r}. "
            f"Write --module {stem}:{attribute} and run this from the file's folder."
        )
    return (
        f"--module must be a dotted name, not a path, got {spec!r}. "
        f"Write --module {stem}:{attribute} and put the folder {folder} into PYTHONPATH."
    )


def _imported(spec: str, path: str) -> ModuleType:
    try:
        return importlib.import_module(path)
    except KeyboardInterrupt:
        raise
    except ModuleNotFoundError as error:
        if not f"{path}.".startswith(f"{error.name}."):
            raise ExportError(
                f"--module {spec}: importing {printable(path)} needs {error.name!r}, which is not "
                f"installed."
            ) from error
        raise ExportError(
            f"--module {spec}: there is no module {error.name!r}. Run this from the folder that "
            f"{path.split('.')[0]!r} is in, or put that folder into PYTHONPATH."
        ) from error
    except BaseException as error:  # the module's own code, which may call sys.exit()
        raise ExportError(
            f"--module {spec}: importing {printable(path)} fails with {described(error)}."
        ) from error


def _made(spec: str, factory: Callable[[], object]) -> nn.Module:
    if isinstance(factory, nn.Module):
        return factory
    # Asked before the call, so that a TypeError inside the factory is not taken for this one.
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise ExportError(
            f"--module {spec}: the factory is called without arguments, but {error}. Write one "
            f"that fills them in."
        ) from None
    except ValueError:  # a builtin without a signature
        pass
    try:
        made = factory()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the factory's own code, which may call sys.exit()
        raise ExportError(f"--module {spec}: the factory fails with {described(error)}.") from error
    if not isinstance(made, nn.Module):
        raise ExportError(
            f"--module {spec}: the factory returns {type(made).__name__}, a torch.nn.Module "
            f"expected."
        )
    return made


def load_weights(module: nn.Module, path: str | Path) -> None:
    """Fill the module with a safetensors file.

    Raises ExportError if the file cannot be read, or if names, shapes or kinds of numbers do not
    match. Raises RequestError if `path` is not a path.
    """
    check_module(module)
    path = file_path("path", path)
    where = printable(path)
    found = _read_weights(path)
    expected = {k: t for k, t in module.state_dict().items() if isinstance(t, Tensor)}
    # A lazy parameter has no shape to compare with.
    lazy = [key for key, tensor in expected.items() if nn.parameter.is_lazy(tensor)]
    if lazy:
        raise ExportError(f"{lazy[0]} of the module has no shape yet. Run the lazy module once.")
    # Of tensors that share their memory safetensors stores one.
    given = {expected[key].data_ptr() for key in found if key in expected}
    faults = [f"{key!r} is missing" for key, t in expected.items() if t.data_ptr() not in given]
    faults += [f"{key!r} is unexpected" for key in found if key not in expected]
    for key, tensor in expected.items():
        if key not in found:
            continue
        stored = found[key]
        if stored.shape != tensor.shape:
            faults.append(f"{key!r} is {list(stored.shape)}, {list(tensor.shape)} expected")
        elif _numbers(stored) != _numbers(tensor):
            # load_state_dict would cast: integers of a quantized file are not the weights.
            faults.append(
                f"{key!r} is {type_name(stored.dtype)}, {type_name(tensor.dtype)} expected"
            )
    if faults:
        raise ExportError(mismatch(where, faults))
    try:
        module.load_state_dict(found, strict=False)
    except Exception as error:  # the module may load its state with code of its own
        raise ExportError(f"{where} cannot be loaded ({described(error)}).") from error


def _numbers(tensor: Tensor) -> str:
    """Return "float" for every floating-point type, which can be cast; else the type itself."""
    return "float" if tensor.is_floating_point() else type_name(tensor.dtype)


def _read_weights(path: Path) -> dict[str, Tensor]:
    where = printable(path)
    if path.suffix != ".safetensors":
        raise ExportError(
            f"{where}: weights are read from .safetensors only, because other formats can run code "
            "when they are opened. If you trust the file: safetensors.torch.save_file("
            "torch.load(path, weights_only=True), 'weights.safetensors')."
        )
    try:
        if path.is_dir():
            raise ExportError(f"{where} is a folder. Pass the .safetensors file in it.")
        return load_file(path)
    except ExportError:
        raise
    except FileNotFoundError:
        raise ExportError(f"{where}: there is no such file.") from None
    except Exception as error:  # safetensors has errors of its own, and passes on PyTorch's
        raise ExportError(
            f"{where} cannot be read as safetensors ({described(error)}). Save or copy the file "
            f"again."
        ) from error


def mismatch(where: str, faults: Sequence[str], most: int = 5) -> str:
    """The message for weights that are not the module's: the first faults, and how many more."""
    more = f" and {len(faults) - most} more" if len(faults) > most else ""
    return f"{where} does not fit the module: {'; '.join(faults[:most])}{more}."
