"""The section vlora, and the optimizers of whole models."""

from tests.bad_input.case import Case, bad

SHAPE = "{model_type: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 4, num_attention_heads: 4}"
NEW = (
    "model.name_or_path=null",
    f"model.config={SHAPE}",
    "model.tokenizer=train:300",
    "adapter={method: full}",
)

SHARING: dict[str, Case] = {
    "gains of a linear that is absent": bad(
        "gains names 'q_prj', which is not shared; shared: self_attn.q_proj,", *NEW, "vlora.gains={q_prj: [row]}"
    ),
    "a gain that is none": bad(
        "vlora.gains", *NEW, "vlora.gains=[rows]"
    ),
    "a compound size of one linear that does not divide the layers": bad(
        "layers_per_compound is 3 for 'self_attn.q_proj', which does not divide 4 layers. Sizes that fit: 1, 2, 4",
        *NEW, "vlora.targets=[q_proj]", "vlora.layers_per_compound={q_proj: 3}",
    ),
    "compound sizes for some linears alone": bad(
        "layers_per_compound has 0 entries for the linear 'self_attn.k_proj': q_proj.",
        *NEW, "vlora.layers_per_compound={q_proj: 2}",
    ),
    "increments of all layers and a base of the first": bad(
        "base_gradient is 'first', and with increments 'all' no layer is the base",
        *NEW, "vlora.increments=all", "vlora.base_gradient=first",
    ),
    "a rate of a part that there is not": bad("vlora.lr_factors", *NEW, "vlora.lr_factors={bases: 2}"),
    "an unknown optimizer": bad("training.optimizer: got 'moun'", "training.optimizer=moun"),
    "muon with an adapter": bad(
        "training.optimizer muon steps the matrices of a model that is trained as a", "training.optimizer=muon"
    ),
    "muon with offload": bad(
        "training.optimizer muon orthogonalises whole matrices, and training.deepspeed",
        "adapter={method: full}", "training.optimizer=muon", "training.deepspeed=zero2_offload",
    ),
}  # fmt: skip
