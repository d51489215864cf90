"""Functions of the user's own, named in a config as `module:function`."""

import importlib
from collections.abc import Callable
from typing import Any

from itjax.base.freeze import nearest


def named_function(name: str, setting: str) -> Callable[..., Any] | None:
    """The function that a setting names; None where it names none. Importing runs the module: it is the user's code."""
    if not name:
        return None
    module_name, separator, function_name = name.partition(":")
    if not (separator and module_name and function_name):
        raise ValueError(f"{setting}: {name!r} is no function; write module:function, e.g. my_filters:score")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"{setting}: {module_name} cannot be imported ({error}); put it on PYTHONPATH") from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(
            f"{setting}: {module_name} has no function {function_name}.{nearest(function_name, dir(module))}"
        )
    return function
