"""The commands of `.ci/run`, one session each: `nox` runs lint and tests, `nox --list` shows all."""

from __future__ import annotations

from pathlib import Path

import nox

nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "types", "layers", "docs", "tests"]

PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]
WORKFLOWS = [f".github/workflows/{name}.yml" for name in ("checks", "docs", "exhaustive", "release")]


def install(session: nox.Session, *groups: str) -> None:
    """Install the package in place, with groups of pyproject.toml."""
    session.install("--editable", ".", *(f"--group={group}" for group in groups))


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and format, the workflow files and CITATION.cff."""
    session.install("--group=lint")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("check-jsonschema", "--builtin-schema", "vendor.github-workflows", *WORKFLOWS)
    session.run("check-jsonschema", "--builtin-schema", "vendor.citation-file-format", "CITATION.cff")


@nox.session
def types(session: nox.Session) -> None:
    """Check the types of src."""
    install(session, "lint")
    session.run("mypy")


@nox.session
def layers(session: nox.Session) -> None:
    """Check that imports point down only."""
    install(session, "lint")
    session.run("lint-imports")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation into site/."""
    install(session, "docs")
    session.run("mkdocs", "build", "--strict", "--quiet", *session.posargs)


@nox.session
def package(session: nox.Session) -> None:
    """Build wheel and sdist into dist/ and check them."""
    session.install("--group=release")
    session.run("python", "-m", "build")
    dist = [str(path) for path in Path("dist").iterdir()]
    session.run("twine", "check", "--strict", *dist)
    session.run("check-wheel-contents", *(path for path in dist if path.endswith(".whl")))


@nox.session
def demo(session: nox.Session) -> None:
    """Run the demo and hold its numbers against what the project promises."""
    install(session)
    out = session.create_tmp()
    report = f"{out}/demo.json"
    with open(report, "w") as file:  # noqa: PTH123 - nox knows no paths
        session.run("zepad", "demo", "--json", "--out", f"{out}/demo", stdout=file)
    session.run("python", ".ci/check_demo.py", report)


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Run the default tests; arguments after -- go to pytest."""
    install(session, "test")
    session.run("pytest", *session.posargs)


@nox.session
def coverage(session: nox.Session) -> None:
    """Run the default tests and check how much of the package they reach."""
    install(session, "test")
    session.run("pytest", "--cov", "--cov-report=term-missing:skip-covered", *session.posargs)
    session.run("python", ".ci/check_coverage.py")


@nox.session
def slow(session: nox.Session) -> None:
    """Run the tests that are marked slow."""
    install(session, "test", "browser")
    session.run("pytest", "-m", "slow", *session.posargs)


@nox.session
def exhaustive(session: nox.Session) -> None:
    """Run the tests that are marked exhaustive."""
    install(session, "test", "checkpoints")
    session.run("pytest", "-m", "exhaustive", *session.posargs)


@nox.session(venv_backend="uv", python="3.11")
def lowest(session: nox.Session) -> None:
    """Run the default tests, but for export, with the lowest version of every direct dependency."""
    session.install("--resolution=lowest-direct", "--editable", ".", "--group=test")
    session.run("pytest", *session.posargs)
