"""AdapterFusion (arXiv 2005.00247): trained bottleneck adapters of one base, weighed by an attention that learns.

At each place of the adapters: h + V sum over n of s_n z_n, where z_n is what adapter n adds to h and s_n its share; see
`fused`. The adapters stay as they were trained. They are saved with the fusion, so that its folder is whole in itself;
heads and other modules that were saved beside them are not taken along.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft.utils import PeftType
from torch import Tensor, nn

from glora_llm.adapters.block_tuner import BlockLayer, BlockTuner
from glora_llm.adapters.bottleneck import activation_of
from glora_llm.adapters.fused import FrozenAdapters, FusionAttention
from glora_llm.adapters.fusion_sources import KEY, METHOD, Sources, read_sources
from glora_llm.adapters.module_config import ModuleConfig
from glora_llm.adapters.projections import draw
from glora_llm.adapters.tuner import register
from glora_llm.errors import AdapterError, UserError
from glora_llm.glora.config import add_peft_type


@dataclass
class AdapterFusionConfig(ModuleConfig):
    """Configuration of a fusion; its target modules are the places of its adapters.

    Args:
        adapters: folders of two or more bottleneck adapters of one base and shape; all else follows from them. Of a
            saved fusion they say where its adapters came from, and are not read again.
        count: N, of adapters.
        bottleneck: r of each.
        parallel: they are given the input of their places, not the output.
        activation: f of each.
        digests: SHA-256 of each one's weights.
        init_weights: False: every trained number starts at random.
    """

    own_type: ClassVar[PeftType] = add_peft_type("ADAPTER_FUSION")
    adapters: list[str] = field(default_factory=list)
    count: int = 0
    bottleneck: int = 0
    parallel: bool = False
    activation: str = "relu"
    digests: list[str] = field(default_factory=list)
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._sources: Sources | None = None
        if not self.count:
            try:
                self._sources = found = read_sources(self.adapters)
            except UserError as error:
                raise AdapterError(str(error)) from None
            self.target_modules = set(found.places)  # type: ignore[assignment]
            self.count, self.bottleneck = len(found.folders), found.rank
            self.parallel, self.activation, self.digests = found.parallel, found.activation, list(found.digests)

    @property
    def sources(self) -> Sources | None:
        """The adapters' folders; None for a fusion that was saved, whose weights hold them."""
        return self._sources


class FusionLayer(BlockLayer):
    """A module of a block with fused adapters behind or beside it."""

    adapter_layer_names = ("fusion_frozen", "fusion_attention")
    other_param_names = ("parallel", "activations")

    def __init__(self, base_layer: nn.Module):
        super().__init__(base_layer)
        self.fusion_frozen, self.fusion_attention = nn.ModuleDict(), nn.ModuleDict()
        self.activations: dict[str, Callable[[Tensor], Tensor]] = {}

    def add_adapter(self, adapter_name: str, config: Any) -> None:
        """Make room for the frozen adapters, and the attention over them.

        Raises:
            UserError: where the place has not as many inputs as outputs: keys and queries are of one width.
        """
        inputs, outputs = self.sizes(config.parallel)
        if inputs != outputs:
            raise UserError(f"a fusion needs as many inputs as outputs, and there are {inputs} and {outputs}.")
        self.parallel[adapter_name], self.activations[adapter_name] = config.parallel, activation_of(config.activation)
        self.fusion_frozen[adapter_name] = FrozenAdapters(config.count, config.bottleneck, outputs)
        self.fusion_attention[adapter_name] = FusionAttention(outputs)
        if not config.init_weights:
            draw(self.fusion_attention[adapter_name])

    def change(self, adapter_name: str, hidden: Tensor) -> Tensor:
        """Return V sum over n of s_n z_n, (..., D), of h (..., D)."""
        outputs = self.fusion_frozen[adapter_name](hidden, self.activations[adapter_name])
        found: Tensor = self.fusion_attention[adapter_name](hidden, outputs)
        return found


class FusionModel(BlockTuner):
    """Puts a fusion into a model."""

    prefix = "fusion_"
    tuner_layer_cls = FusionLayer

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Inject the layers, and give them the adapters of a new fusion.

        Raises:
            AdapterError: when the adapters are not of a base like this one.
        """
        config: Any = self.peft_config[adapter_name]
        if config.sources is not None:
            modules = {name for name, _ in model.named_modules()}
            for place in config.sources.places:
                if place not in modules:
                    raise AdapterError(
                        f"{KEY}: {config.adapters[0]} has an adapter at {place}, and this model has no such module: it "
                        "was trained on another base."
                    )
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if config.sources is not None:
            tensors = config.sources.tensors()
            for place in config.sources.places:
                frozen: Any = model.get_submodule(place).fusion_frozen[adapter_name]  # type: ignore[index, union-attr]
                try:
                    frozen.fill(tensors[place])
                except UserError as error:
                    raise AdapterError(f"{KEY}: at {place}, {error}") from None


register(METHOD, AdapterFusionConfig, FusionModel)
