"""Finds a backbone or a dataset by its name: a module with a `build`."""

import importlib
import pkgutil

from errors import UserError, did_you_mean


def _build_of(module):
    """The `build` of the module of this full name; None where there is no such module, or it has none.

    Raises:
        ModuleNotFoundError: the module is there, but not one that it imports.
    """
    if not all(part.isidentifier() for part in module.split(".")):
        return None
    try:
        return getattr(importlib.import_module(module), "build", None)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise
        return None


def find(package, name, key):
    """The `build` of `package.name`, else of the module `name`; `key` is the config key that named it.

    Raises:
        UserError: no such module, one without `build`, or one that cannot be imported.
    """
    try:
        build = _build_of(f"{package}.{name}") or _build_of(name)
    except ModuleNotFoundError as error:
        raise UserError(f"{key} {name} cannot be imported: {error}") from error
    if build is None:
        files = [module.name for module in pkgutil.iter_modules(importlib.import_module(package).__path__)]
        known = [file for file in files if _build_of(f"{package}.{file}")]
        raise UserError(
            f"{key} is {name!r}; choose one of {', '.join(known)}{did_you_mean(name, known)}, "
            "or name a module that has a function build"
        )
    return build
