"""Bugs planted in kernels: the emulator has to find every one that can change a result on hardware."""

from __future__ import annotations

import re

import pytest

from emulator import EmulatorError
from emulator.compilers import PROBES, nvcc, start
from probes.conv_probes import PROBES as CONVOLUTIONS
from probes.mutants import MUTANTS, SOURCES, Mutant, renamed, sources, together
from probes.run import SCHEDULES, emulated, wrong

pytestmark = pytest.mark.skipif(not nvcc() or not PROBES.exists(), reason="needs an nvcc")
BY_NAME = {probe.name: probe for probe in CONVOLUTIONS}


@pytest.fixture(scope="module", autouse=True)
def _compiled_ahead(request):
    """The second core compiles while the first one emulates."""
    for item in request.session.items:
        mutant = getattr(item, "callspec", None) and item.callspec.params.get("mutant")
        if isinstance(mutant, Mutant):
            probe = BY_NAME[mutant.probe]
            start(PROBES / probe.source, probe.arch, together(mutant))


def finding(mutant: Mutant) -> tuple[str, str]:
    """(what was said, under which schedule); ("", "") if nothing was found."""
    probe = BY_NAME[mutant.probe]
    for name in ("warps, copies late", "blocks in lockstep, copies early", "warps, copies shuffled"):
        try:
            said = wrong(probe, emulated(probe, SCHEDULES[name], together(mutant), renamed(mutant)))
        except EmulatorError as error:
            said = str(error)
        if said:
            return said, name
    return "", ""


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_mutant(mutant, record_property):
    """Found, by the check that it was written for; or not, for the reason that stands beside it."""
    said, schedule = finding(mutant)
    record_property("finding", f"{said} [{schedule}]")
    if mutant.expect is None:
        assert mutant.reason and not said
    else:
        assert re.search(mutant.expect, said), f"expected {mutant.expect}, got {said or 'nothing'}"


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_it_is_one_change(mutant):
    assert sources(mutant) != SOURCES[mutant.probe].read_text()


def test_there_are_enough():
    caught = [mutant for mutant in MUTANTS if mutant.expect]
    assert len(caught) >= 30 and len({m.kind for m in caught}) >= 15


CHECKS = {
    "race between two accesses to shared memory": r"race: (reads|writes|overwrites) byte",
    "race at a barrier": r"race: arrives at barrier",
    "an mbarrier used before its initialisation is known": r"race: no barrier lies between",
    "missing proxy fence": r"no proxy fence",
    "wgmma.fence": r"wgmma.fence",
    "operation in flight": r"in flight",
    "undefined value": r"undefined|uninitialised",
    "deadlock": r"deadlock",
    "too many arrivals": r"arrivals at an mbarrier|threads arrive at barrier",
    "bounds": r"out of bounds",
    "alignment": r"not aligned",
    "block that has exited": r"exited",
    "result": r"^result",
}


def main() -> None:
    """docs/mutants.md, on the standard output."""
    print("# Mutants\n")
    print("Bugs planted in the convolutions of `tests/probes`, and the check of the emulator that catches each")
    print("(`python tests/test_mutants.py`; `tests/probes/mutants.py` has the changes themselves).\n")
    print("| mutant | what is wrong | caught by | under the schedule |\n|---|---|---|---|")
    for mutant in MUTANTS:
        said, schedule = finding(mutant)
        by = next((name for name, pattern in CHECKS.items() if re.search(pattern, said)), said)
        print(f"| `{mutant.name}` | {mutant.kind} | {by or f'not: {mutant.reason}'} | {schedule} |")


if __name__ == "__main__":
    main()
