"""What a model is conditioned on: its class labels and its other conditions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..diffusion.arrays import Array
from ..errors import RequestError
from ..errors.messages import shown, unwrapped
from .conditions import LABEL, LEARNED, Condition
from .labels import Labels


@dataclass(frozen=True, eq=False, kw_only=True)
class Conditioned:
    """A model's labels and conditions.

    Attributes:
        labels: The classes; None for a model without labels.
        conditions: The arrays that the network takes besides x, time and label, in its order.
    """

    name: str
    labels: Labels | None
    conditions: tuple[Condition, ...] = ()

    @property
    def num_classes(self) -> int:
        """The number of classes, 0 without labels. Also the number of the null label."""
        return len(self.labels.names) if self.labels else 0

    @property
    def null_label(self) -> int | None:
        """The number of the null label; None if there is none or it was not trained."""
        return self.num_classes if self.labels and self.labels.null_trained else None

    @property
    def num_labels(self) -> int:
        """The number of labels that the network knows, a trained null label included."""
        return self.num_classes + (self.null_label is not None)

    @property
    def can_guide(self) -> bool:
        """Whether guidance has a prediction to contrast with: an input has a null value."""
        return self.null_label is not None or any(c.null is not None for c in self.conditions)

    @property
    def inputs(self) -> tuple[Condition, ...]:
        """All that the network is conditioned on: the label, if it has classes, and the rest."""
        if not self.labels:
            return self.conditions
        classes = (0, max(1, self.num_classes - 1))
        return Condition(LABEL, (), "int64", classes, "a class", self.null_label), *self.conditions

    def label_number(self, label: int | str | None) -> int:
        """Return the number of a label.

        Args:
            label: A name, a number, or None for the null label.

        Raises:
            RequestError: There is no such label.
        """
        if self.labels is not None:
            return self.labels.number(label, self.name)
        if unwrapped(label) is not None:
            raise RequestError(
                f"{self.name} has no labels, got label={shown(label)}. Leave `label` out."
            )
        return 0

    def null_of(self, condition: Condition) -> Array:
        """Return the null value of a condition that has one, [*shape].

        Raises:
            BundleError: It is learned, and its file is damaged.
        """
        if condition.null == LEARNED:
            return self.learned_null(condition)
        return np.full(condition.shape, condition.null, condition.kind)

    def learned_null(self, condition: Condition) -> Array:
        """Return the array [*shape] that training found for a missing condition."""
        raise NotImplementedError

    def null_conditions(self) -> dict[str, Array]:
        """Return the null values [*shape] of the conditions that have one, by name."""
        return {c.name: self.null_of(c) for c in self.conditions if c.null is not None}

    def draw_conditions(self, count: int, first: int = 0) -> dict[str, Array]:
        """Return conditions [count, *shape] by name, which stand for real ones in checks.

        Args:
            first: The number of the first; each number always gives the same conditions.
        """
        drawn: dict[str, Array] = {}
        for place, condition in enumerate(self.conditions):
            keys = [[first + i, place] for i in range(count)]
            generators = [np.random.Generator(np.random.Philox(key=key)) for key in keys]
            drawn[condition.name] = np.array([condition.draw(g) for g in generators])
        return drawn
