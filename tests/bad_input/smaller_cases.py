"""A smaller model of a dense one (model.from_dense, `vlora from-dense`), and distillation."""

import json
from pathlib import Path

from tests.bad_input.case import Case, Change, bad, copy_model
from tests.bad_input.model_cases import HERE, config
from tests.bad_input.vlora_cases import NEW

FULL = "adapter={method: full}"
HALF = "model.from_dense={budget: 0.5}"
DISTILL = "training.distill={teacher: %s}"
COMMAND = ("vlora", "from-dense", "embedded:tiny-llama", "--out", "half")
BUDGET = ("--budget", "0.5", "--steps", "5")
EXPERTS = {  # a first layer without experts, as Qwen and DeepSeek have it
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "mlp_only_layers": [0], "head_dim": 8,
    "moe_intermediate_size": 16, "num_experts": 2, "num_experts_per_tok": 1,
}  # fmt: skip


def teacher(folder: Path) -> None:
    """Copy the model, and give the copy one token more."""
    file = copy_model(folder) / "tokenizer.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    more = {"id": 10**6, "content": "<more>", "special": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    values["added_tokens"].append({**more, **flags})
    file.write_text(json.dumps(values), encoding="utf-8")


def some_text(folder: Path) -> None:
    """Write 20 rows of text."""
    rows = (json.dumps({"text": f"The {number} brown foxes jump over lazy dogs."}) for number in range(20))
    (folder / "text.jsonl").write_text("\n".join(rows), encoding="utf-8")


def unlike() -> Change:
    """Return what makes a model whose feed-forward sizes differ from layer to layer."""
    per_layer = {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0}
    kinds = {"layer_types": ["full_attention"] * 2, "activation_sparsity_pattern": [0.0, 0.0], "head_dim": 8}
    return config(model_type="gemma3n_text", architectures=["Gemma3nForCausalLM"], intermediate_size=[48, 64],
                  **per_layer, **kinds)  # fmt: skip


SMALLER: dict[str, Case] = {
    "a budget that no sharing meets": bad(
        "No sharing of these layers has as few as", FULL, "model.from_dense={budget: 0.01}"
    ),
    "a budget that no sharing meets: the nearest is named": bad(
        "% of the linears), --budget 0.", FULL, "model.from_dense={budget: 0.01}"
    ),
    "a budget above 1": bad("model.from_dense.budget", FULL, "model.from_dense={budget: 1.5}"),
    "a budget that is no number": bad(
        "--budget is 'half'", "--budget", "half", "--steps", "5", "--data", "rows.jsonl", command=COMMAND
    ),
    "layers that differ in shape": bad(
        "'mlp.gate_proj' is (64, 64) float32 on meta without bias in layer 1 and (48, 64)",
        HERE, FULL, HALF, change=unlike(),
    ),
    "layers that differ in their linears": bad(
        "Layer 1 has no linear 'mlp.gate_proj', which other layers have", HERE, FULL, HALF, change=config(**EXPERTS)
    ),
    "a target that is in no layer": bad(
        "No layer has a linear 'q_prj'", FULL, "model.from_dense={budget: 0.5, targets: [q_prj]}"
    ),
    "model.from_dense with an adapter": bad(
        "model.from_dense makes a model whose weights are trained on, and adapter.method is", HALF
    ),
    "model.from_dense of a new model": bad("from_dense is for a trained model (name_or_path)", *NEW, HALF),
    "model.from_dense and the section vlora": bad("The section vlora is for a new model", FULL, HALF, "vlora.rank=4"),
    "--layers-per-compound with --budget": bad(
        "--layers-per-compound is for --rank: with --budget the layers that share follow",
        *BUDGET, "--data", "rows.jsonl", "--layers-per-compound", "2", command=COMMAND,
    ),
    "a budget without steps": bad(
        "--budget trains the smaller model on: give --steps N", "--budget", "0.5", "--data", "x.jsonl", command=COMMAND
    ),
    "a budget for steps that are no whole number": bad(
        "--steps is '1e3'; expected a whole number above 0",
        "--budget", "0.5", "--data", "x.jsonl", "--steps", "1e3", command=COMMAND,
    ),
    "a budget for a model of one layer": bad(
        "Sharing makes none of these linears smaller (layers: 1)", HERE, FULL, HALF, change=config(num_hidden_layers=1)
    ),
    "a budget whose section is taken away": bad(
        "model.from_dense=null would train the dense model as it is",
        *BUDGET, "--data", "rows.jsonl", "model.from_dense=null", command=COMMAND,
    ),
    "a budget for linears without a name": bad(
        "No layer has a linear ''", *BUDGET, "--data", "text.jsonl", "--targets=", change=some_text, command=COMMAND,
    ),
    "a twin whose heads have no width": bad(
        "has heads whose size is a multiple of 100000", "vlora_lm_tiny", "--multiple", "100000",
        command=("vlora", "twin"),
    ),
    "distillation without data": bad(
        "--distill learns from a teacher's answers to text: give --data FILE", *BUDGET, "--distill", command=COMMAND
    ),
    "distillation of a rank that is only written": bad(
        "--data, --steps, --distill and overrides train a model of --budget",
        "--rank", "4", "--distill", command=COMMAND,
    ),
    "distillation: data that are not there": bad(
        "absent.jsonl", *BUDGET, "--distill", "--data", "absent.jsonl", command=COMMAND
    ),
    "a teacher with another tokenizer": bad(
        "training.distill.teacher model has another tokenizer than the model", DISTILL % "model", FULL, change=teacher
    ),
    "a teacher that is not there": bad("absent/model", DISTILL % "absent/model", FULL),
    "a teacher of another depth whose states are compared": bad(
        "training.distill.states compares states layer by layer",
        "training.distill={teacher: model, states: 0.1}", FULL, change=config(num_hidden_layers=1),
    ),
    "a weight of the divergence above 1": bad(
        "training.distill.weight", "training.distill={teacher: embedded:tiny-llama, weight: 2}", FULL
    ),
}  # fmt: skip
