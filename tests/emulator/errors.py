"""What goes wrong, in one line that says where."""

from __future__ import annotations


class EmulatorError(Exception):
    """PTX that cannot be read, a launch that does not fit, or a kernel that does what it must not."""
