"""What is compared: for text, for images and from a dense model, the recipes, their settings and the forms."""

from dataclasses import dataclass, field

TEXT = (
    "{model_type: llama, hidden_size: 256, intermediate_size: 688, num_hidden_layers: 12, num_attention_heads: 4, "
    "max_position_embeddings: 128, tie_word_embeddings: true}"
)
IMAGES = (
    "{model_type: vit, hidden_size: 192, intermediate_size: 768, num_hidden_layers: 8, num_attention_heads: 3, "
    "patch_size: 4}"
)
WIDE_ATTENTION = "{q_proj: 6, k_proj: 6, v_proj: 6, o_proj: 6, gate_proj: 3, up_proj: 3, down_proj: 3}"
ALL_GAINS = "vlora.gains=[row, column, diagonal]"
# Dense models of other sizes -> (what changes, their bytes: `equal` to those of the form `paper`; `middle`: the
# geometric mean of those and the dense model's). Their sizes are solved for, and counted, before the first run.
TWINS = {
    "dense-narrow": ("width", "equal"),
    "dense-shallow": ("depth", "equal"),
    "dense-middle": ("width", "middle"),
}
FORMS: dict[str, list[str]] = {  # of models that are trained from random weights -> what each changes
    "dense": [],
    **{name: [] for name in TWINS},
    "dense-muon": ["training.optimizer=muon"],
    "paper": [],
    "gains-row-column": ["vlora.gains=[row, column]"],
    "gains-diagonal": ["vlora.gains=[diagonal]"],
    "gains-all": [ALL_GAINS],
    "attention-wider": [f"vlora.layers_per_compound={WIDE_ATTENTION}"],
    "cycle": ["vlora.sharing=cycle"],
    "star": ["vlora.topology=star"],
    "all-add": ["vlora.increments=all"],
    "start-kaiming": ["vlora.start=kaiming"],
    "start-small": ["vlora.start=small"],
    "norms-spread": ["vlora.norm_spread=0.1"],
    "rates-auto": ["vlora.lr_factors=auto"],
    "rates-b4": ["vlora.lr_factors={b: 4}"],
    "rates-b16": ["vlora.lr_factors={b: 16}"],
    "rates-base-half": ["vlora.lr_factors={base: 0.5}"],
    "rates-gain4": ["vlora.gains=[row, column]", "vlora.lr_factors={gain: 4}"],
    "no-decay": ["vlora.decay_increments=false"],
    "rank-16": ["vlora.rank=16"],
    "muon": ["training.optimizer=muon"],
    "muon-gains-rates": ["training.optimizer=muon", ALL_GAINS, "vlora.lr_factors=auto"],
}
KEPT = ["merge.after_training=false", "output.save_every=100", "output.keep=1"]


@dataclass(frozen=True)
class Table:
    """One comparison.

    Args:
        dense, shared: the recipes of dense forms and of the others; `shared` empty: `vlora from-dense` is run.
        common: settings of all runs.
        paper: further settings of the forms that share, for their published form.
        forms: name -> changes.
        steps, lr: what is trained where nothing else is asked for.
        scores: of summary.json; the first that all runs have.
        best: `min` or `max`, which of them is best.
        files: what GLORA_DATA has to hold.
        entropy: nats; a model whose loss is above knows no more than the frequencies of tokens (or classes).
    """

    dense: str
    shared: str
    common: list[str]
    forms: dict[str, list[str]]
    steps: int
    lr: str
    scores: tuple[str, ...]
    best: str
    files: tuple[str, ...]
    entropy: float
    paper: list[str] = field(default_factory=list)


TABLES: dict[str, Table] = {
    "text": Table(
        dense="dense_lm",
        shared="vlora_lm",
        common=[
            f"model.config={TEXT}", "model.tokenizer=train:4000", "data.max_tokens=128", "data.max_test_rows=500",
            "training.global_batch=8", "training.micro_batch=8", "data.validation=null", "evaluation.every=null", *KEPT,
        ],
        forms=FORMS,
        steps=1500,
        lr="1e-3",
        scores=("test/bits_per_byte", "test/loss"),
        best="min",
        files=("wikitext2/train.txt", "wikitext2/test.txt"),
        entropy=6.51,
    ),
    "images": Table(
        dense="vit_cifar10_dense",
        shared="vit_cifar10_vlora",
        common=[
            f"model.config={IMAGES}", "data.source=cifar10", "data.images.randaugment=0", "data.images.mixup=0",
            "data.images.cutmix=0", "data.images.label_smoothing=0", "training.epochs=null", "training.global_batch=64",
            "training.micro_batch=64", "training.warmup=0.1", "evaluation.every=null", *KEPT,
        ],
        paper=["vlora.rank=4"],
        forms={form: FORMS[form] for form in ("dense", *TWINS, "paper", "gains-all", "start-small", "rates-auto")},
        steps=9000,
        lr="1e-3",
        scores=("test/accuracy",),
        best="max",
        files=("cifar10/train.parquet", "cifar10/test.parquet"),
        entropy=2.303,
    ),
    "from-dense": Table(
        dense="",
        shared="",
        common=[
            "data.validation=wikitext2/valid.txt", "data.max_tokens=256", "training.global_batch=8",
            "training.micro_batch=4", "evaluation.max_rows=100", "evaluation.every=null", *KEPT,
        ],
        forms={
            "distilled": [],
            "alone": ["training.distill=null"],
            "states": ["training.distill.states=0.1"],
            "divergence": ["training.distill.weight=1"],
            "weights-alone": ["model.from_dense.calibration_rows=0"],
        },
        steps=600,
        lr="3e-4",
        scores=("validation/loss",),
        best="min",
        files=("wikitext2/train.txt", "wikitext2/valid.txt"),
        entropy=0.0,
    ),
}  # fmt: skip
