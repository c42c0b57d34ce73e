"""Recipes: a Python file of plain assignments, then --key=value, left to right, the last one wins.

    python train.py config_demo.py --learning_rate=1e-3 --compile=False

Everything is checked against one frozen dataclass, whose fields are the keys and whose annotations
their types: in a recipe a misspelt key would otherwise be a new variable that nobody reads. What a
key means is said there, not here.
"""
import ast
import os
import runpy
import sys
import types
import typing
from difflib import get_close_matches


def load_config(argv, cls):
    """The `cls` that recipe files and --key=value in `argv` describe. Ends the program with a
    sentence at the first mistake."""
    kinds, found = typing.get_type_hints(cls), {}
    for arg in argv:
        if arg in ("-h", "--help"):
            sys.exit("recipe files, then --key=value; the keys and what they are without:\n"
                     + "\n".join(f"  --{key}={value!r}" for key, value in vars(cls()).items()))
        for key, value in (option(arg, kinds) if arg.startswith("--") else recipe(arg)).items():
            if key not in kinds:
                near = get_close_matches(key, kinds, cutoff=0.5)
                sys.exit(f"{arg}: there is no key {key!r}; "
                         + (f"nearest: {', '.join(near)}" if near
                            else f"the keys are {', '.join(kinds)}"))
            found[key] = coerce(value, kinds[key], f"{arg}: {key}")
    return cls(**found)


def option(arg, kinds):
    """{key: value} of --key=value, where the value is a Python literal or else text; a bare --key
    is True."""
    key, equals, text = arg[2:].partition("=")
    if not equals:
        if key in kinds and bool not in (kinds[key], *typing.get_args(kinds[key])):
            sys.exit(f"{arg} needs a value: {arg}=...")
        return {key: True}
    if kinds.get(key) is str:
        return {key: text}
    try:
        return {key: ast.literal_eval(text)}
    except (ValueError, SyntaxError) as error:
        if text[:1] in ("[", "{"):
            sys.exit(f"{arg} is no Python: {error}")
        return {key: text}


def recipe(path):
    """{key: value} of a recipe file: what it assigns, without what it imports and names that start
    with _."""
    if not os.path.isfile(path):
        sys.exit(f"there is no recipe {path!r}: give a .py file, or options as --key=value")
    try:
        names = runpy.run_path(path)
    except (Exception, SystemExit) as error:        # whatever it does wrong, its author is told
        sys.exit(f"{path}: {type(error).__name__}: {error}")
    return {k: v for k, v in names.items()
            if k[0] != "_" and not isinstance(v, (types.ModuleType, types.FunctionType))}


def coerce(value, kind, where):
    """`value` as `kind`; an int is a fine float and 3e12 a fine int, but True is not 1 and nothing
    else is converted."""
    if ((type(value), kind) == (int, float)
            or (type(value), kind) == (float, int) and value.is_integer()):
        return kind(value)
    kinds = typing.get_args(kind) or (kind,)                    # bool | None is two
    if type(value) not in kinds:
        sys.exit(f"{where} must be {' or '.join(k.__name__.removesuffix('Type') for k in kinds)}, "
                 f"got {value!r}")
    return value
