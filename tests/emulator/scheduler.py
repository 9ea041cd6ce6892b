"""Runs a unit's groups of lanes in an order that the schedule's seed shuffles, until all have exited."""

from __future__ import annotations

from emulator.errors import EmulatorError, Fault
from emulator.machine import Machine
from emulator.unit import Unit

LANDING = 0.25  # "shuffled": how often a copy lands between two turns


def run(machine: Machine, unit: Unit) -> None:
    """
    Raises:
        EmulatorError: The kernel does what it must not, or stands still.
    """
    while alive := [group for group in unit.groups if not group.done]:
        ready = [group for group in alive if group.wake()]
        shuffled = unit.schedule.completion == "shuffled"
        if unit.pending and (not ready or (shuffled and unit.rng.random() < LANDING)):
            _land(machine, unit)
        elif ready:
            # One that has just asked in vain lets others go first.
            eager = [group for group in ready if not group.yielded] or ready
            group = eager[int(unit.rng.integers(len(eager)))]
            _note_exits(unit)
            machine.run(group)
            for other in unit.groups:
                other.yielded = other.yielded and other is group
            if group.yielded and unit.pending:
                _land(machine, unit)
        else:
            raise EmulatorError(f"{machine.kernel.name}: deadlock: {_standing(machine, unit)}")
    try:
        while unit.pending:
            unit.finish_one()
        for check in unit.at_end:
            check()
    except Fault as fault:
        raise EmulatorError(f"{machine.kernel.name}: at the end of the block: {fault}") from None


def _land(machine: Machine, unit: Unit) -> None:
    try:
        unit.finish_one()
    except Fault as fault:
        raise EmulatorError(f"{machine.kernel.name}: {fault}") from None


def _note_exits(unit: Unit) -> None:
    """Nobody may reach into the shared memory of a block whose threads have all exited."""
    if len(unit.shared.gone) > 1:
        for block in range(len(unit.shared.gone)):
            unit.shared.gone[block] = unit.alive(block) == 0


def _standing(machine: Machine, unit: Unit) -> str:
    """Who waits for what, and where."""
    said = []
    for group in unit.groups:
        for wait in group.waits:
            lanes = int(wait.mask.sum())
            who = group.who(int(wait.mask.argmax())) + (f" and {lanes - 1} more" if lanes > 1 else "")
            said.append(f"{who} at {machine.place(wait.pc)}: waits for {wait.text()}")
    more = f"; and {len(said) - 6} more" if len(said) > 6 else ""
    return "; ".join(said[:6]) + more
