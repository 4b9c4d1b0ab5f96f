"""The frame around the code: pins, shell scripts, direction of imports, the set of flags, a `--help` that loads nothing heavy."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

from falcon_finetune.options import USER_ERROR_EXIT_CODE, UserError, build_parser, parse_options

ROOT = Path(__file__).resolve().parents[1]
SHELL_SCRIPTS = [*sorted(ROOT.glob("scripts/**/*.sh")), ROOT / ".ci/run"]
PRODUCT_FILES = [ROOT / "finetune.py", *sorted(ROOT.glob("falcon_finetune/**/*.py")), *sorted(ROOT.glob("scripts/**/*.py"))]
TEST_FILES = sorted(ROOT.glob("tests/**/*.py"))
OWN_NAMES = {"finetune", "falcon_finetune", "scripts", "tests"}
HEAVY_PACKAGES = {"torch", "transformers", "datasets", "trl", "peft", "accelerate", "bitsandbytes", "numpy", "matplotlib", "wandb"}

# torch for CUDA pins the triton it was built with, and its CPU build has none: a pin of our own could only contradict it.
COMES_WITH = {"triton": "torch"}

# A room may import only the rooms that stand before it. A new room gets its place here.
ROOMS = ["options", "console", "tiny_falcon", "hub", "family", "kernels", "quantization", "attention", "lora", "packed_falcon", "memory",
         "sources", "data", "run_record", "checkpoints", "generation", "training"]

# A new flag is a decision: it is added here, with its help line, and the total stays about 45 at most.
FLAGS = {
    "-h", "--help",
    "-m", "--model_name", "-q", "--quantize_mode", "--llm_int8", "--random_weights", "--revision", "--compute_dtype",
    "-d", "--dataset_name", "--max_length", "--eval_fraction", "--eval_steps",
    "-s", "--steps", "--epochs", "-b", "--batch_size_per_device", "--gradient_accumulation_steps",
    "--learning_rate", "--lr_scheduler_type", "--warmup_steps", "--max_grad_norm",
    "--lora_r", "--lora_alpha", "--lora_dropout", "--seed",
    "-o", "--output_dir", "--checkpoint_steps", "--resume", "--report_to",
    "--micro_batch_tokens", "--recompute", "--compile", "--gpu_memory_gib",
}


def requirement_lines(path: Path) -> list[str]:
    return [line for line in (raw.split("#")[0].strip() for raw in path.read_text().splitlines()) if line]


def canonical(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def pinned(path: Path) -> set[str]:
    return {canonical(line.split("==")[0]) for line in requirement_lines(path) if not line.startswith("-r")}


def imported_modules(path: Path) -> set[str]:
    """Dotted names of the modules a file imports anywhere in it; for `from a import b` both a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write it in full"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def third_party(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported_modules(path)} - OWN_NAMES - sys.stdlib_module_names


def modules_loaded_by(*command: str) -> tuple[subprocess.CompletedProcess, set[str]]:
    """Runs Python with -X importtime; returns the process and the top-level packages that it imported."""
    process = subprocess.run([sys.executable, "-X", "importtime", *command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    lines = [line for line in process.stderr.splitlines() if line.startswith("import time:")]
    return process, {line.split("|")[-1].strip().split(".")[0] for line in lines}


def torchrun_arguments(script: str) -> tuple[list[str], list[str]]:
    """The arguments of torchrun and of finetune.py on a script's one torchrun line."""
    lines = [line for line in (ROOT / script).read_text().splitlines() if line.startswith("torchrun ")]
    assert len(lines) == 1
    words = shlex.split(lines[0])
    assert words[-1] == "$@", "further flags pass through"
    place = words.index("finetune.py")
    return words[1:place], words[place + 1 : -1]


# Dependencies


@pytest.mark.parametrize("name", ["requirements.txt", "tests/requirements.txt"])
def test_every_requirement_is_pinned(name):
    for line in requirement_lines(ROOT / name):
        assert line == "-r ../requirements.txt" or re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9A-Za-z.]*", line), line


def test_conda_environment_holds_no_second_list_of_pins():
    environment = yaml.safe_load((ROOT / "falcon-env.yaml").read_text())
    assert environment["name"] == "falcon"
    assert environment["dependencies"] == ["python=3.11", "pip", {"pip": ["-r requirements.txt"]}]


@pytest.mark.parametrize("path", PRODUCT_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_product_imports_stand_in_requirements(path):
    check_imports(path, pinned(ROOT / "requirements.txt"))


@pytest.mark.parametrize("path", TEST_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_of_tests_stand_in_requirements(path):
    check_imports(path, pinned(ROOT / "requirements.txt") | pinned(ROOT / "tests/requirements.txt"))


def check_imports(path: Path, allowed: set[str]) -> None:
    distributions = packages_distributions()
    for name in third_party(path):
        providers = {canonical(provider) for provider in distributions.get(name, [name])} | {COMES_WITH.get(name)}
        assert providers & allowed, f"{path.relative_to(ROOT)} imports {name}, which no pin provides"


def test_licence_is_apache_2():
    words = " ".join((ROOT / "LICENSE").read_text().split())
    assert words.startswith("Apache License Version 2.0, January 2004")
    for heading in ("3. Grant of Patent License.", "9. Accepting Warranty or Additional Liability.", "END OF TERMS AND CONDITIONS"):
        assert heading in words


# Imports


def test_every_room_has_its_place():
    rooms = {path.stem for path in ROOT.glob("falcon_finetune/*.py")} - {"__init__"}
    assert rooms == set(ROOMS)
    assert len(ROOMS) == len(set(ROOMS))


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_one_way(room):
    modules = imported_modules(ROOT / "falcon_finetune" / f"{room}.py")
    imported = {name.split(".")[1] for name in modules if name.startswith("falcon_finetune.")}
    later = set(ROOMS[ROOMS.index(room):])
    assert not imported & later, f"{room} stands before {sorted(imported & later)} in ROOMS"


def test_nothing_imports_the_entrypoint_and_no_room_imports_a_script():
    for path in PRODUCT_FILES:
        tops = {name.split(".")[0] for name in imported_modules(path)}
        assert "finetune" not in tops, path
        assert "tests" not in tops, path
        assert path.parent == ROOT / "scripts" or "scripts" not in tops, path


def test_ruff_finds_nothing():
    process = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise", str(ROOT)],
                             cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr


# Flags


def test_the_set_of_flags_is_frozen():
    parser = build_parser()
    assert {flag for action in parser._actions for flag in action.option_strings} == FLAGS
    assert len(parser._actions) <= 45


def test_every_flag_has_a_help_line():
    for action in build_parser()._actions:
        assert action.help, action.option_strings


def test_options_load_nothing_heavy():
    process, loaded = modules_loaded_by("-c", "import falcon_finetune.options")
    assert process.returncode == 0, process.stderr[-2000:]
    assert "argparse" in loaded
    assert not loaded & HEAVY_PACKAGES


@pytest.mark.parametrize("flag, code", [("--help", 0), ("--quantise_mode", USER_ERROR_EXIT_CODE), ("--steps=0", USER_ERROR_EXIT_CODE)])
def test_entrypoint_answers_without_loading_anything_heavy(flag, code):
    process, loaded = modules_loaded_by("finetune.py", flag)
    assert process.returncode == code, process.stderr[-2000:]
    assert "argparse" in loaded
    assert not loaded & HEAVY_PACKAGES
    if code == 0:
        assert all(name in process.stdout for name in FLAGS)


@pytest.mark.parametrize("script, processes, model, mode", [
    ("scripts/lambda/falcon7b_4bit_1gpu.sh", 1, "ybelkada/falcon-7b-sharded-bf16", "4bit"),
    ("scripts/lambda/falcon40b_8bit_8gpu.sh", 8, "tiiuae/falcon-40b", "8bit"),
])
def test_the_original_commands_parse(script, processes, model, mode):
    launcher, arguments = torchrun_arguments(script)
    assert launcher == ["--nnodes", "1", "--nproc_per_node", str(processes)]
    options = parse_options(arguments)
    assert (options.model_name, options.quantize_mode) == (model, mode)
    assert options.rows_per_step(processes) == 16 * processes


def test_abbreviated_flags_fail():
    with pytest.raises(UserError, match="--model_name"):
        parse_options(["--model", "tiiuae/falcon-7b"])


# Shell scripts


@pytest.mark.parametrize("path", SHELL_SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shell_script_is_sound(path):
    shellcheck = shutil.which("shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert shellcheck, "shellcheck comes with tests/requirements.txt"
    process = subprocess.run([shellcheck, str(path)], capture_output=True, text=True)
    assert process.returncode == 0, process.stdout
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env bash\n# "), "a header says what the script is for"
    assert "\nset -euo pipefail\ncd \"$(dirname \"$0\")/" in text
    assert os.access(path, os.X_OK)


@pytest.fixture
def empty_project(tmp_path):
    """A copy of scripts/setup.sh beside lists that install nothing, so that it runs without a network."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "scripts/setup.sh", tmp_path / "scripts/setup.sh")
    (tmp_path / "requirements.txt").write_text("# nothing\n")
    (tmp_path / "tests/requirements.txt").write_text("-r ../requirements.txt\n")
    return tmp_path


def set_up(project: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    environment = {"PYTHON": sys.executable, "PIP_NO_INDEX": "1"} | environment
    inherited = {name: value for name, value in os.environ.items() if name not in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL")}
    return subprocess.run(["bash", str(project / "scripts/setup.sh"), *arguments], cwd="/", env=inherited | environment,
                          capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_setup_installs_once_and_again_after_an_interruption(empty_project):
    first = set_up(empty_project, "tests/requirements.txt")
    assert first.returncode == 0, first.stderr
    assert "Making .venv" in first.stderr and "Installing tests/requirements.txt" in first.stderr
    assert first.stdout == ""
    for arguments in (("tests/requirements.txt",), ()):  # the test list covers the product's
        again = set_up(empty_project, *arguments)
        assert (again.returncode, again.stdout, again.stderr) == (0, "", "")

    # A pin that cannot be installed: an error with its cure, and no later run takes the environment for complete.
    (empty_project / "requirements.txt").write_text("falcon-finetune-no-such-package==1.0  # not there\n")
    for _ in range(2):
        broken = set_up(empty_project)
        assert broken.returncode == USER_ERROR_EXIT_CODE
        assert "error: pip could not install requirements.txt\n  -> " in broken.stderr
    (empty_project / "requirements.txt").write_text("# nothing\n")
    assert "Installing" in set_up(empty_project).stderr

    # A .venv whose making was cut short is made anew; the repository around it is left alone.
    (empty_project / ".venv/.unfinished").touch()
    shutil.rmtree(empty_project / ".venv/lib")
    rebuilt = set_up(empty_project)
    assert rebuilt.returncode == 0, rebuilt.stderr
    assert "Making .venv" in rebuilt.stderr
    assert set_up(empty_project).stderr == ""


def test_setup_names_an_unsuitable_python(empty_project):
    process = set_up(empty_project, PYTHON="/no/such/python")
    assert process.returncode == USER_ERROR_EXIT_CODE
    assert process.stderr == ("error: PYTHON=/no/such/python is not a Python from 3.11 to 3.14\n"
                              "  -> unset PYTHON to use the first suitable one on PATH\n")
    assert not (empty_project / ".venv").exists()


def test_setup_says_when_there_is_no_python(empty_project):
    tools = empty_project / "bin"
    tools.mkdir()
    for tool in ("bash", "dirname", "sed", "flock"):
        if found := shutil.which(tool):
            (tools / tool).symlink_to(found)
    process = set_up(empty_project, PYTHON="", PATH=str(tools))
    assert process.returncode == USER_ERROR_EXIT_CODE
    assert "error: no Python from 3.11 to 3.14 on PATH\n  -> install one" in process.stderr
    assert not (empty_project / ".venv").exists()


def test_setup_names_a_missing_list(empty_project):
    process = set_up(empty_project, "no-such-list.txt")
    assert process.returncode == USER_ERROR_EXIT_CODE
    assert "there is no no-such-list.txt" in process.stderr
