"""What no file and no answer can do: run code, or reach another machine through TensorBoard. See also code_cases.py."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
UNPICKLING = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
AUTO = ("AutoConfig", "AutoTokenizer", "AutoProcessor", "AutoImageProcessor", "AutoModel", "auto_class")


def dangers(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and name of what reads pickles, runs text as code, or lets transformers ask for a model's code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from ((node.lineno, name) for name in names if name.partition(".")[0] in UNPICKLING)
        if not isinstance(node, ast.Call):
            continue
        called, words = ast.unparse(node.func), {key.arg: ast.unparse(key.value) for key in node.keywords}
        is_auto = called.startswith(AUTO) and called.endswith(".from_pretrained")
        if (
            called in ("eval", "exec", "os.system", "torch.load", "yaml.load", "yaml.unsafe_load")
            or words.get("allow_pickle", "False") != "False"
            or words.get("shell", "False") != "False"
            or words.get("trust_remote_code", "False") != "False"
            or (is_auto and "trust_remote_code" not in words)
        ):
            yield node.lineno, called


def test_the_search_finds_what_it_should() -> None:
    bad = [
        "import pickle", "from joblib import load", "torch.load(x)", "np.load(x, allow_pickle=True)", "eval(x)",
        "subprocess.run(x, shell=True)", "AutoConfig.from_pretrained(x)", "auto_class(k).from_pretrained(x)",
        "load(x, trust_remote_code=True)", "AutoModelForCausalLM.from_pretrained(x)", "yaml.load(x)",
    ]  # fmt: skip
    assert all(list(dangers(line)) for line in bad)
    assert not list(dangers("np.load(x)\nmodel.eval()\nAutoConfig.from_pretrained(x, trust_remote_code=False)"))


def test_no_pickle_is_read_and_no_code_of_a_model_is_asked_for() -> None:
    files = [*(ROOT / "glora_llm").rglob("*.py"), ROOT / "train.py"]
    assert len(files) > 100
    found = [
        f"{file.relative_to(ROOT)}:{line}: {name}"
        for file in files
        for line, name in dangers(file.read_text(encoding="utf-8"))
    ]
    assert not found


def test_every_documented_tensorboard_listens_on_this_machine_alone() -> None:
    pages = [ROOT / "README.md", ROOT / "Makefile", *(ROOT / "docs").rglob("*.md"), *(ROOT / "recipes").glob("*.yaml")]
    pages += [*(ROOT / "glora_llm").rglob("*.py"), *(ROOT / "scripts").glob("*")]
    texts = {page: page.read_text(encoding="utf-8") for page in pages if page.is_file()}
    commands = [
        (page, line)
        for page, text in texts.items()
        for line in text.splitlines()
        if "tensorboard" in line and "--logdir" in line
    ]
    assert len(commands) >= 3
    assert all("--host localhost" in line.replace('", "', " ") for _, line in commands), commands
    assert not [page for page, text in texts.items() if "--bind_all" in text or "0.0.0.0" in text]
