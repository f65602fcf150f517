"""The adapter section, genomes, and DeepSpeed's files."""

import json
from typing import Any

from tests.bad_input.case import Case, bad, file

PEFT = ("adapter.method=lora",)


def deepspeed(says: str, values: Any) -> Case:
    text = values if isinstance(values, str) else json.dumps(values)
    return bad(says, "training.deepspeed=my.json", change=file("my.json", text))


def genome(says: str, values: Any) -> Case:
    text = values if isinstance(values, str) else json.dumps(values)
    return bad(says, "adapter.genome=genome.json", change=file("genome.json", text))


LAYER = "model.layers.0.self_attn.q_proj"
ADAPTERS: dict[str, Case] = {
    "targets: a bracket that does not close": bad(
        "adapter.targets: '([' is no regular expression: unterminated character", "adapter.targets='(['"
    ),
    "targets: an expression that matches nothing": bad(
        "adapter.targets '.*query' match no module. Linears of this model:", "adapter.targets='.*query'"
    ),
    "targets: one of three misspelt": bad(
        "'v_prj' matches no module. Did you mean 'v_proj'? Linears of this", "adapter.targets=[q_proj, v_prj, o_proj]"
    ),
    "targets: all misspelt": bad(
        "'query' matches no module. Linears of this model: down_proj,", "adapter.targets=[query]"
    ),
    "targets: a comma": bad(
        "adapter.targets 'q_proj,v_proj' match no module. Linears of this", "adapter.targets='q_proj,v_proj'"
    ),
    "targets: empty text": bad("adapter.method glora: No `target_modules` passed but also no", "adapter.targets=''"),
    "targets: an empty list": bad("adapter.method glora: No `target_modules` passed but also no", "adapter.targets=[]"),
    "targets: a number": bad("adapter.targets: got 5 (integer), expected text or a list.", "adapter.targets=5"),
    "targets: a norm": bad("Target module LlamaRMSNorm((64,), eps=1e-06) is not supported.", "adapter.targets=[norm]"),
    "targets: the embedding, with slot C": bad(
        "model.embed_tokens: Slot C adds a constant to a layer's input, and the input of an embedding is the number",
        "adapter.targets=[embed_tokens]",
    ),
    "targets: the embedding, with slot D": bad(
        "model.embed_tokens: Slot D scales the frozen bias, and an embedding has none.",
        "adapter.targets=[embed_tokens]",
        "adapter.slots={B: lora, D: vector}",
    ),
    "targets: the embedding, in a supernet": bad(
        "model.embed_tokens: A supernet is of linears and convolutions",
        "adapter.targets=[embed_tokens, q_proj]",
        "adapter.paths=sample",
    ),
    "targets: the embedding": bad("", "adapter.targets=[embed_tokens]", "adapter.slots={A: lora, B: lora, E: vector}"),
    "targets: an empty name in a list": bad(
        "'' matches no module. Linears of this model: down_proj, gate_proj,", "adapter.targets=['', q_proj]"
    ),
    "targets: a single name": bad("", "adapter.targets=q_proj"),
    "modules_to_save: misspelt": bad(
        "'lm_haed' matches no module. Did you mean 'lm_head'? Linears of this", "adapter.modules_to_save=[lm_haed]"
    ),
    "modules_to_save: a text": bad(
        "adapter.modules_to_save: got 'lm_head' (text), expected a list.", "adapter.modules_to_save=lm_head"
    ),
    "paths: no expression": bad(
        "{B: vector}}: adapter.paths: '(' is no regular expression: missing ),", "adapter.paths={'(': {B: vector}}"
    ),
    "paths: matches nothing": bad(
        "adapter.paths 'query' matches none of the 14 adapted layers, such as", "adapter.paths={query: {B: vector}}"
    ),
    "paths: a misspelt slot": bad(
        "{F: vector}}: adapter.paths.q_proj.F: got 'F' (text), expected 'A',", "adapter.paths={q_proj: {F: vector}}"
    ),
    "paths: a misspelt word": bad(
        "adapter.paths: got 'samples' (text), expected a mapping or 'sample'.", "adapter.paths=samples"
    ),
    "slots: an unknown mode": bad(
        "lorra}: adapter.slots.A: got 'lorra' (text), expected 'lora', 'block',", "adapter.slots={A: lorra}"
    ),
    "slots: an unknown slot": bad(
        "lora}: adapter.slots.F: got 'F' (text), expected 'A', 'B', 'C', 'D' or", "adapter.slots={F: lora}"
    ),
    "slots: a mode that the slot has not": bad(
        "Slot E has no mode 'lora'; it has: vector, scalar, none.", "adapter.slots={E: lora}"
    ),
    "slots: nothing at all": bad(
        "adapter: slots is empty: give a slot its mode (B: lora), or leave", "adapter.slots={}"
    ),
    "slots: all none": bad("adapter.method glora has no trainable parameter. adapter.slots", "adapter.slots={A: none}"),
    "slots: a list": bad("adapter.slots: got ['A', 'B'] (list), expected a mapping.", "adapter.slots=[A, B]"),
    "slots: D without a bias": bad(
        "Slot D scales the frozen bias b0, and this layer has none, so D would", "adapter.slots={D: vector}"
    ),
    "slots and a preset": bad(
        "adapter: preset and slots exclude each other: adapter.slots=null takes",
        "adapter.slots={A: lora}",
        "adapter.preset=lora",
    ),
    "an unknown preset": bad("adapter.preset: got 'lorra' (text), expected 'lora', 'ssf',", "adapter.preset=lorra"),
    "an unknown method": bad(
        "adapter.method 'lorra' is unknown. Did you mean 'lora'? There is:", "adapter.method=lorra"
    ),
    "a method in capitals": bad("adapter.method 'LoRA' is unknown. Did you mean 'lora'?", "adapter.method=LoRA"),
    "a method that does not train here": bad(
        "adapter.method cartridge does not train here: its prefix is distilled", "adapter.method=cartridge"
    ),
    "shira": bad("adapter.method shira does not train here: it chooses what to train by", "adapter.method=shira"),
    "xlora": bad("adapter.method xlora does not train here: it mixes adapters that were", "adapter.method=xlora"),
    "slots with another method": bad(
        "adapter: slots belongs to method glora, not to 'lora':", *PEFT, "adapter.slots={A: lora}"
    ),
    "peft with glora": bad(
        "adapter: peft holds arguments of PEFT's own methods; glora has keys of", "adapter.peft={r: 4}"
    ),
    "peft: an unknown argument": bad(
        "LoraConfig has no such argument. Did you mean 'r'?", *PEFT, "adapter.peft={rr: 4}"
    ),
    "peft: a rank of text": bad(
        "adapter.peft.r: got 'four' (str); LoraConfig takes int.", *PEFT, "adapter.peft={r: four}"
    ),
    "peft: a rank of 0": bad(
        "adapter.method lora: `r` should be a positive integer value but the", *PEFT, "adapter.peft={r: 0}"
    ),
    "peft: an unknown bias": bad(
        "adapter.peft.bias: got 'foo' (str); LoraConfig takes Literal['none',", *PEFT, "adapter.peft={bias: foo}"
    ),
    "peft: frozen": bad(
        "adapter.method lora has no trainable parameter. Look what adapter.peft",
        *PEFT,
        "adapter.peft={inference_mode: true}",
    ),
    "peft: a list": bad("adapter.peft: got ['r'] (list), expected a mapping.", *PEFT, "adapter.peft=[r]"),
    "peft: dropout of text": bad(
        "adapter.peft.lora_dropout: got 'much' (str); LoraConfig takes float.",
        *PEFT,
        "adapter.peft={lora_dropout: much}",
    ),
    "peft: layers that are not there": bad(
        "adapter.targets ['q_proj'] match no module. Linears of this model:",
        *PEFT,
        "adapter.targets=[q_proj]",
        "adapter.peft={layers_to_transform: [99]}",
    ),
    "weights that are not there": bad("there is no none (looked in .).", "adapter.weights=none"),
    "lr_factors: an unknown slot": bad(
        "1.0}: adapter.lr_factors.F: got 'F' (text), expected 'A', 'B', 'C',", "adapter.lr_factors={F: 1.0}"
    ),
    "lr_factors: below 0": bad(
        "-1.0}: adapter.lr_factors.A: got -1.0 (number), expected greater than", "adapter.lr_factors={A: -1.0}"
    ),
    "dropout 1": bad("adapter.dropout: got 1.0 (number), expected less than 1.", "adapter.dropout=1.0"),
    "composition misspelt": bad(
        "adapter.composition: got 'hadamar' (text), expected 'product' or", "adapter.composition=hadamar"
    ),
    "supernet without sampling": bad(
        "adapter: supernet is what `paths: sample` draws from: set", "adapter.supernet={ranks: [2]}"
    ),
}
GENOMES: dict[str, Case] = {
    "genome: not there": bad("there is no none.json (looked in .).", "adapter.genome=none.json"),
    "genome: a folder": bad(
        "There is no genome file g.json; a search writes RUN/genome.json.",
        "adapter.genome=g.json",
        change=lambda folder: (folder / "g.json").mkdir(),
    ),
    "genome: empty": genome("genome is not valid JSON: Expecting value: line 1 column 1 (char 0). A", ""),
    "genome: cut off": genome("genome is not valid JSON: Expecting value: line 1 column 7 (char 6). A", '{"a": '),
    "genome: binary": bad(
        "genome.json is no text: 'utf-8' codec can't decode byte 0x80 in",
        "adapter.genome=genome.json",
        change=file("genome.json", bytes(range(256))),
    ),
    "genome: a list": genome('expected an object such as {"model.layers.0.mlp.up_proj": {"B":', []),
    "genome: without a layer": genome("adapter.method glora has no trainable parameter. The genome gives no", {}),
    "genome: a layer that is a list": genome(
        'expected an object such as {"model.layers.0.mlp.up_proj": {"B":', {LAYER: ["A"]}
    ),
    "genome: an unknown layer": genome(
        "there is no adapted layer 'model.layers.9.self_attn.q_proj' among the",
        {"model.layers.9.self_attn.q_proj": {"B": "vector"}},
    ),
    "genome: a path out of it": genome(
        "there is no adapted layer '../../etc/passwd' among the 14 of this", {"../../etc/passwd": {"B": "vector"}}
    ),
    "genome: an unknown slot": genome(
        "model.layers.0.self_attn.q_proj: Unknown GLoRA slot 'F'; there are A,", {LAYER: {"F": "vector"}}
    ),
    "genome: an unknown mode": genome(
        "model.layers.0.self_attn.q_proj: Slot B has no mode 'vectr'; it has:", {LAYER: {"B": "vectr"}}
    ),
    "genome: a mode that is a number": genome(
        "slot B of model.layers.0.self_attn.q_proj has no mode: 5.", {LAYER: {"B": 5}}
    ),
    "genome: a rank of 10^12": genome(
        "A rank of 1000000000000 is above the smaller side of every linear of",
        {LAYER: {"B": {"mode": "lora", "rank": 10**12, "scale": 1.0}}},
    ),
    "genome: a rank of text": genome(
        'slot B of model.layers.0.self_attn.q_proj: mode lora is {"mode":',
        {LAYER: {"B": {"mode": "lora", "rank": "8", "scale": 1.0}}},
    ),
    "genome: a scale of NaN": genome(
        'slot B of model.layers.0.self_attn.q_proj: mode lora is {"mode":',
        f'{{"{LAYER}": {{"B": {{"mode": "lora", "rank": 2, "scale": NaN}}}}}}',
    ),
    "genome: no rank": genome(
        'slot B of model.layers.0.self_attn.q_proj: mode lora is {"mode":', {LAYER: {"B": "lora"}}
    ),
    "genome: nested 10,000 deep": genome(
        "genome is not valid JSON: its brackets nest too deep. A search writes", '{"a":' * 10_000 + "1" + "}" * 10_000
    ),
    "genome: every slot none": genome(
        "adapter.method glora has no trainable parameter. The genome gives no", {LAYER: {"B": "none"}}
    ),
    "genome: a layer twice": genome(
        "genome is not valid JSON: the key 'model.layers.0.self_attn.q_proj'",
        f'{{"{LAYER}": {{"B": "vector"}}, "{LAYER}": {{"A": "vector"}}}}',
    ),
}
ZERO = "zero_optimization"
DEEPSPEED: dict[str, Case] = {
    "DeepSpeed: an unknown name": bad(
        "No DeepSpeed configuration 'zero4'; there is: zero0, zero1, zero2,", "training.deepspeed=zero4"
    ),
    "DeepSpeed: a file that is not there": bad(
        "No DeepSpeed configuration 'none.json'; there is: zero0, zero1, zero2,", "training.deepspeed=none.json"
    ),
    "DeepSpeed: cut off": deepspeed("my.json is not valid JSON: Expecting property name enclosed in double", "{"),
    "DeepSpeed: a list": deepspeed("my.json holds a list; expected a JSON object, {...}. Expected are keys", "[]"),
    "DeepSpeed: nested 10,000 deep": deepspeed(
        "my.json is not valid JSON: its brackets nest too deep. Expected are", "[" * 10_000 + "]" * 10_000
    ),
    "DeepSpeed: binary": bad(
        "my.json cannot be read as text: 'utf-8' codec can't decode byte 0x80",
        "training.deepspeed=my.json",
        change=file("my.json", bytes(range(256))),
    ),
    "DeepSpeed: a misspelt section": deepspeed(
        "'zero_optimisation' is no section that is known here, and DeepSpeed", {"zero_optimisation": {"stage": 2}}
    ),
    "DeepSpeed: a stage of text": deepspeed(
        'zero_optimization.stage: Input should be 0, 1, 2, 3 or 3, got "abc".', {ZERO: {"stage": "abc"}}
    ),
    "DeepSpeed: stage 9": deepspeed(
        "zero_optimization.stage: Input should be 0, 1, 2, 3 or 3, got 9.", {ZERO: {"stage": 9}}
    ),
    "DeepSpeed: stage true": deepspeed(
        "zero_optimization.stage is true; there are 0, 1, 2 and 3.", {ZERO: {"stage": True}}
    ),
    "DeepSpeed: a list for a section": deepspeed("zero_optimization is [], and must be an object: {...}.", {ZERO: []}),
    "DeepSpeed: a truth value for a section": deepspeed("bf16 is true, and must be an object: {...}.", {"bf16": True}),
    "DeepSpeed: a misspelt key": deepspeed(
        "zero_optimization.stge: there is no such key. Did you mean 'stage'?", {ZERO: {"stge": 2}}
    ),
    "DeepSpeed: enabled of text": deepspeed(
        'bf16.enabled is "yes"; use true, false or "auto".', {"bf16": {"enabled": "yes"}}
    ),
    "DeepSpeed: fp16 on a CPU": deepspeed(
        "'my.json' sets fp16.enabled to true, and this cpu does not compute in", {"fp16": {"enabled": True}}
    ),
    "DeepSpeed: two precisions": deepspeed(
        "bf16 and fp16 are both enabled. Enable one of them.", {"fp16": {"enabled": True}, "bf16": {"enabled": True}}
    ),
    "DeepSpeed: bf16 against float32": deepspeed(
        "DeepSpeed configuration 'my.json' sets bf16.enabled to true, and the", {"bf16": {"enabled": True}}
    ),
    "DeepSpeed: a batch of its own": deepspeed(
        "DeepSpeed configuration 'my.json' sets train_batch_size to 7, the", {"train_batch_size": 7}
    ),
    "DeepSpeed: a batch of text": deepspeed(
        "DeepSpeed configuration 'my.json' sets train_batch_size to seven, the", {"train_batch_size": "seven"}
    ),
    "DeepSpeed: an optimizer of its own": deepspeed(
        "the recipe owns the optimizer (training.optimizer, lr, betas, eps).", {"optimizer": {"type": "Adam"}}
    ),
    "DeepSpeed: a scheduler of its own": deepspeed(
        "the recipe owns the scheduler (training.schedule and training.warmup).", {"scheduler": {"type": "WarmupLR"}}
    ),
    "DeepSpeed: offload to nvme": deepspeed(
        "optimizer states on nvme cannot be saved here. Offload them to the cpu.",
        {ZERO: {"stage": 2, "offload_optimizer": {"device": "nvme"}}},
    ),
    "DeepSpeed: offload to a word": deepspeed(
        "zero_optimization.offload_optimizer.device: Input should be 'none',",
        {ZERO: {"stage": 2, "offload_optimizer": {"device": "cloud"}}},
    ),
    "DeepSpeed: offload a text": deepspeed(
        "zero_optimization.offload_optimizer: Input should be a valid", {ZERO: {"stage": 2, "offload_optimizer": "cpu"}}
    ),
    "DeepSpeed: gradients in int8": deepspeed(
        "data_types.grad_accum_dtype must be fp32, bf16 or fp16.", {"data_types": {"grad_accum_dtype": "int8"}}
    ),
}
