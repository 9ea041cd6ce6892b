"""`pytest benchmarks --benchmark-only`: gives each test_* function the cases of its file."""

import cli


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="benchmarks: tiny shapes")


def pytest_generate_tests(metafunc):
    if "measurement" in metafunc.fixturenames:
        quick = metafunc.config.getoption("--quick")
        cases = cli.measurements(metafunc.module.BENCHMARK, quick)
        metafunc.parametrize("measurement", cases, ids=str)
