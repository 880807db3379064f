"""Files are data: nothing of this repository runs what one says, and no shell reads what a user gave."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PLACES = ("megatron_iiet", "tools", "benchmarks", "examples")
UNPICKLERS = {
    "pickle",
    "_pickle",
    "cPickle",
    "cloudpickle",
    "dill",
    "joblib",
    "marshal",
    "shelve",
    "jsonpickle",
}
RUNS_TEXT = {"eval", "exec", "compile", "__import__"}
SHELLS = {
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "pty.spawn"),
    *("asyncio.create_subprocess_shell", "create_subprocess_shell"),
}
SHELL_NAMES = ("sh", "bash", "dash", "zsh", "/bin/sh", "/bin/bash")
YAML_LOADERS = {"load", "load_all", "full_load", "unsafe_load", "full_load_all", "unsafe_load_all"}


def dangers(source: str) -> Iterator[tuple[int, str]]:
    """Line, and what is wrong there."""
    tree = ast.parse(source)
    safe_loaders = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and any(ast.unparse(b).endswith("SafeLoader") for b in node.bases)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = (
                [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            )
            yield from ((node.lineno, f"imports {n}") for n in names if n.split(".")[0] in UNPICKLERS)
        elif isinstance(node, ast.Call):
            yield from ((node.lineno, what) for what in _of_call(node, safe_loaders))
        elif isinstance(node, ast.List | ast.Tuple) and len(node.elts) > 2:
            first, second, third = node.elts[:3]
            shell = isinstance(first, ast.Constant) and first.value in SHELL_NAMES
            if shell and ast.unparse(second) == "'-c'" and not isinstance(third, ast.Constant):
                yield node.lineno, "a shell reads a text that was put together"


def _of_call(call: ast.Call, safe_loaders: set[str]) -> Iterator[str]:
    called = ast.unparse(call.func)
    words = {word.arg: word.value for word in call.keywords}
    owner, _, name = called.rpartition(".")

    def says(word: str, value: object) -> bool:
        given = words.get(word)
        return isinstance(given, ast.Constant) and given.value is value

    if called in RUNS_TEXT:
        yield f"calls {called}"
    if called in SHELLS or ("shell" in words and not says("shell", False)):
        yield f"{called} starts a shell"
    if called == "torch.load" and not says("weights_only", True):
        yield "torch.load without weights_only=True"
    if "allow_pickle" in words and not says("allow_pickle", False):
        yield f"{called} unpickles"
    if owner == "yaml" and name in YAML_LOADERS:
        loader = words.get("Loader", call.args[1] if len(call.args) > 1 else None)
        known = loader is not None and ast.unparse(loader) in {
            "yaml.SafeLoader",
            "yaml.CSafeLoader",
            *safe_loaders,
        }
        if not known:
            yield f"{called} without a safe loader"
    if name == "from_pretrained" and "Model" in owner and not says("use_safetensors", True):
        yield f"{called} without use_safetensors=True"
    if says("trust_remote_code", True):
        yield f"{called} runs code that it loads"


@pytest.mark.slow
def test_files_are_data() -> None:
    files = sorted(ROOT.glob("*.py")) + [file for place in PLACES for file in (ROOT / place).rglob("*.py")]
    found = [
        f"{file.relative_to(ROOT)}, line {line}: {what}"
        for file in files
        for line, what in dangers(file.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=given)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "eval(text)",
        "exec(text)",
        "os.system(f'ls {folder}')",
        "subprocess.run(command, shell=True)",
        "subprocess.run(command, shell=given)",
        "subprocess.run(['bash', '-c', f'ls {folder}'])",
        "AutoModel.from_pretrained(folder)",
        "AutoTokenizer.from_pretrained(folder, trust_remote_code=True)",
    ],
)
def test_finds_each_danger(source: str) -> None:
    assert [line for line, _ in dangers(source)] == [1]


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path, map_location='cpu', weights_only=True)",
        "np.load(path)",
        "class Strict(yaml.SafeLoader): ...\nyaml.load(text, Loader=Strict)",
        "yaml.load(text, yaml.SafeLoader)",
        "model.eval()",
        "re.compile(pattern)",
        "subprocess.run(['bash', script])",
        "subprocess.run(['bash', '-c', 'exec \"$@\"', 'bash', *command])",
    ],
)
def test_leaves_the_rest(source: str) -> None:
    assert not list(dangers(source))
