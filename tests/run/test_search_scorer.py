"""A search's scores are the ones that an evaluation of the same path gives, whatever is asked and on how many ranks."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from glora_llm import recipe as recipes
from glora_llm.adapters.inject import adapted_layers, inject
from glora_llm.evaluation.scoring import passes_of, score_model
from glora_llm.glora.layer import GLoRALinear
from glora_llm.glora.path import Genome, slots_with
from glora_llm.glora.path_sampler import Supernet
from glora_llm.glora.supernet import set_paths
from glora_llm.models.load import load_base
from glora_llm.models.resolve import ResolvedModel
from glora_llm.plan.plan import Plan, make_plan
from glora_llm.run.search_scorer import RowScorer
from tests.data.conftest import write_rows

METRICS = {"loss": ("validation/loss", -1), "exact_match": ("validation/exact_match", 1)}
METRICS["label_accuracy"] = ("validation/label_accuracy", 1)
ALL = np.arange(24)
Request = tuple[Genome, NDArray[np.int64]]


class Trained(NamedTuple):
    """A supernet that has learnt a little, and genomes of it."""

    plan: Plan
    model: Any
    layers: dict[str, GLoRALinear]
    genomes: list[Genome]


@pytest.fixture(scope="module")
def trained(tiny: ResolvedModel, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Two labels that the text names; after forty steps some answers are right, on some paths."""
    animals = {"cat": "a", "wolf": "bc", "ox": "d"}
    rows = [{"text": f"{list(animals)[n % 3]} {n}", "label": list(animals.values())[n % 3]} for n in range(80)]
    source = write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows)
    more = [f"data.source={source}", "data.test=16", "data.validation=24", "evaluation.batch=5", "adapter.slots=null"]
    plan = make_plan(recipes.load("tiny_cpu", [*more, "adapter.paths=sample", "adapter.supernet={ranks: [4, 2]}"]))
    base = load_base(plan.recipe.model, plan.base.folder, torch.device("cpu"))
    model = inject(base, plan.recipe.adapter, seed=0, steps=1).get_base_model()
    layers = adapted_layers(model)
    net, objective = Supernet(layers, seed=0), plan.task.objective(model)
    adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for step in range(30):
        net.draw(step, 0)
        for batch in plan.process_batches(step, 0, 1):
            (objective(**batch) / len(batch["targets"])).backward()
        adam.step()
        adam.zero_grad()
    genomes = []
    for number in (1000, 1001, 1003):
        net.draw(number, 0)
        genomes.append({name: layer.path["default"] for name, layer in layers.items()})
    return Trained(plan, model.eval(), layers, genomes)


def scorer(trained: Trained, metric: str = "loss", numbers: Sequence[int] | None = None, **place: Any) -> RowScorer:
    plan, model, layers, _ = trained
    validation = plan.rows("validation")
    assert validation is not None
    chosen = plan.choice(validation, None) if numbers is None else numbers
    return RowScorer(plan, layers, chosen, metric, passes_of(plan, model), lambda table: table, **place)


@pytest.mark.parametrize("metric", list(METRICS))
def test_the_mean_is_the_score_of_an_evaluation(metric: str, trained: Trained) -> None:
    values = scorer(trained, metric)([(genome, ALL) for genome in trained.genomes])
    name, sign = METRICS[metric]
    found = []
    for genome, own in zip(trained.genomes, values, strict=True):
        set_paths(trained.layers, genome)
        found.append(score_model(trained.plan, trained.model, "validation")[name])
        assert own.shape == (24,) and own.dtype == np.float64
        assert float(own.mean()) == pytest.approx(sign * found[-1], abs=1e-6)
    assert len(set(found)) > 1 and max(found) > 0


def test_exact_match_and_label_accuracy_differ(trained: Trained) -> None:
    """Each row is right or wrong, both are seen, and what matches is the best label too."""
    (exact,) = scorer(trained, "exact_match")([(trained.genomes[0], ALL)])
    (label,) = scorer(trained, "label_accuracy")([(trained.genomes[0], ALL)])
    assert set(exact) == set(label) == {0.0, 1.0} and (exact <= label).all()


@pytest.mark.parametrize("metric", list(METRICS))
def test_a_row_s_score_does_not_depend_on_what_else_is_asked(metric: str, trained: Trained) -> None:
    whole, rng = scorer(trained, metric), np.random.default_rng(0)
    requests: list[Request] = [(genome, rng.permutation(24)[:n]) for n in (1, 4, 23) for genome in trained.genomes]
    expected = {id(genome): whole([(genome, ALL)])[0] for genome in trained.genomes}
    assert np.ptp(expected[id(trained.genomes[0])]) > 0.1
    for (genome, rows), values in zip(requests, whole(requests), strict=True):
        np.testing.assert_allclose(values, expected[id(genome)][rows], rtol=0, atol=1e-6)


def test_rows_are_counted_as_they_were_chosen(trained: Trained) -> None:
    """Row 0 of a search is the first of the chosen validation rows, whatever its number in the file."""
    plain = scorer(trained, "label_accuracy", numbers=range(24))
    chosen = trained.plan.choice(plain.rows, 10)
    assert chosen != sorted(chosen) and len(set(chosen)) == 10
    (expected,) = plain([(trained.genomes[1], ALL)])
    (values,) = scorer(trained, "label_accuracy", numbers=chosen)([(trained.genomes[1], np.arange(10))])
    assert values.tolist() == expected[chosen].tolist() != expected[:10].tolist()


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("sharded", [False, True])
def test_ranks_share_the_work_and_change_no_score(sharded: bool, world: int, trained: Trained) -> None:
    """Each rank scores its genomes, or with sharded parameters its rows of every genome; the tables are summed."""
    requests: list[Request] = [(genome, ALL[: 24 - 7 * n]) for n, genome in enumerate(trained.genomes)]
    expected = scorer(trained)(requests)
    calls: list[int] = []

    def counted(rank: int) -> list[NDArray[np.float64]]:
        one = scorer(trained, process_rank=rank, world_size=world, sharded=sharded)
        assert one.at_once == (1 if sharded else world)
        score, before = one.passes.score, len(calls)

        def score_batch(batch: Any) -> Any:
            calls.append(rank)
            return score(batch)

        one.passes = one.passes._replace(score=score_batch)
        values = one(requests)
        assert len(calls) > before, "every rank has work"
        return values

    by_rank = [counted(rank) for rank in range(world)]
    for index, values in enumerate(expected):
        parts = np.array([own[index] for own in by_rank])
        assert (np.count_nonzero(parts, axis=0) == 1).all(), "no row is scored by two ranks"
        np.testing.assert_allclose(parts.sum(0), values, rtol=0, atol=1e-6)
    shares = [calls.count(rank) for rank in range(world)]
    assert not sharded or len(set(shares)) == 1, "a rank that computes less often would leave the others waiting"


def test_slopes_tell_how_the_score_moves(trained: Trained) -> None:
    """A slot that is a little larger moves the score by that share of its slope: sign, unit and order are right."""
    one, rows, genome = scorer(trained), ALL[:7], trained.genomes[0]
    (slopes,) = one.slopes([(genome, rows)])
    left = iter(slopes.tolist())
    compared = 0
    for name, layer in trained.layers.items():
        for slot in slots_with(layer.b0 is not None):
            own = {spec: next(left) for spec in layer.choices["default"][slot]}
            spec = genome[name][slot]
            if spec.mode == "none" or abs(own[spec]) < 1e-3:
                continue
            parameter = getattr(getattr(layer, f"slot_{slot}")["default"], "up" if spec.mode == "lora" else spec.mode)
            scores = []
            for factor in (1.03, 0.97):
                kept = parameter.data.clone()
                parameter.data.mul_(factor)
                scores.append(one([(genome, rows)])[0].mean())
                parameter.data.copy_(kept)
            assert (scores[0] - scores[1]) / 0.06 == pytest.approx(own[spec], rel=0.05), (name, slot, spec)
            compared += 1
    assert compared > 10 and not list(left)


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_ranks_share_slopes(count: int, world: int, trained: Trained) -> None:
    """Each request is computed as one rank computes it, and counted once; all ranks compute equally often."""
    requests: list[Request] = [(genome, ALL[:5]) for genome in trained.genomes[:count]]
    expected = scorer(trained).slopes(requests)
    calls: list[int] = []

    def on_rank(rank: int) -> list[NDArray[np.float64]]:
        one = scorer(trained, process_rank=rank, world_size=world)
        loss = one.passes.loss

        def counted(batch: Any) -> torch.Tensor:
            calls.append(rank)
            return loss(batch)

        one.passes = one.passes._replace(loss=counted)
        return one.slopes(requests)

    by_rank = [on_rank(rank) for rank in range(world)]
    for index, values in enumerate(expected):
        assert np.array_equal(sum(own[index] for own in by_rank), values)
    assert len({calls.count(rank) for rank in range(world)}) == 1, (
        "one that computes less would leave the others waiting"
    )


def test_a_search_reads_validation_rows_alone(trained: Trained) -> None:
    test = trained.plan.rows("test")
    assert test is not None and len(test) == 16
    with test.sealed("a search was choosing a genome"):
        values = scorer(trained)([(trained.genomes[0], ALL)])
        with pytest.raises(RuntimeError, match="the test rows were read while a search was choosing"):
            score_model(trained.plan, trained.model, "test")
    assert np.isfinite(values[0]).all() and score_model(trained.plan, trained.model, "test")["test/loss"] > 0


def test_one_process_agrees_with_itself(trained: Trained) -> None:
    assert scorer(trained).agree("anything")
