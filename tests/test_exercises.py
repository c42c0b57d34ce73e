"""Proofs of docs/exercises.md: its patches fit this code, and its judges say of the solutions what
the page says."""
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1]
SECTIONS = re.split(r"^## ", (HERE / "docs/exercises.md").read_text("utf-8"), flags=re.M)[1:]
pytestmark = pytest.mark.skipif(not shutil.which("git"), reason="git applies the patches")


def solve(section, folder):
    """Copies the code into `folder` and applies the patches of a section there, as the page says:
    what is no patch is passed over."""
    for path in [*HERE.iterdir(), *(HERE / "tests").iterdir()]:
        if path.suffix in (".py", ".c", ".toml"):
            copy = folder / path.relative_to(HERE)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    # a repository further up would have its own idea of the paths
    env = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
    done = subprocess.run(["git", "apply"], input=section.encode(), cwd=folder, env=env,
                          capture_output=True)
    assert done.returncode == 0 and not done.stderr, done.stderr.decode()


def judge_of(section):
    """The command of a section's judge, and the tests that must fail and those that must pass."""
    lines = dict(re.findall(r"^- (\w+): (.*(?:\n  .*)*)", section, re.M))
    python, *command = shlex.split(lines["Judge"].strip("`"))
    assert python == "python"
    return command, *(set(re.findall(r"`(test_\w+)`", lines.get(key, "")))
                      for key in ("Fails", "Passes"))


def test_ten_exercises_in_the_order_of_their_minutes():
    """A number or a heading that differs breaks the command by which a solution is applied."""
    titles = [section.split("\n")[0] for section in SECTIONS]
    found = [re.fullmatch(r"(\d+)\. .+ \((\d+ minutes|an evening)\)", title) for title in titles]
    assert [int(title[1]) for title in found] == list(range(1, 11))
    minutes = [int(title[2].removesuffix(" minutes")) for title in found[:-1]]
    assert minutes == sorted(minutes) and found[-1][2] == "an evening"


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.split(".")[0])
def test_solutions_apply(section, tmp_path):
    """Code that moves on leaves a solution behind, and a renamed test its judge."""
    solve(section, tmp_path / "code")
    (_, _, *files), fails, passes = judge_of(section)
    tests = "".join((tmp_path / "code" / name).read_text() for name in files if ".py" in name)
    assert passes and all(f"def {name}(" in tests for name in fails | passes)
    assert any((tmp_path / "code" / name).read_bytes() != (HERE / name).read_bytes()
               for name in re.findall(r"^--- a/(.*)$", section, re.M))


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    """{section: what its judge prints}, as many judges at a time as there are cores."""
    def verdict(section, folder):
        solve(section, folder / "code")
        return subprocess.run([
            sys.executable, *judge_of(section)[0], "-rpfE", "--tb=no", "-p", "no:cacheprovider",
            f"--basetemp={folder / 'temporary'}"], cwd=folder / "code", capture_output=True,
            text=True, encoding="utf-8").stdout

    folders = [tmp_path_factory.mktemp("exercise") for _ in SECTIONS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(SECTIONS, pool.map(verdict, SECTIONS, folders)))


@pytest.mark.slow
@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.split(".")[0])
def test_judges_say_what_the_page_says(section, verdicts):
    """A judge that passes a wrong change, or fails for another reason than the page gives, teaches
    what is not so."""
    _, fails, passes = judge_of(section)
    results = re.findall(r"^(PASSED|FAILED|ERROR) \S+?::(\w+)", verdicts[section], re.M)
    failed = {name for result, name in results if result != "PASSED"}
    assert failed == fails, verdicts[section][-4000:]
    assert {name for _, name in results} - failed == passes, verdicts[section][-4000:]
