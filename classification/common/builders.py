"""Finds a backbone or a dataset by its name: a module with a `build`."""

import importlib
import pkgutil

from common.errors import UserError, did_you_mean


def _with_build(module):
    """The module of this full name; None if it does not exist or has no `build`.

    ModuleNotFoundError: the module exists, but not one that it imports.
    """
    if not all(part.isidentifier() for part in module.split(".")):
        return None
    try:
        found = importlib.import_module(module)
        return found if hasattr(found, "build") else None
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise
        return None


def find(package, name, key, outside=True):
    """The module `package.name`, else the module `name`, which has a `build`; `key`: the config key that named it.

    outside: False where a file that may be anyone's names it: then nothing outside the package is imported.

    UserError: no such module, one without `build`, or one that cannot be imported.
    """
    try:
        module = _with_build(f"{package}.{name}") or (_with_build(name) if outside else None)
    except ModuleNotFoundError as error:
        raise UserError(f"{key} {name} cannot be imported: {error}") from error
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        raise UserError(
            f"{key} {name} cannot be imported ({error}): write `import common.torchvision_shim` in it before timm and "
            "torchvision"
        ) from error
    if module is None:
        files = [file.name for file in pkgutil.iter_modules(importlib.import_module(package).__path__)]
        known = [file for file in files if _with_build(f"{package}.{file}")]
        if not outside:
            raise UserError(f"{key} is {name!r}, no file of {package}/ with a function build; put your own file there")
        raise UserError(
            f"{key} is {name!r}; choose one of {', '.join(known)}{did_you_mean(name, known)}, "
            "or name a module that has a function build"
        )
    return module
