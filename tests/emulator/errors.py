"""What goes wrong, in one line that says where."""

from __future__ import annotations


class EmulatorError(Exception):
    """PTX that cannot be read, a launch that does not fit, or a kernel that does what it must not."""


class Fault(Exception):
    """What an instruction must not do, said by its implementation; the machine adds where and who.

    Attributes:
        position: Of the culprit among the lanes that the instruction runs for; None: it is not one lane's fault.
    """

    def __init__(self, message: str, position: int | None = None) -> None:
        super().__init__(message)
        self.position = position
