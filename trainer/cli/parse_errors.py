"""Messages of jsonargparse in the words of a user: the option first, then what it may be, then the value.

By hand, because the library nests the reason in lists of every type it tried, and prints Python classes.
"""

import re

KEY = re.compile(r'Parser key "([^"]+)": (.*)', re.DOTALL)
NOT_A_CHOICE = re.compile(r".*?Expected a typing.Literal\[([^]]+)\]")
IN_CLASS = re.compile(r".*?Problem with given class_path '(?:[^']*\.)?([^'.]+)': (.*)")
REQUIRED = re.compile(r"the following arguments are required: (\w+(?:, \w+)*)")
NOT_ACCEPTED = re.compile(r"Option '([^']+)' is not accepted")
NO_CLASS = re.compile(r".*Expected a dot import path string: (\S+)")
NOT_A_GROUP = re.compile(r"Unable to load config .(null|true|false|[0-9.]+)")
NOT_A_CLASS = re.compile(r"Subclasses are disabled for")
FAILED_CLASS = re.compile(
    r".*?Problem with given class_path '(?:[^']*\.)?([^'.]+)': (.*?)(?: - Expected| Given value|$)"
)
MISSING = re.compile(r".*?(No module named '[^']+'|module '[^']+' has no attribute '[^']+')")
VALUE = re.compile(r"(?:Got|Given) value: ?(.*?)(?= ?- Expected|$)")
TYPE = re.compile(r"Expected a <class '([^']+)'>")
NAMES = {"int": "a whole number", "float": "a number", "bool": "true or false", "list": "a list, such as [1,2]"}
NAMES |= {"NoneType": "null", "str": "text", "dict": "settings", "Iterable": "a list"}


def reword(message: str) -> str:
    """A message of jsonargparse, on one line, in plain words; one that is not known stays as it is."""
    line = " ".join(message.split())
    parsed = KEY.match(line)
    return _of_key(*parsed.groups()) if parsed else line


def reword_failure(message: str) -> str:
    """Why an object could not be made, on one line; of a class in a union, what the class itself says."""
    line = " ".join(message.split())
    failed = FAILED_CLASS.match(line)
    return f"{failed[1]}: {failed[2]}" if failed else line


def _of_key(key: str, reason: str) -> str:
    """The reason why the value of an option is refused."""
    value = VALUE.search(reason)
    types = [name.rpartition(".")[2] for name in TYPE.findall(reason[: value.start()] if value else "")]
    names = list(dict.fromkeys(NAMES.get(name, name) for name in types))
    if NOT_A_GROUP.match(reason):
        return f"--{key}: is a group of options, not one; --help {key} lists them, with what null turns off"
    if NOT_A_CLASS.match(reason):
        return f"--{key}: is a group of options, not a class; docs/extending.md shows how to use code of your own"
    if missing := MISSING.match(reason):
        return f"--{key}: {missing[1]}; modules are found in this folder and among the installed packages"
    if in_class := IN_CLASS.match(reason):
        return _of_class(key, *in_class.groups())
    if value and not value[1]:
        return f"--{key}: its value is empty (an unset variable?); give one, or leave the option out"
    if value and (choice := NOT_A_CHOICE.match(reason)):
        return f"--{key}: must be {' or '.join([f'one of {choice[1]}', *names])}, not {value[1]}"
    if no_class := NO_CLASS.match(reason):
        hint = f"one of {', '.join(_sources())}" if key == "data.source" else "its name"
        return f"--{key}: there is no class {no_class[1]}; give {hint}, or its import path"
    if value and names:
        return f"--{key}: must be {' or '.join(names)}, not {value[1]}"
    return f"--{key}: {reason}"


def _sources() -> list[str]:
    from trainer.data.source import Source  # noqa: PLC0415 - only an error needs it, and other commands start faster

    return sorted(each.__name__ for each in Source.__subclasses__())


def _of_class(key: str, name: str, reason: str) -> str:
    """The reason why the settings of a class are refused."""
    if required := REQUIRED.match(reason):
        options = " and ".join(f"--{key}.{option.strip()}" for option in required[1].split(","))
        return f"{options}: missing, but {name} needs it"
    if unknown := NOT_ACCEPTED.match(reason):
        return f"--{key}.{unknown[1]}: {name} has no such option; --{key}.help {name} lists them"
    if inner := KEY.match(reason):
        return _of_key(f"{key}.{inner[1]}", inner[2])
    return f"--{key}: {reason}"
