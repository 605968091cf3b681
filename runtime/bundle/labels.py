"""The classes of a model: their names, and the number of a label."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import RequestError
from ..errors.arguments import choice, integer
from ..errors.messages import refused, shown, unwrapped


@dataclass(frozen=True)
class Labels:
    """The names of the classes, in the network's order.

    Attributes:
        null_trained: Whether the null label, number len(names), was trained.
    """

    names: tuple[str, ...]
    null_trained: bool

    def number(self, label: object, model: str) -> int:
        """Return the number of a label.

        Args:
            label: A name, a number, or None for the null label.
            model: The model's name, for messages.

        Raises:
            RequestError: There is no such label.
        """
        label = unwrapped(label)
        count = len(self.names)
        if label is None:
            if not self.null_trained:
                raise RequestError(
                    f"{model} was trained with labels only. Pass one of {', '.join(self.names)}."
                )
            return count
        if isinstance(label, str):
            if label in self.names:
                return self.names.index(label)
            # A command line gives numbers as text. int() alone would read "١" and "1_0" too.
            if not re.fullmatch("-?[0-9]{1,18}", label):
                choice("label", label, self.names)  # raises, with the nearest name
            label = int(label)
        try:
            return integer("label", label, 0, count - 1)
        except RequestError:
            pass
        if isinstance(label, int) and not isinstance(label, bool):
            raise RequestError(
                f"label {shown(label)} is out of range: {model} has labels 0 to {count - 1} "
                f"({self.names[0]} … {self.names[-1]})."
            )
        raise refused("label", f"a name or a number from 0 to {count - 1}", label)
