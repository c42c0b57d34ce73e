"""Recipes: a Python file of plain assignments, then --key=value. Later ones win.

    python train.py config_demo.py --learning_rate=1e-3 --compile=False

Every key is checked against one frozen dataclass, whose fields are the keys and whose annotations
are their types. Otherwise a misspelt key would be a new variable that nobody reads.
`python train.py --help` lists the keys, with their defaults and meanings.
"""
import ast
import inspect
import os
import re
import runpy
import sys
import types
import typing
from difflib import get_close_matches


def load_config(argv, cls):
    """The `cls` that the recipe files and --key=value in `argv` describe. Exits with a sentence at
    the first mistake."""
    kinds, found = typing.get_type_hints(cls), {}
    for arg in argv:
        if arg in ("-h", "--help"):
            print(f"recipe files, then --key=value; the keys and their defaults:\n{usage(cls)}")
            sys.exit()
        is_option = arg.startswith("--")
        pairs = parse_option(arg, kinds) if is_option else read_assignments(arg)
        for key, value in pairs.items():
            if key not in kinds:
                near = ", ".join(get_close_matches(key, kinds, cutoff=0.5))
                sys.exit(f"{arg}: there is no key {key!r}; "
                         + (f"nearest: {near}" if near else f"the keys are {', '.join(kinds)}"))
            found[key] = coerce(value, kinds[key], f"{arg}: {key}")
    return cls(**found)


def parse_option(arg, kinds):
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
            sys.exit(f"{arg} is not valid Python: {error}; words in it need quotes")
        return {key: text}


def read_assignments(path):
    """{key: value} of what a recipe file assigns, without its imports and names that start with
    _."""
    if not os.path.isfile(path):
        sys.exit(f"there is no recipe {path!r}: give a .py file, or options as --key=value")
    try:
        names = runpy.run_path(path)
    except (Exception, SystemExit) as error:                  # any mistake in it is its author's
        sys.exit(f"{path}: {type(error).__name__}: {error}")
    return {k: v for k, v in names.items()
            if k[0] != "_" and not isinstance(v, (types.ModuleType, types.FunctionType))}


def coerce(value, kind, where):
    """`value` as `kind`: an int is accepted as a float, and 3e12 as an int, but True is not 1, and
    nothing else is converted."""
    if ((type(value), kind) == (int, float)
            or (type(value), kind) == (float, int) and value.is_integer()):
        return kind(value)
    allowed = typing.get_args(kind) or (kind,)                # bool | None is two
    if type(value) not in allowed:
        names = " or ".join(k.__name__.removesuffix("Type") for k in allowed)
        sys.exit(f"{where} must be {names}, got {value!r}")
    return os.path.expanduser(value) if kind is str else value       # no shell expands --key=~


def usage(cls):
    """A line per key: its default, and its meaning, which is the comment on its field."""
    meanings = {}
    for base in reversed(cls.__mro__[:-1]):
        meanings |= re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(base), re.M)
    return "\n".join(f"  {f'--{key}={value!r}':34} {meanings.get(key, '')}".rstrip()
                     for key, value in vars(cls()).items())
