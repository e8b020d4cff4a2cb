"""Protocol of the ends of a model, what an `embed` spec builds."""

import typing


class Ends:
    """Base class of the ends of a model: a frozen dataclass registered as ("embed", name)."""

    # The `reads` of its models (`model.Backbone.reads`).
    reads: typing.ClassVar[str]

    def inherited(self) -> dict[str, typing.Any]:
        """Returns values that the specs of layers inherit, by the names of their fields."""
        return {}
