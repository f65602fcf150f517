"""Numbers of a recipe."""

from tests.bad_input.case import Case, bad

FLOATS = [
    "adapter.alpha",
    "adapter.dropout",
    "data.validation",
    "data.test",
    "data.max_bad_rows",
    "training.epochs",
    "training.lr",
    "training.warmup",
    "training.weight_decay",
    "training.eps",
    "training.max_grad_norm",
    "training.loraplus_ratio",
    "merge.max_shard_gb",
    "merge.min_top1_agreement",
    "merge.max_loss_change",
    "merge.min_nf4_top1_agreement",
]
NUMBERS: dict[str, Case] = {
    **{
        f"{key} {value}": bad(f"{value} is no finite number", f"{key}={value}")
        for key in FLOATS
        for value in (".inf", "-.inf", ".nan")
    },
    **{
        f"{key} {value}": bad("is no finite number", f"{key.rpartition('.')[0]}={{{key.rpartition('.')[2]}: {value}}}")
        for key in ("adapter.lr_factors.A",)
        for value in (".inf", ".nan")
    },
    "a slot's alpha .inf": bad(
        "{mode: lora, alpha: .inf}}: .inf is no finite number.", "adapter.slots={B: {mode: lora, alpha: .inf}}"
    ),
    "search.mutation_probability .nan": bad(".nan}: .nan is no finite number.", "search={mutation_probability: .nan}"),
    "search.budget .nan": bad(".nan}: .nan is no finite number.", "search={budget: .nan}", "adapter.paths=sample"),
    "search.budget .inf": bad(".inf}: .inf is no finite number.", "search={budget: .inf}", "adapter.paths=sample"),
    "search.budget text": bad(
        "search.budget 'much' is no limit; expected something like 0.5M, 250k",
        "search={budget: much}",
        "adapter.paths=sample",
    ),
    "search.budget below 0": bad(
        "search.budget '-1' is no limit; expected something like 0.5M, 250k or",
        "search={budget: -1}",
        "adapter.paths=sample",
    ),
    "lr 1e400": bad("1e400 is no finite number.", "training.lr=1e400"),
    "lr 1e10": bad("lr is 1e+10, and above 1000 nothing learns", "training.lr=1e10"),
    "lr 0": bad("training.lr: got 0 (integer), expected greater than 0 or 'auto'.", "training.lr=0"),
    "lr text": bad("training.lr: got 'fast' (text), expected a number or 'auto'.", "training.lr=fast"),
    "betas beyond 1": bad("training.betas.0: got 1.5 (number), expected less than 1.", "training.betas=[1.5, -1]"),
    "betas of 1": bad("training.betas.0: got 1 (integer), expected less than 1.", "training.betas=[1, 1]"),
    "betas .nan": bad(".nan is no finite number.", "training.betas=[.nan, 0.9]"),
    "three betas": bad(
        "training.betas: got [0.9, 0.9, 0.9] (list), expected at most 2 entries.", "training.betas=[0.9, 0.9, 0.9]"
    ),
    "one beta": bad("training.betas: got 0.9 (number), expected a list.", "training.betas=0.9"),
    "a warm-up longer than the run": bad(
        "training.warmup is 50 steps, and the run has 3: it would never reach", "training.warmup=50"
    ),
    "a warm-up of part of a step": bad(
        "training: warmup 1.5 is no whole number of steps; a share of the steps", "training.warmup=1.5"
    ),
    "steps 0": bad("training.steps: got 0 (integer), expected greater than 0.", "training.steps=0"),
    "steps 1e21": bad(
        "10000000000000000000... has 22 characters; expected a number below 2^63.",
        "training.steps=1000000000000000000000",
    ),
    "steps 2.5": bad("training.steps: got 2.5 (number), expected an integer.", "training.steps=2.5"),
    "steps true": bad("training.steps: got True (true or false), expected an integer.", "training.steps=true"),
    "epochs 1e300": bad(
        "training.epochs: got 1e+300 (number), expected less than or equal to",
        "training.epochs=1e300",
        "training.steps=null",
    ),
    "steps and epochs": bad("training: give exactly one of steps and epochs: training.steps=null", "training.epochs=1"),
    "neither steps nor epochs": bad(
        "training: give exactly one of steps and epochs: training.steps=null", "training.steps=null"
    ),
    "a seed of 30 digits": bad(
        "99999999999999999999... has 30 characters; expected a number below 2^63.", "training.seed=" + "9" * 30
    ),
    "a seed below 0": bad("training.seed: got -1 (integer), expected greater than or equal to 0.", "training.seed=-1"),
    "a batch that does not divide": bad(
        "training: global_batch 3 is not a multiple of micro_batch 2:",
        "training.global_batch=3",
        "training.micro_batch=2",
    ),
    "an empty list of ranks": bad(
        "[]}: adapter.supernet.ranks: got [] (list), expected at least 1 entries.",
        "adapter.paths=sample",
        "adapter.supernet={ranks: []}",
    ),
    "a supernet's rank twice": bad(
        "[2, 2]}: adapter.supernet.ranks: [2, 2] names a rank twice.",
        "adapter.paths=sample",
        "adapter.supernet={ranks: [2, 2]}",
    ),
    "a supernet without modes": bad(
        "Slot A has no mode left; it has: lora",
        "adapter.paths=sample",
        "adapter.supernet={modes: {A: []}}",
    ),
    "a supernet's rank above the smaller side": bad(
        "A rank of 500 is above the smaller side of every linear of this model,",
        "adapter.paths=sample",
        "adapter.supernet={ranks: [500]}",
    ),
    "a rank above the smaller side": bad(
        "A rank of 65 is above the smaller side of every linear of this model,", "adapter.rank=65"
    ),
    "a rank of 10^9": bad(
        "adapter.rank: got 1000000000 (integer), expected less than or equal to", "adapter.rank=1000000000"
    ),
    "a slot's rank above the smaller side": bad(
        "A rank of 100 is above the smaller side of every linear of this model,",
        "adapter.slots={B: {mode: lora, rank: 100}}",
    ),
    "a LoRA's rank above the smaller side": bad(
        "A rank of 100 is above the smaller side of every linear of this model,",
        "adapter.method=lora",
        "adapter.rank=100",
    ),
    "a rank of 0": bad("adapter.rank: got 0 (integer), expected greater than 0.", "adapter.rank=0"),
    "a rank as text": bad("adapter.rank: got 'eight' (text), expected an integer.", "adapter.rank=eight"),
    "max_tokens 1": bad("data: max_tokens is 1; text needs 2 or more: the longest sequence in", "data.max_tokens=1"),
    "save_every 0": bad("output.save_every: got 0 (integer), expected greater than 0.", "output.save_every=0"),
    "keep 0": bad("output.keep: got 0 (integer), expected greater than 0.", "output.keep=0"),
    "a micro batch of 10^12": bad(
        "training.global_batch: got 1000000000000 (integer), expected less than",
        "training.micro_batch=1000000000000",
        "training.global_batch=1000000000000",
    ),
}
