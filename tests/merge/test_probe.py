import json, shutil
from pathlib import Path
from typing import Any
import pytest, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM, LlamaConfig, LlamaForCausalLM
from glora_llm.merge.model_merge import write_merged
from glora_llm.merge.command import merge_run
from tests.merge.conftest import ALL_MODES, logits, IDS, CPU
from tests.merge.test_lora_export import export, through_peft
from tests.merge.test_model_merge import merge, reload

def compare(trained, out):
    exp = trained.logits()
    base = logits(AutoModelForCausalLM.from_pretrained(trained.plan.base.folder).eval())
    print("changed", (exp-base).abs().max())
    m = reload(merge(trained, out))
    torch.testing.assert_close(logits(m), exp, rtol=1e-4, atol=2e-4)

@pytest.fixture(scope="module")
def tied(tiny, tmp_path_factory):
    f = tmp_path_factory.mktemp("tied"); 
    for x in tiny.folder.iterdir(): shutil.copy(x, f)
    c = json.loads((f/"config.json").read_text()); c["tie_word_embeddings"]=True; (f/"config.json").write_text(json.dumps(c))
    w = load_file(f/"model.safetensors"); del w["lm_head.weight"]; save_file(w, f/"model.safetensors", metadata={"format":"pt"})
    return str(f)

def family(tiny, tmp_path_factory, model):
    f = tmp_path_factory.mktemp("fam")
    for x in tiny.folder.iterdir():
        if not x.name.endswith(".safetensors") and x.name != "config.json": shutil.copy(x, f)
    g = torch.Generator().manual_seed(3)
    for n, p in model.named_parameters():
        if n.endswith("bias"): p.data.normal_(generator=g)
    model.save_pretrained(f)
    return str(f)
SIZES = dict(hidden_size=64, intermediate_size=128, vocab_size=260, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1, max_position_embeddings=256, bos_token_id=1, eos_token_id=3, pad_token_id=0)

@pytest.fixture(scope="module")
def qwen(tiny, tmp_path_factory):
    torch.manual_seed(0)
    return family(tiny, tmp_path_factory, Qwen2ForCausalLM(Qwen2Config(**SIZES)))

@pytest.fixture(scope="module")
def biased(tiny, tmp_path_factory):
    torch.manual_seed(0)
    return family(tiny, tmp_path_factory, LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True)))

@pytest.mark.parametrize("q", ["none", "nf4"])
@pytest.mark.parametrize("keys", [dict(slots=ALL_MODES), dict(slots={"B":"lora"}, modules_to_save=["lm_head"]), dict(slots={"B":"lora"}, modules_to_save=["embed_tokens"]), dict(slots={"B":"lora"}, modules_to_save=["embed_tokens", "lm_head"])])
def test_tied(tied, train, tmp_path, keys, q):
    compare(train(model={"name_or_path": tied, "quantization": q}, **keys), tmp_path/"o")

@pytest.mark.parametrize("q", ["none", "nf4"])
@pytest.mark.parametrize("keys", [dict(slots={**ALL_MODES, "D":"vector"}, targets=["q_proj","k_proj","v_proj"]), dict(slots={"A":"lora","B":"lora"}), dict(preset="ssf", targets=["q_proj"]), dict(method="lora", peft={"bias":"lora_only"}), dict(method="lora", peft={"bias":"all"}), dict(method="lora")])
def test_qwen(qwen, train, tmp_path, keys, q):
    compare(train(model={"name_or_path": qwen, "quantization": q}, **keys), tmp_path/"o")

@pytest.mark.parametrize("q", ["none", "nf4"])
@pytest.mark.parametrize("keys", [dict(slots={**ALL_MODES}), dict(preset="ssf"), dict(slots={**ALL_MODES, "D": "scalar"}, targets=["o_proj"])])
def test_biased(biased, train, tmp_path, keys, q):
    compare(train(model={"name_or_path": biased, "quantization": q}, **keys), tmp_path/"o")

@pytest.mark.parametrize("keys", [dict(slots={**ALL_MODES, "D": "vector"}, targets=["q_proj"])])
@pytest.mark.parametrize("q", ["none", "nf4"])
def test_biased_export(biased, train, tmp_path, keys, q):
    t = train(model={"name_or_path": biased, "quantization": q}, **keys)
    torch.testing.assert_close(through_peft(t, export(t, tmp_path/"l")), t.logits(), rtol=1e-4, atol=2e-4)

@pytest.mark.parametrize("q", ["none", "nf4", "int8"])
@pytest.mark.parametrize("keys", [dict(slots={"A":"lora","B":"lora"}, targets=["lm_head", "q_proj"]), dict(method="lora", targets=["lm_head", "q_proj"]), dict(method="lora", targets=["embed_tokens", "q_proj"])])
def test_head(train, tmp_path, keys, q):
    compare(train(model={"quantization": q}, **keys), tmp_path/"o")

@pytest.mark.parametrize("q", ["none", "nf4"])
def test_head_export(train, tmp_path, q):
    t = train(model={"quantization": q}, slots={"A":"lora","B":"lora"}, targets=["lm_head", "q_proj"])
    torch.testing.assert_close(through_peft(t, export(t, tmp_path/"l")), t.logits(), rtol=1e-4, atol=2e-4)

def test_head_bias(train, tmp_path):
    t = train(slots=ALL_MODES, targets=["lm_head", "q_proj"])
    from glora_llm.plan import merge_obstacle, describe
    print(describe(t.plan, 1))

def test_qwen_obstacle(qwen, train, tmp_path):
    t = train(model={"name_or_path": qwen}, slots=ALL_MODES)
    merge_run(t.folder.path, tmp_path/"o")
