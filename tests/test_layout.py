"""Which room may import which: arrows point down, and ``--user-dir`` loads no tool."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fairseq_sparsemixer

PACKAGE = Path(fairseq_sparsemixer.__file__).parent
# From the bottom up; a room imports only rooms of lower floors. "" is the package itself.
FLOORS = [
    ["errors", "version"],
    ["determinism", "disk", "host_memory", "requirements", "tables"],
    ["locks"],
    ["files"],
    ["plotting"],
    ["moe"],
    ["models", "text"],
    ["bits_per_byte", "criterions", "expert_parallelism", "optim", "restarts", "workers"],
    ["watchdogs"],
    ["runs"],
    ["compat"],
    ["corpora"],
    ["evaluation"],
    ["tasks"],
    [""],
    ["comparison", "conversion", "export", "training"],
    ["study", "installation"],
    ["report", "laboratory"],
    ["serving"],
    ["commands"],
    ["cli"],
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
TOOLS = {
    *("corpora", "evaluation", "comparison", "conversion", "export"),
    *("training", "study", "installation", "report", "laboratory", "serving"),
}


def module_name(path):
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(
        ".__init__"
    )


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room_of(module):
    return module.split(".")[1] if "." in module else ""


def imports_of(module):
    """(what is imported, line, whether inside a function) of each import of our own modules."""

    def walk(node, inside):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                names = [alias.name for alias in child.names]
            elif isinstance(child, ast.ImportFrom):
                assert not child.level, f"{module}:{child.lineno} imports relatively"
                names = [f"{child.module}.{alias.name}" for alias in child.names]
            else:
                names = []
            for name in names:
                target = name if name in MODULES else name.rpartition(".")[0]
                if target in MODULES and target != module:
                    yield target, child.lineno, inside
            yield from walk(child, inside or isinstance(child, ast.FunctionDef))

    return walk(ast.parse(MODULES[module].read_text(encoding="utf-8")), False)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    own = room_of(module)
    assert own in FLOOR, f"{own} is a new room: give it a floor here"
    for target, line, _ in imports_of(module):
        room = room_of(target)
        assert room == own or FLOOR[room] < FLOOR[own], (
            f"{MODULES[module]}:{line}: {own or 'the package'} imports {target}, which is not below"
        )


def test_no_two_folders_import_each_other():
    """Nor subfolders of a room; a folder and those inside of it are one."""
    seen = {}
    for module, path in MODULES.items():
        for target, line, _ in imports_of(module):
            folders = path.parent, MODULES[target].parent
            if not (folders[0].is_relative_to(folders[1]) or folders[1].is_relative_to(folders[0])):
                seen.setdefault(folders, f"{path}:{line} imports {target}")
    both = [(where, seen[pair[::-1]]) for pair, where in seen.items() if pair[::-1] in seen]
    assert not both


def test_no_circle_of_files():
    done = set()

    def visit(module, path):
        if module in path:
            circle = [*path[path.index(module) :], module]
            pytest.fail("imports in a circle: " + " -> ".join(circle))
        if module not in done:
            for target, _, _ in imports_of(module):
                # The package's own file imports the parts that register, behind everything else.
                if target != "fairseq_sparsemixer":
                    visit(target, [*path, module])
            done.add(module)

    for module in MODULES:
        visit(module, [])


def test_plain_parts_know_no_fairseq():
    for module, path in MODULES.items():
        if room_of(module) not in ("moe", "files", "errors", "tables", "commands", "cli"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            roots = {name.split(".")[0] for name in names}
            assert not roots & {"fairseq", "hydra", "omegaconf"}, f"{path}:{node.lineno}"


def loaded_by(code):
    """The modules that are there when ``code`` has run in a process of its own."""
    program = f"{code}\nimport sys\nprint(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    return set(result.stdout.splitlines()[-1].split())


def test_user_dir_needs_no_tool():
    waiting = [
        f"fairseq_sparsemixer.{room}"
        for room in ("compat", "models", "criterions", "tasks", "optim")
    ]
    waiting += [name for name in MODULES if name.rpartition(".")[0] in waiting]
    seen = set(waiting)
    while waiting:
        module = waiting.pop()
        for target, line, inside in imports_of(module):
            if inside:
                continue
            assert room_of(target) not in TOOLS, f"{MODULES[module]}:{line} imports {target}"
            if target not in seen:
                seen.add(target)
                waiting.append(target)


def test_user_dir_loads_no_tool():
    loaded = loaded_by("import fairseq, fairseq_sparsemixer")
    assert not [name for name in loaded & MODULES.keys() if room_of(name) in TOOLS]


@pytest.mark.parametrize(
    "code",
    [
        "import fairseq, fairseq_sparsemixer",
        "import fairseq_sparsemixer, importlib.util\nimportlib.util.find_spec('fairseq')",
        "from fairseq_sparsemixer import compat",
        "import fairseq_sparsemixer.text.subwords",
        "import fairseq_sparsemixer\nfairseq_sparsemixer.models",
        "import fairseq_sparsemixer, fairseq",
        "import fairseq_sparsemixer.moe, fairseq",
        "from fairseq_sparsemixer.models import SwitchTransformerModel",
        "from fairseq_sparsemixer.models.layers import switch_layers",
        "import fairseq_sparsemixer.tasks.translation_with_routing",
        "import fairseq_sparsemixer.criterions",
        "from fairseq_sparsemixer.evaluation.translator import Translator",
        "import fairseq_sparsemixer.restarts",
        "import fairseq_sparsemixer.expert_parallelism",
        "import fairseq_sparsemixer.workers",
        "from fairseq_sparsemixer import watchdogs, compat\nassert watchdogs is compat.watchdogs",
    ],
)
def test_all_is_registered_in_whichever_order_it_is_imported(code):
    loaded_by(
        f"{code}\n"
        "from fairseq.criterions import CRITERION_REGISTRY\n"
        "from fairseq.models import ARCH_MODEL_REGISTRY\n"
        "from fairseq.tasks import TASK_REGISTRY\n"
        "assert 'label_smoothed_cross_entropy_with_routing' in CRITERION_REGISTRY\n"
        "assert 'translation_with_routing' in TASK_REGISTRY\n"
        "assert 'switch_transformer_wmt_en_de' in ARCH_MODEL_REGISTRY\n"
        "from fairseq.data import data_utils\n"
        "assert hasattr(data_utils.batch_by_size, '__wrapped__')"
    )


@pytest.mark.slow
def test_each_module_can_be_the_first_that_is_imported():
    """In forks of a process that has imported nothing of ours."""
    program = (
        "import importlib, os, sys, torch\n"
        "for name in sys.argv[1:]:\n"
        "    if not os.fork():\n"
        "        importlib.import_module(name)\n"
        "        os._exit(0)\n"
        "    if os.wait()[1]:\n"
        "        print('cannot be imported:', name)\n"
        "        os._exit(1)"
    )
    command = [sys.executable, "-c", program, *MODULES]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]


def test_the_layer_alone_loads_no_fairseq():
    loaded = loaded_by("import fairseq_sparsemixer.moe")
    assert "torch" in loaded
    assert "fairseq" not in loaded


def test_help_loads_neither_torch_nor_fairseq():
    loaded = loaded_by("from fairseq_sparsemixer import cli\ncli.build_parser().format_help()")
    slow = loaded & {"torch", "fairseq", "numpy", "hydra", "omegaconf"}
    assert not slow
