"""The package as it is installed: what it holds, under which names, what it does to its host."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

import reembed
from tests.conftest import (
    ROOT,
    Serve,
    clean_environment,
    make_store,
    memory,
    select,
)

pytestmark = pytest.mark.system

NAME = f"beam_reembed-{reembed.__version__}"


def python(
    *arguments: str | Path, directory: Path, home: Path, path: Sequence[Path] = ()
) -> subprocess.CompletedProcess[str]:
    """Run Python in a directory, with these put before what is installed."""
    environment = clean_environment(home) | {"PYTHONPATH": ":".join(map(str, path))}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=directory,
        env=environment | {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


def done(process: subprocess.CompletedProcess[str]) -> str:
    assert process.returncode == 0, process.stderr
    return process.stdout


# What is in it.


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel that is made of the checkout, and the one that is made of its sdist."""
    place = tmp_path_factory.mktemp("built")
    checkout = place / "checkout"
    checkout.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    for name in ("pipeline", "transforms", "reembed"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, checkout / name, symlinks=True, ignore=ignored)

    def wheel(source: Path | str, to: str) -> Path:
        program: list[str | Path] = [
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-build-isolation",
            "--no-deps",
        ]
        done(python(*program, "-w", place / to, source, directory=checkout, home=place))
        (found,) = (place / to).glob("*.whl")
        return found

    program: list[str | Path] = ["setup.py", "-q", "sdist", "--dist-dir", place / "sdist"]
    done(python(*program, directory=checkout, home=place))
    (sdist,) = (place / "sdist").glob("*.tar.gz")
    from_sdist = wheel(sdist, "of sdist")
    return wheel(".", "direct"), from_sdist


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_both_wheels_hold_the_same_files_and_one_package(built: tuple[Path, Path]) -> None:
    direct, from_sdist = map(contents, built)

    assert direct == from_sdist
    assert {name.partition("/")[0] for name in direct} == {"reembed", f"{NAME}.dist-info"}
    assert "reembed/py.typed" in direct
    modules = {
        f"reembed/{path.relative_to(ROOT)}"
        for part in ("pipeline", "transforms")
        for path in (ROOT / part).rglob("*.py")
    }
    assert {name for name in direct if name.endswith(".py")} == {
        *modules,
        "reembed/__init__.py",
        "reembed/__main__.py",
    }


HOST = """
import json, sys
import pipeline, transforms
import reembed

db, url = sys.argv[1:]
outcome = reembed.run(db, backend="openai-compatible", base_url=url, model="a-model", dim=8)
print(json.dumps({
    "replaced": outcome.summary.replaced,
    "host": [pipeline.OF_THE_HOST, transforms.OF_THE_HOST],
    "at": [pipeline.__file__, transforms.__file__, reembed.__file__],
}))
"""


def test_installed_it_works_beside_a_hosts_own_modules_of_these_names(
    built: tuple[Path, Path], tmp_path: Path, serve: Serve
) -> None:
    place, host = tmp_path / "installed", tmp_path / "host"
    host.mkdir()
    program: list[str | Path] = [
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--target",
        place,
        built[0],
    ]
    done(python(*program, directory=tmp_path, home=tmp_path))
    for name in ("pipeline", "transforms"):
        (host / f"{name}.py").write_text(f"OF_THE_HOST = '{name}'\n")
    (host / "use.py").write_text(HOST)
    store = make_store(tmp_path / "m.db", [memory(f"{at}") for at in range(5)])
    url = serve(dimension=8).url

    said = done(python("use.py", store, url, directory=host, home=tmp_path, path=[place]))
    found = json.loads(said.splitlines()[-1])
    assert (found["replaced"], found["host"]) == (5, ["pipeline", "transforms"])
    assert found["at"] == [
        str(host / "pipeline.py"),
        str(host / "transforms.py"),
        str(place / "reembed" / "__init__.py"),
    ]
    # The program, too, from where such modules are.
    printed = done(
        python(
            "-m",
            "reembed",
            "status",
            "--db",
            store,
            "--json",
            directory=host,
            home=tmp_path,
            path=[place],
        )
    )
    assert [run["state"] for run in json.loads(printed)["runs"]] == ["replaced"]
    version = done(
        python("-m", "reembed", "--version", directory=host, home=tmp_path, path=[place])
    )
    assert version == f"reembed {reembed.__version__}\n"
    assert select(store, "SELECT count(DISTINCT embedding_dim) FROM memories") == [(1,)]


# Under which names.

WATCH = """
import atexit, json, os, sys

MAIN = ("__main__", "__mp_main__")  # The latter is the same module, as multiprocessing names it.

def note():
    files = {}
    for name, module in list(sys.modules.items()):
        if (file := getattr(module, "__file__", None)) and name not in MAIN:
            files.setdefault(os.path.realpath(file), []).append(name)
    with open(os.environ["HOME"] + "/modules.json", "w") as out:
        json.dump(files, out)

atexit.register(note)
"""

MOVE = """
import sys, reembed
db, url = sys.argv[2], sys.argv[6]
reembed.run(db, backend="openai-compatible", base_url=url, model="a-model", dim=8)
"""


@pytest.mark.parametrize(
    "way", [["-m", "pipeline"], ["-m", "reembed"], ["-c", MOVE]], ids=["pipeline", "reembed", "run"]
)
def test_no_module_is_imported_under_two_names(
    way: list[str], tmp_path: Path, serve: Serve
) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(WATCH)
    store = make_store(tmp_path / "m.db", [memory(f"{at}") for at in range(5)])
    there = ["--backend", "openai-compatible", "--base-url", serve(dimension=8).url]
    flags = ["--db", str(store), *there, "--model", "a-model", "--dim", "8"]

    done(python(*way, *flags, directory=ROOT, home=tmp_path, path=[site, ROOT]))

    files = json.loads((tmp_path / "modules.json").read_text())
    ours = {
        file: names
        for file, names in files.items()
        if Path(file).is_relative_to(ROOT) and not Path(file).is_relative_to(ROOT / ".venv")
    }
    assert len(ours) > 60
    assert {file: names for file, names in ours.items() if len(names) > 1} == {}
    names = {name for names in ours.values() for name in names}
    assert {name for name in names if name.partition(".")[0] != "reembed"} == set()
    assert select(store, "SELECT count(*) FROM memories WHERE embedding IS NULL") == [(0,)]


# What it does to its host.

STATE = """
import gc, json, logging, os, signal, sys, threading, warnings

def state():
    root, ours = logging.getLogger(), logging.getLogger("reembed")
    return {
        "filters": list(warnings.filters),
        "showwarning": warnings.showwarning,
        "root": (root.level, list(root.handlers), logging.root.manager.disable),
        "ours": (ours.level, list(ours.handlers), ours.propagate, ours.disabled),
        "levels": dict(logging._nameToLevel),
        "gc": (gc.isenabled(), gc.get_threshold(), gc.get_freeze_count()),
        "hooks": (sys.excepthook, sys.unraisablehook, threading.excepthook, sys.displayhook),
        "signals": [signal.getsignal(one) for one in signal.valid_signals()],
        "environment": dict(os.environ),
        "streams": (sys.stdin, sys.stdout, sys.stderr),
        "argv": list(sys.argv),
        "directory": os.getcwd(),
        "path": list(sys.path),
    }

def same(before, what):
    for name, value in state().items():
        if value != before[name]:
            print(what, "changes", name, before[name], value, file=sys.stderr)
"""

WHOLE = """
before = state()
import reembed
slow = {"numpy", "apache_beam", "argparse", "typing_extensions"} & sys.modules.keys()
assert not slow, slow
same(before, "import")

def call():
    reembed.plan(sys.argv[1])
    same(before, "plan")
    assert not {"apache_beam", "torch", "argparse"} & sys.modules.keys()
    told = []
    assert reembed.run(sys.argv[1], progress=told.append).summary.replaced == 5
    assert told[-1].rows_done == 5
    same(before, "run")
    assert reembed.verify(sys.argv[1]).sampled == 5
    reembed.status(sys.argv[1])
    reembed.rollback(sys.argv[1])
    reembed.cleanup(sys.argv[1])
    same(before, "what follows")
    assert "reembed.pipeline.cli" not in sys.modules
    print("done")
"""

CALLS = {
    "main thread": "call()",
    "another thread, logging configured": (
        "logging.basicConfig(level=logging.ERROR); before = state()\n"
        "thread = threading.Thread(target=call); thread.start(); thread.join()"
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_the_interpreter_is_as_it_was_after_a_run_with_a_model_of_this_machine(
    call: str, tmp_path: Path
) -> None:
    store = make_store(tmp_path / "m.db", [memory(f"{at}") for at in range(5)])

    ran = python("-c", STATE + WHOLE + call, store, directory=tmp_path, home=tmp_path, path=[ROOT])

    assert (ran.stdout, ran.stderr) == ("done\n", "")
