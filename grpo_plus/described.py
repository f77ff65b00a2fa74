"""What a registered function says about itself: read from its docstring and signature, so nothing is written twice."""

import inspect
import re
from collections.abc import Callable
from typing import Any


class Described:
    """Summary, paper and hyper-parameters of an entry that wraps `function`."""

    function: Callable[..., Any]

    @property
    def documentation(self) -> str:
        """The function's docstring without its indentation; empty where there is none."""
        return inspect.getdoc(self.function) or ""

    @property
    def summary(self) -> str:
        """First line of the documentation."""
        return self.documentation.partition("\n")[0]

    @property
    def paper(self) -> str:
        """First link in the documentation."""
        link = re.search(r"https://[^\s)]+", self.documentation)
        return link.group() if link else ""

    @property
    def keywords(self) -> dict[str, Any]:
        """The function's hyper-parameters and their defaults."""
        return {parameter.name: parameter.default for parameter in self.parameters}

    @property
    def parameters(self) -> list[inspect.Parameter]:
        """The function's parameters after the data, which comes first."""
        return list(inspect.signature(self.function).parameters.values())[1:]
