"""Names for interchangeable functions, and what such a function says about itself.

There is one registry of advantage estimators and one of losses.
"""

import difflib
import importlib
import inspect
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from numbers import Integral, Real
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

Entry = TypeVar("Entry")
Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")
Promises = ParamSpec("Promises")


class Described:
    """Summary, paper and hyper-parameters of an entry that wraps `function`."""

    function: Callable[..., Any]

    @property
    def documentation(self) -> str:
        """The function's docstring without its indentation. Empty for a function without a docstring."""
        return inspect.getdoc(self.function) or ""

    @property
    def summary(self) -> str:
        """First line of the documentation."""
        return self.documentation.partition("\n")[0]

    @property
    def paper(self) -> str:
        """First link in the documentation."""
        return first_link(self.documentation)

    @property
    def keywords(self) -> dict[str, Any]:
        """The function's hyper-parameters and their defaults."""
        return {parameter.name: parameter.default for parameter in self.parameters}

    @property
    def parameters(self) -> list[inspect.Parameter]:
        """The function's parameters after the first, which takes the data."""
        return list(inspect.signature(self.function).parameters.values())[1:]

    def check_taken(self, owner: str, keywords: Iterable[str]) -> None:
        """Refuse, with a ValueError, a keyword that the function does not take. `owner` names the function."""
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in self.parameters):
            check_taken(owner, keywords, self.keywords)


def first_link(documentation: str) -> str:
    """The first address in a docstring. Empty where there is none."""
    link = re.search(r"https://[^\s)]+", documentation)
    return link.group() if link else ""


class UnknownNameError(ValueError):
    """A name that is registered nowhere and cannot be imported."""


class Registry(Generic[Entry, Result, Promises]):
    """Names for interchangeable functions. An unknown name suggests the nearest name.

    Each name belongs to one place: the function that registered it, which may do so again with other code, as a cell
    of a notebook does when it runs twice.

    An installed package adds names by entry points. They are looked for where a name is not registered, and where all
    names are listed. A package is imported when one of its names is looked up.

    Args:
        kind: what the entries are, for error messages ("advantage estimator").
        group: the group of entry points through which installed packages add names.
        entry: makes an entry of a name, a function and keywords, the promises that the function keeps. A function that
            is found by its dotted path promises nothing.
    """

    def __init__(
        self, kind: str, group: str, entry: Callable[Concatenate[str, Callable[..., Result], Promises], Entry]
    ) -> None:
        self.kind = kind
        self.group = group
        self._entry: Callable[..., Entry] = entry
        self._entries: dict[str, Entry] = {}
        self._unregistered: dict[str, Entry] = {}
        self._settled: set[EntryPoint] = set()  # loaded, or warned of

    @property
    def registered(self) -> list[str]:
        """The names that are registered in this process, in the order of the alphabet. No package is looked for."""
        return sorted(self._entries)

    def register(
        self, name: str, *positional: Promises.args, **promises: Promises.kwargs
    ) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
        """Make a function available under a name: `@register("mine", scope="group")`.

        The class of the entries (`Estimator`, `Loss`) says what each promise means. Its fields are the promises; a type
        checker knows them too.

        Raises:
            TypeError: there is no such promise.
            ValueError: the name is taken by another function, or is not an identifier.
        """
        parameters = inspect.signature(self._entry).parameters.values()
        known = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
        for promise in promises:
            if promise not in known:
                raise TypeError(
                    f"The {self.kind} {name!r} makes an unknown promise {promise!r}.{suggestion(promise, known)}"
                )

        def add(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
            self.add(name, self._entry(name, function, *positional, **promises))
            return function

        return add

    def add(self, name: str, entry: Entry) -> None:
        """Register an entry, in place of an earlier one from the same place.

        Raises:
            ValueError: another function has the name, or it could be mistaken for a dotted path.
        """
        if name in self._entries and _place(self._entries[name]) != (place := _place(entry)):
            taken = _place(self._entries[name])[0]
            raise ValueError(
                f"The {self.kind} {name!r} is already registered, by {taken}, and not by {place[0]}. "
                "Choose another name."
            )
        if not name.isidentifier():
            raise ValueError(f"{name!r} cannot name a {self.kind}: use letters, digits and underscores only.")
        self._entries[name] = entry

    @contextmanager
    def temporarily(self) -> Iterator[None]:
        """Forget afterwards what was registered inside, so that a test leaves no name behind."""
        before, unregistered = dict(self._entries), dict(self._unregistered)
        try:
            yield
        finally:
            self._entries, self._unregistered = before, unregistered

    def name_of(self, given: str | Callable[..., Any]) -> str:
        """The name under which `given` is found here: itself, or a function's registered name or dotted path.

        A function that nobody has registered is remembered under its dotted path, with its default promises.

        Raises:
            UnknownNameError: neither a name nor a function.
        """
        if isinstance(given, str):
            return given
        if not callable(given):
            raise UnknownNameError(f"The {self.kind} {given!r} is neither a name nor a function.")
        for name, entry in (*self._entries.items(), *self._unregistered.items()):
            if getattr(entry, "function", entry) is given:
                return name
        named = inspect.isfunction(given) and "<" not in given.__qualname__
        path, name = _path(given), _path(given)
        number = 1
        while not named and name in self._unregistered:  # two lambdas share a path, and are two functions
            number += 1
            name = f"{path}#{number}"
        self._unregistered[name] = self._entry(name, given)
        return name

    def __getitem__(self, name: str | Callable[..., Any]) -> Entry:
        """Look up a registered name, take a function, or import `package.module.function`.

        A function that is not registered has its default promises.
        """
        name = self.name_of(name)
        for known in (self._entries, self._unregistered):
            if name in known:
                return known[name]
        if "." not in name and (point := self._offered().get(name)):
            return self._load(point)
        return self._entry(name, import_function(self.kind, name, self))

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self._offered()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self._entries, *self._offered()}))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def _offered(self) -> dict[str, EntryPoint]:
        """What installed packages add, by name. A name that is taken stays where it is, and a warning says so."""
        offered: dict[str, EntryPoint] = {}
        for point in entry_points(group=self.group):
            owner = self._owner(point.name, offered)
            if owner is None:
                offered[point.name] = point
            elif owner != _package(point.value) and point not in self._settled:
                self._settled.add(point)
                warnings.warn(
                    f"The {self.kind} {point.name!r} of {point.value} is left out: {owner} has the name.", stacklevel=3
                )
        return offered

    def _owner(self, name: str, offered: dict[str, EntryPoint]) -> str | None:
        """The package whose function has the name. None where the name is free."""
        if name in self._entries:
            return _package(_place(self._entries[name])[0])
        return _package(offered[name].value) if name in offered else None

    def _load(self, point: EntryPoint) -> Entry:
        """Import what an entry point names. The import may register the function itself, with its promises.

        Raises:
            ImportError: the package cannot be imported, or lacks what the entry point names.
        """
        try:
            function = point.load()
        except (ImportError, AttributeError) as error:
            raise ImportError(
                f"The {self.kind} {point.name!r} of an installed package cannot be loaded from {point.value}: {error}. "
                "Mend or uninstall the package."
            ) from error
        self._settled.add(point)
        if point.name not in self._entries:
            self.add(point.name, self._entry(point.name, function))
        return self._entries[point.name]


def _package(path: str) -> str:
    """The first part of a dotted path."""
    return re.split("[.:]", path)[0]


def _path(function: Callable[..., Any]) -> str:
    """`module.function`, or the class's path for an object that can be called."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def _place(entry: Any) -> tuple[str, int | None]:
    """Where the entry's function is defined. The line counts where several functions share a path, as lambdas do."""
    function = getattr(entry, "function", entry)
    if not callable(function):
        return repr(function), None
    path = _path(function)
    code = getattr(function, "__code__", None)
    return path, code.co_firstlineno if code is not None and "<" in path else None


def import_function(kind: str, path: str, known: Iterable[str] = ()) -> Callable[..., Any]:
    """Import the function at `package.module.function`.

    Args:
        kind: what the function should be, for error messages.
        known: names that would do instead of a path.

    Raises:
        UnknownNameError: there is no such module, or the module has no such function.
    """
    module_path, _, attribute = path.rpartition(".")
    if "" in path.split(".") or not module_path:  # ./rewards.py would be a relative import
        raise UnknownNameError(
            f"Unknown {kind} {path!r}.{suggestion(path, known)} A function of yours is written package.module.function."
        )
    try:
        module = importlib.import_module(module_path)
    except ModuleNotFoundError as error:
        # A missing import *inside* the user's module is the user's own error, and shows as such.
        if error.name is None or not f"{module_path}.".startswith(f"{error.name}."):
            raise
        raise UnknownNameError(f"Unknown {kind} {path!r}: there is no module {error.name!r} here.") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise UnknownNameError(
            f"Unknown {kind} {path!r}: {module_path!r} has no function {attribute!r}.{suggestion(attribute, names)}"
        )
    return function


def check_taken(owner: str, keywords: Iterable[str], known: Iterable[str]) -> None:
    """Refuse, with a ValueError, a keyword that is not among the known ones.

    Args:
        owner: what takes the known ones, for the message.
    """
    known = list(known)
    for keyword in keywords:
        if keyword not in known:
            raise ValueError(f"{owner} takes no keyword {keyword!r}.{suggestion(str(keyword), known)}")


def check_kinds(function: Callable[..., Any], keywords: Mapping[str, Any]) -> None:
    """Refuse, with a ValueError, a keyword of another kind than its annotation asks for, such as "0.1" for 0.1.

    Annotations that are not among `_KINDS` are not looked at.
    """
    parameters = inspect.signature(function).parameters
    for keyword, value in keywords.items():
        kinds, wanted = _KINDS.get(parameters[keyword].annotation if keyword in parameters else None, ((object,), ""))
        if not isinstance(value, kinds) or (isinstance(value, bool) and Real in kinds):
            raise ValueError(f"{keyword}={value!r} must be {wanted}.")


_KINDS: dict[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "True or False"),
    float: ((Real,), "a number"),
    float | None: ((Real, type(None)), "a number or None"),
    int: ((Integral,), "a whole number"),
    str: ((str,), "text"),
}


def suggestion(name: str, known: Iterable[str]) -> str:
    """End of an error message about an unknown name: " Did you mean ...? Known: ..."."""
    known = list(known)
    return f"{did_you_mean(name, known)} Known: {', '.join(known) or 'none'}."


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The nearest of the known names, for an error message; empty where none is near."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=2)
    # "dppo" is spelled nearer to "gdpo" than to "dppo_tv".
    longer = [other for other in known if len(name) > 2 and other.startswith(name)]
    near = near if set(near) & set(longer) else [*longer, *near][:2]
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
