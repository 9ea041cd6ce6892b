"""The architecture page and the layering it describes, held against the files."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
PACKAGE = ROOT / "refinenet_fast"
# Highest first; a module may import from its own layer and from those below.
LAYERS = (
    {"__main__"},
    {"command"},
    {"cli"},
    {"training"},
    {"__init__"},
    {"exporting"},
    {"model", "published", "folding", "accelerate"},
    {"variants", "trunks", "initialise", "adapters", "alterations"},
    {"blocks"},
    {"testing", "plain", "tuning"},
    {"ops"},
    {"backends"},
    {"kernels", "layout", "files", "_native"},
)

if not PAGE.exists():
    pytest.skip("not in a checkout", allow_module_level=True)


def modules() -> dict[str, Path]:
    """Dotted name within the package -> file."""
    files = sorted(PACKAGE.rglob("*.py"))
    return {".".join(f.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


def layer(name: str) -> int:
    (found,) = [i for i, names in enumerate(LAYERS) if name.split(".")[0] in names]
    return found


def test_every_file_that_the_page_names_exists():
    links = re.findall(r"\]\(([^)#]+)\)", PAGE.read_text())
    assert len(links) > 20
    for link in links:
        assert (PAGE.parent / link).is_file(), link
    for folder in ("ops/", "backends/", "kernels/", "csrc/cpu", "csrc/cuda"):
        assert folder in PAGE.read_text().split("flowchart TB")[1].split("```")[0]
        assert any(root.joinpath(folder).is_dir() for root in (ROOT, PACKAGE)), folder
    for label, link in re.findall(r"\[([\w/.]+)\]\(([^)#]+)\)", PAGE.read_text()):
        assert link.endswith(label), f"{label} links to {link}"


def test_the_page_names_every_module_of_the_layers_and_every_kernel():
    text = PAGE.read_text()
    public = [f for name, f in modules().items() if f.name != "__init__.py" and not f.name.startswith("_")]
    below = {
        "layout.py",
        "checked.py",
        "native.py",
        "engine.py",
        "packed.py",
        "testing.py",
        "plain.py",
    }  # helpers of the files it names
    kernels = [f for suffix in ("cpu/*.cpp", "cuda/*.cu") for f in (ROOT / "csrc").glob(suffix)]
    kernels += [f for f in (ROOT / "kernels").glob("*.py") if f.name != "__init__.py"]
    helpers = {"dispatch.cpp", "content_hash.cpp", "runtime.cu"}
    for file in [*(f for f in public if f.name not in below), *(f for f in kernels if f.name not in helpers)]:
        assert f"{file.name})" in text, f"docs/architecture.md does not name {file.relative_to(ROOT)}"


def test_the_page_names_what_there_is():
    import refinenet_fast
    from refinenet_fast import ops
    from refinenet_fast.backends import Backend

    text = PAGE.read_text()
    for name in re.findall(r"`ops\.(\w+)`", text):
        assert callable(getattr(ops, name))
    for name in re.findall(r"\| `(\w+)`", text.split("over four kernels")[1]):
        assert hasattr(Backend, name), name
    assert hasattr(refinenet_fast, "RefineNetBlock")


@pytest.mark.parametrize("name", [name for name in modules() if name != "__init__"])
def test_imports_run_downwards(name):
    for node in ast.walk(ast.parse(modules()[name].read_text())):
        imported = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("refinenet_fast"):
            base = (node.module or "").removeprefix("refinenet_fast").lstrip(".")
            imported = [base] if base else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            imported = [a.name.removeprefix("refinenet_fast.") for a in node.names if "refinenet_fast." in a.name]
        for other in imported:
            assert layer(other) >= layer(name), f"{name} imports {other}, which is above it"
