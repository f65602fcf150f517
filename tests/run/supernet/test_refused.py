"""Whatever a user may get wrong with a supernet or a search is one message and exit code 2, and nothing is lost."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from glora_llm.cli import main
from tests.run.supernet.conftest import SEARCH, Copy, overrides, train
from tests.run.test_train import contents, write_rows

LAYER = "model.layers.0.self_attn.k_proj"
Said = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Said:
    """Return what runs a command, checks that it ends with code 2 and one message, and returns the message."""

    def run(*command: object) -> str:
        capsys.readouterr()
        code = main([str(part) for part in command])
        printed = capsys.readouterr()
        assert code == 2, printed
        assert printed.err.count("error: ") == 1 and "Traceback" not in printed.err
        return printed.err

    return run


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["data.validation=null"], "scores candidates on validation rows, never on test rows: set data.validation"),
        (["adapter.paths=null", "adapter.supernet=null"],
         "this recipe trains fixed paths: set adapter.paths=sample and train, or take `search` away (search=null)"),
        (["adapter.paths={q_proj: {B: none}}", "adapter.supernet=null"], "this recipe trains fixed paths"),
        (["search.budget=nonsense"], "search.budget 'nonsense' is no limit; expected something like 0.5M, 250k"),
        (["search.budget='3k,x'"], "search.budget 'x' is no limit"),
        (["search.budget=10", "adapter.supernet.modes={B: [lora, vector]}"],
         "search.budget 10 is below the smallest genome, which has 192"),
        (["search.budget=10k,0.1k", "adapter.supernet.modes={E: [vector]}"],
         "search.budget 0.1k is below the smallest genome, which has 192"),
        (["search.strategy=evolutoin"], "Did you mean 'evolution'?"),
        (["search.bugdet=3k"], "unknown key 'search.bugdet'. Did you mean 'budget'?"),
        (["adapter.slots={B: lora}"], "paths: sample says all about the slots"),
        (["adapter.paths=null", "adapter.supernet=null", "adapter.genome=g.json", "adapter.slots={B: lora}"],
         "genome says all about the slots: adapter.slots=null takes slots away"),
        (["adapter.paths=null", "adapter.supernet=null", "search=null", "adapter.genome=absent.json"],
         "adapter.genome: there is no absent.json"),
        (["adapter.supernet.modes={B: [lorra]}"], "'scalar' or 'none'. Did you mean 'lora'?"),
        (["adapter.supernet.modes={D: [lora]}"], "Slot D has no mode 'lora'; it has: vector, scalar, none."),
        (["search=null", "merge.after_training=true"], "merge.after_training merges the genome that a search chose"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "",
)  # fmt: skip
def test_a_mistake_in_the_recipe_is_found_by_a_dry_run(
    more: list[str], said: str, refused: Said, tmp_path: Path
) -> None:
    settings = overrides(write_rows(tmp_path / "data.jsonl", 60), tmp_path / "run")
    assert said in refused("train", "--recipe", "tiny_cpu_search", "--dry-run", *settings, *more)
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_a_supernet_s_modes_need_a_supernet(refused: Said) -> None:
    said = refused("recipes", "tiny_cpu_search", "adapter.paths=null", "search=null")
    assert "supernet is what `paths: sample` draws from: set adapter.paths=sample" in said


def test_the_advice_to_take_a_search_away_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`search=null` and fixed paths are a plain run; the dry run prints what it would train."""
    settings = overrides(write_rows(tmp_path / "data.jsonl", 60), tmp_path / "run")
    fixed = ["adapter.paths=null", "adapter.supernet=null", "search=null"]
    assert main(["train", "--recipe", "tiny_cpu_search", "--dry-run", *settings, *fixed]) == 0
    assert "trained" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["training.lr=1"], "'training.lr=1': only search.* keys may be changed here; the supernet is trained already"),
        (["search=null"], "'search=null': only search.* keys may be changed here"),
        (["search.passes=0"], "search.passes: got 0 (integer), expected greater than 0"),
        (["search.passess=3"], "unknown key 'search.passess'. Did you mean 'passes'?"),
        (["--budget", "nonsense"], "search.budget 'nonsense' is no limit"),
        (["search.budget=-3k"], "search.budget '-3k' is no limit"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "",
)
def test_a_mistake_in_the_search_command(more: list[str], said: str, refused: Said, searched: Path) -> None:
    before = contents(searched)
    assert said in refused("search", searched, *more)
    assert contents(searched) == before


def test_a_run_that_is_no_supernet(refused: Said, supernet: Path, tmp_path: Path) -> None:
    run = tmp_path / "plain"
    fixed = ["adapter.paths=null", "adapter.supernet=null", "adapter.slots={B: lora}", "search=null"]
    assert train(supernet.with_name("data.jsonl"), run, *fixed) == 0
    before = contents(run)
    assert "A search needs a supernet, and this recipe trains fixed paths" in refused("search", run)
    for command in (["merge", run, "--out", tmp_path / "out"], ["evaluate", run]):
        said = refused(*command, "--genome", supernet / "genome.json")
        assert f"--genome is for a supernet, and {run} is none" in said
    assert contents(run) == before and not (tmp_path / "out").exists()


def test_a_supernet_without_a_genome(refused: Said, supernet: Path, tmp_path: Path) -> None:
    before = contents(supernet)
    for command in (["merge", supernet, "--out", tmp_path / "out"], ["evaluate", supernet]):
        said = refused(*command)
        assert f"there is no {supernet / 'genome.json'}: `glora-llm search {supernet}` finds one" in said
        assert "there is no absent.json" in refused(*command, "--genome", "absent.json")
    assert contents(supernet) == before and not (tmp_path / "out").exists()


def test_a_supernet_whose_training_has_not_ended(refused: Said, searched: Path, copy_of: Copy, tmp_path: Path) -> None:
    """As a kill in the middle leaves it: checkpoints, and no adapter."""
    run = copy_of(searched)
    for file in (*(run / "adapter").iterdir(), run / "summary.json"):
        file.unlink()
    before = contents(run)
    for command in (["search", run], ["merge", run, "--out", tmp_path / "out"], ["evaluate", run]):
        assert "holds no adapter: the run has not ended. Train on" in refused(*command)
    assert contents(run) == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("genome", "said"),
    [
        ({LAYER.replace("k_proj", "k_porj"): {"B": "vector"}}, f"Did you mean '{LAYER}'?"),
        ({LAYER: {"B": "vecto"}}, "Slot B has no mode 'vecto'; it has: lora, vector, scalar, none. Did you mean"),
        ({LAYER: {"F": "vector"}}, "Unknown GLoRA slot 'F'"),
        ({LAYER: {"D": "vector"}}, f"slot D of {LAYER} is to be vector, and the supernet has no such mode there"),
        ({LAYER: {"B": "lora"}}, 'mode lora is {"mode": "lora", "rank": 8, "scale": 2.0}'),
        ({LAYER: {"B": {"mode": "lora", "rank": 8, "scale": 1.0}}}, "has rank 8; the supernet has up to 4"),
        ({LAYER: {"B": None}}, f"slot B of {LAYER} has no mode: None"),
        ({LAYER: {"B": "none"}}, "every slot of every layer is none, and that is the base model as it was"),
        ([], "expected an object such as"),
    ],
    ids=str,
)  # fmt: skip
def test_a_mistake_in_a_genome(
    genome: object, said: str, refused: Said, searched: Path, copy_of: Copy, tmp_path: Path
) -> None:
    run = copy_of(searched)
    (run / "genome.json").write_text(json.dumps(genome))
    before = contents(run)
    for command in (["merge", run, "--out", tmp_path / "out"], ["evaluate", run]):
        assert said in refused(*command)
    assert contents(run) == before and not (tmp_path / "out").exists()


def test_a_genome_that_is_cut_off(refused: Said, searched: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.json").write_text((searched / "genome.json").read_text()[:-5])
    said = refused("merge", searched, "--out", tmp_path / "out", "--genome", tmp_path / "cut.json")
    assert "genome is not valid JSON" in said and not (tmp_path / "out").exists()


def other_supernet(run: Path) -> None:
    file = run / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    next(iter(weights.values())).view(-1)[0] += 1e-3
    save_file(weights, file)
    file.with_name("manifest.json").unlink()  # it tells of the weights that were there


@pytest.mark.parametrize(
    ("change", "more", "said"),
    [
        (other_supernet, [], "was scored with different supernet. Delete "),
        (lambda run: None, ["search.max_rows=4"], "was scored with different rows. Delete "),
        (lambda run: None, ["search.metric=exact_match"], "was scored with different metric. Delete "),
    ],
    ids=["supernet", "rows", "metric"],
)
def test_a_journal_of_something_else(
    change: Callable[[Path], None], more: list[str], said: str, refused: Said, searched: Path, copy_of: Copy
) -> None:
    run = copy_of(searched)
    change(run)
    before = contents(run)
    message = refused("search", run, *SEARCH, *more)
    assert said in message and f"{run / 'search'} to search anew" in message
    assert contents(run) == before


def test_a_recipe_goes_on_with_the_journal_s_supernet_alone(refused: Said, searched: Path, copy_of: Copy) -> None:
    """A run folder belongs to one supernet: other draws are another run."""
    run = copy_of(searched)
    before = contents(run)
    more = ["search=null", "adapter.supernet.ranks=[4]"]
    settings = overrides(searched.with_name("data.jsonl"), run)
    assert "holds a run of another recipe (adapter.supernet: " in refused(
        "train", "--recipe", "tiny_cpu_search", *settings, *more
    )
    assert contents(run) == before
