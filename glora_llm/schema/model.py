"""The section `model`: the network that is adapted or trained."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from glora_llm.schema.from_dense import FromDenseSection
from glora_llm.schema.section import LocalPath, Section, key


class ModelSection(Section):
    """The base model: frozen under an adapter, trained with `adapter.method: full`."""

    name_or_path: str | None = key(
        None, "a folder, a hub id, a .gguf file, or `embedded:NAME` (`glora-llm recipes --models`); or give config"
    )
    config: dict[str, Any] | None = key(
        None, "instead of name_or_path: a configuration of transformers (model_type, sizes); random weights by the seed"
    )
    tokenizer: LocalPath | None = key(
        None, "with config: a tokenizer's folder, a sentencepiece tokenizer.model, or `train:N`: N pieces, made once"
    )
    from_dense: FromDenseSection | None = key(None, "make a dense model into VLoRA first; none: take it as it is")
    revision: str | None = key(None, "hub revision (branch, tag or commit)")
    quantization: Literal["none", "nf4", "fp4", "int8"] = key("none", "how bitsandbytes stores the frozen weights")
    double_quantization: bool = key(True, "nf4 and fp4: quantise the block scales too")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = key(
        "auto", "what the frozen weights are computed in; auto: bfloat16 on a GPU that has it, else float32"
    )
    attention: (
        Literal["auto", "eager", "sdpa", "segments", "varlen", "flash_attention_2", "flex_attention"]
        | Annotated[str, Field(pattern=r"^kernels-community/[\w./@:-]+$")]
    ) = key(
        "auto",
        "backend, or kernels-community/NAME of the hub; auto: varlen on a GPU in half precision, segments on a CPU, "
        "else sdpa",
    )
    kernels: Literal["auto", "liger", "none"] = key("auto", "auto: Liger kernels on a GPU where they are installed")
    gradient_checkpointing: bool = key(False, "recompute activations in the backward pass (non-reentrant)")
    compile: bool = key(
        False,
        "train with each decoder layer compiled by torch.compile (fewer kernels, a slow start); ZeRO 0 to 2",
    )

    @model_validator(mode="after")
    def _one_origin(self) -> "ModelSection":
        if (self.name_or_path is None) == (self.config is None):
            raise ValueError(
                "give exactly one of name_or_path (a model that is there) and config (a new one with random weights): "
                "model.name_or_path=null takes the recipe's away"
            )
        if self.config is None:
            if self.tokenizer is not None:
                raise ValueError("tokenizer belongs to config; a model that is there brings its own")
            return self
        if self.from_dense is not None:
            raise ValueError("from_dense is for a trained model (name_or_path), and config makes a new one: remove one")
        if not isinstance(self.config.get("model_type"), str):
            raise ValueError("config needs model_type, such as llama: the name of the family in transformers")
        if self.quantization != "none":
            raise ValueError(
                f"quantization is {self.quantization}, and config makes a new model, whose weights are trained: they "
                "must be dense. Set model.quantization=none"
            )
        if self.revision is not None:
            raise ValueError("revision belongs to hub ids, and config makes a new model: remove one of them")
        return self
