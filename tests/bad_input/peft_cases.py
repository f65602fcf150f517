"""Arguments of PEFT's own methods (adapter.peft) that are of another kind, have no effect, or cannot be used."""

from tests.bad_input.case import Case, bad

PEFT_ARGUMENTS: dict[str, Case] = {
    f"peft, {method}: {name} {value}": bad(says, f"adapter.method={method}", f"adapter.peft={{{name}: {value}}}")
    for method, name, value, says in (
        ("lora", "init_lora_weights", "foo", "adapter.peft.init_lora_weights 'foo' is unknown."),
        ("lora", "use_rslora", "'yes'", "adapter.peft.use_rslora: got 'yes' (str); LoraConfig takes bool."),
        ("lora", "rank_pattern", "[1]", "adapter.peft.rank_pattern: got [1] (list); LoraConfig takes"),
        ("lora", "rank_pattern", "{nothing: 4}", "has no effect: The following rank_pattern keys did not match any"),
        ("lora", "exclude_modules", "nothing", "has no effect: You have passed exclude_modules=nothing but no"),
        ("lora", "target_parameters", "[x]", "has no effect: target_parameters=['x'] were set but no parameter"),
        ("lora", "layer_replication", "[[0, 9]]", "cannot be used: IndexError: index 2 is out of range."),
        ("lora", "megatron_config", "{a: 1}", "cannot be used: ModuleNotFoundError: No module named 'megatron'."),
        ("lora", "runtime_config", "5", "adapter.peft {'runtime_config': 5} cannot be used: AttributeError"),
        ("lora", "peft_type", "IA3", "adapter.peft.peft_type follows from adapter.method: take it away."),
        ("loha", "init_weights", "foo", "adapter.peft.init_weights: got 'foo' (str); LoHaConfig takes bool."),
        ("miss", "init_weights", "foo", "MissConfig takes Union[bool, Literal['bat', 'mini']]."),
        ("lokr", "decompose_factor", "x", "adapter.peft.decompose_factor: got 'x' (str); LoKrConfig takes int."),
        ("vera", "projection_prng_key", "x", "projection_prng_key: got 'x' (str); VeraConfig takes int."),
        ("c3a", "block_size", "7", "adapter.method c3a: The block size should be a factor of the input size."),
        ("fourierft", "n_frequency", "0", "`n_frequency` should be a positive integer value but the value"),
    )
}
PEFT_ARGUMENTS |= {
    f"peft, {method}: {words}": bad(says, f"adapter.method={method}", words)
    for method, words, says in (
        ("ssf", "adapter.peft={init_std: 2}", "init_std is 2; expected a standard deviation from 0 to below 1."),
        ("ssf", "adapter.peft={init_std: x}", "adapter.peft.init_std: got 'x' (str); SSFConfig takes float."),
        ("ssf", "adapter.peft={shift: false}", "SSFConfig has no such argument."),
        ("ssf", "adapter.targets=[embed_tokens]", "SSF scales the output of linears, convolutions and norms with a"),
        ("repadapter", "adapter.rank=7", "groups is 2 and the rank is 7: the groups must divide it"),
        ("repadapter", "adapter.rank=66", "A rank of 66 is above the smaller side of every linear of this model"),
        (
            "repadapter",
            "adapter.peft={groups: 3, r: 9}",
            "3 groups do not divide the 64 inputs: set adapter.peft.groups",
        ),
        ("repadapter", "adapter.peft={places: [mlp]}", "expected one or both of attention, feed_forward."),
        ("repadapter", "adapter.peft={places: []}", "places is []; expected one or both of attention, feed_forward."),
        ("repadapter", "adapter.peft={scale: 0}", "scale is 0, and nothing would be trained"),
        ("repadapter", "adapter.targets=[norm]", "RepAdapter goes before attention and feed-forward modules, and"),
        ("ln_tuning", "adapter.targets=[q_proj]", "adapter.method ln_tuning trains layer norms, and model.layers.0."),
    )
}
PEFT_ARGUMENTS |= {
    "lora_dropout: p 1": bad(
        "p is 1.0; expected a probability from 0 to below 1.", "adapter.method=lora_dropout", "adapter.peft={p: 1.0}"
    ),
    "lora_dropout: an ensemble that is to be merged": bad(
        "An ensemble of 4 masks cannot be merged: the mean of its outputs is no single",
        "adapter.method=lora_dropout",
        "adapter.peft={ensemble: 4}",
        "merge.after_training=true",
    ),
    "lora_dropout: an ensemble that is to write text": bad(
        "evaluation.generate writes text, and adapter.peft.ensemble takes the mean of several models",
        "adapter.method=lora_dropout",
        "adapter.peft={ensemble: 4}",
        "evaluation.generate={}",
    ),
    "periodic_lora: period 0": bad(
        "period is 0; expected the steps between two unloadings, at least 1.",
        "adapter.method=periodic_lora",
        "adapter.peft={period: 0}",
    ),
    "lors: a shared rank below 0": bad(
        "shared_rank is -1; expected a rank, or 0: the private one.",
        "adapter.method=lors",
        "adapter.peft={shared_rank: -1}",
    ),
    "lors: a shared rank above the linears": bad(
        "A rank of 4000 is above the smaller side of every linear of this model",
        "adapter.method=lors",
        "adapter.peft={shared_rank: 4000}",
    ),
    "adalora: more ranks at the end": bad(
        "adapter.peft.target_r is 50 and init_r is 3: AdaLoRA takes ranks away",
        "adapter.method=adalora",
        "adapter.peft={target_r: 50}",
    ),
    "lors: another LoRA method": bad(
        "use_dora makes LoRA another method, and lors is one already: leave it out.",
        "adapter.method=lors",
        "adapter.peft={use_dora: true}",
    ),
    "LoRA+ without two factors": bad(
        "training.loraplus_ratio is 4: LoRA+ has a second learning rate for the second",
        "adapter.method=ia3",
        "training.loraplus_ratio=4",
    ),
    "peft, lora: a whole number for a float": bad("", "adapter.method=lora", "adapter.peft={lora_dropout: 0}"),
    "peft, lora: a float for alpha": bad("", "adapter.method=lora", "adapter.peft={lora_alpha: 8.5}"),
}
