"""Bottleneck adapters: a small network with one hidden layer of r units, put into every block of a frozen transformer.

A(h) = s (U f(D h + d) + u), with D (r, I) and U (O, r). Where they sit, and what h is:

- `houlsby` (arXiv 1902.00751): behind attention and behind the feed-forward network, before each residual
  sum: y + A(y), f = GELU. (The authors train the norms too: adapter.modules_to_save.)
- `pfeiffer` (2005.00247, 2007.07779): behind the feed-forward network alone, f = ReLU: y + A(y) in every family. (Its
  authors' library gives A what the norm behind a sublayer of BERT gives, or the residual sum where there is none.)
- `parallel_adapter` (2110.04366): beside the feed-forward network: FFN(x) + A(x), with s = 4 and f = ReLU.
- `adaptformer` (2205.13535): the same for vision transformers, with s = 0.1, on LN(x) as in the paper's equations. (The
  authors' code gives A the x before the norm, and drops hidden units by 0.1: adapter.dropout.)
- `compacter` (2106.04647): places of `houlsby`; D and U are sums of Kronecker products (`projections`).

In BERT and its like the adapter comes before the dropout of the sublayer, not after it; that differs in training only.
Every adapter begins as nothing: U and u are zero. Activations are all that it sees, so the base may be quantised.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from peft.utils import PeftType
from torch import Tensor, nn
from torch.nn.functional import dropout

from glora_llm.adapters.block_tuner import BlockLayer, BlockTuner
from glora_llm.adapters.module_config import ModuleConfig, require_dropout
from glora_llm.adapters.projections import DenseProjection, KroneckerProjection, KroneckerRule, draw
from glora_llm.adapters.tuner import register
from glora_llm.errors import AdapterError, UserError, nearest
from glora_llm.glora.config import add_peft_type

PLACES = ("attention", "feed_forward", "both")


@dataclass
class BottleneckConfig(ModuleConfig):
    """Configuration of bottleneck adapters; what it shares with others is in `ModuleConfig`.

    Args:
        rank: r, units of the hidden layer.
        places: `attention`, `feed_forward` or `both`.
        parallel: A is given the input of the place and added to its output; else it is given that output.
        activation: f, by its name in transformers: relu, gelu, gelu_new (tanh), silu ...
        scale: s.
        dropout: of the hidden units.
        kronecker: n of Compacter's products; 0: dense matrices.
        kronecker_rank: k, the rank of Compacter's right-hand matrices.
        kronecker_shared: one set of left-hand matrices for the whole model; else one for every projection.
        init_weights: True: the adapter changes nothing at the start; False: every number of it starts at random.
    """

    own_type: ClassVar[PeftType] = add_peft_type("BOTTLENECK")
    rank: int = 8
    places: str = "feed_forward"
    parallel: bool = False
    activation: str = "relu"
    scale: float = 1.0
    dropout: float = 0.0
    kronecker: int = 0
    kronecker_rank: int = 1
    kronecker_shared: bool = True
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.places not in PLACES:
            raise AdapterError(f"places is '{self.places}'; expected {', '.join(PLACES[:-1])} or {PLACES[-1]}.")
        if self.rank < 1 or self.kronecker < 0 or self.kronecker_rank < 1:
            raise AdapterError(
                f"rank {self.rank}, kronecker {self.kronecker} and kronecker_rank {self.kronecker_rank}: expected at "
                "least 1, 0 and 1."
            )
        if self.kronecker and self.rank % self.kronecker:
            raise AdapterError(
                f"kronecker {self.kronecker} must divide the adapter's rank, which is {self.rank}: its matrices are "
                f"Kronecker products with ({self.kronecker}, {self.kronecker}) on the left."
            )
        if not self.scale:
            raise AdapterError("scale is 0, and nothing would be trained: take another, or leave it out.")
        require_dropout(self.dropout)
        activation_of(self.activation)


def activation_of(name: str) -> Callable[[Tensor], Tensor]:
    """Return the function of a name of transformers.

    Raises:
        AdapterError: naming the nearest that there is.
    """
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise AdapterError(f"activation '{name}' is unknown.{nearest(name, ACT2FN)} transformers names them, as relu.")
    found: Callable[[Tensor], Tensor] = ACT2FN[name]
    return found


class BottleneckLayer(BlockLayer):
    """A module of a block with bottleneck adapters behind or beside it."""

    adapter_layer_names = ("bottleneck_down", "bottleneck_up", "bottleneck_rule")
    other_param_names = ("parallel", "settings", "rules")

    def __init__(self, base_layer: nn.Module):
        super().__init__(base_layer)
        self.bottleneck_down, self.bottleneck_up = nn.ModuleDict(), nn.ModuleDict()
        self.bottleneck_rule = nn.ModuleDict()  # in one layer of the model alone: the others use it from there
        self.rules: dict[str, KroneckerRule] = {}
        self.settings: dict[str, tuple[Callable[[Tensor], Tensor], float, float]] = {}

    def add_adapter(self, adapter_name: str, config: Any) -> None:
        """Make the two projections of one adapter.

        Raises:
            UserError: where Compacter's n does not divide a size of the module.
        """
        inputs, outputs = self.sizes(config.parallel)
        self.parallel[adapter_name] = config.parallel
        self.settings[adapter_name] = (activation_of(config.activation), config.scale, config.dropout)
        down, up = self.bottleneck_down, self.bottleneck_up
        if not config.kronecker:
            down[adapter_name] = DenseProjection(inputs, config.rank, to_zero=False)
            up[adapter_name] = DenseProjection(config.rank, outputs, to_zero=True)
        else:
            if inputs % config.kronecker or outputs % config.kronecker:
                raise UserError(
                    f"kronecker {config.kronecker} does not divide {inputs} inputs and {outputs} outputs. Set "
                    "adapter.peft.kronecker to a common divisor of them and of adapter.rank."
                )
            how = (config.kronecker, config.kronecker_rank)
            down[adapter_name] = KroneckerProjection(inputs, config.rank, *how, False, config.kronecker_shared)
            up[adapter_name] = KroneckerProjection(config.rank, outputs, *how, True, config.kronecker_shared)
            if config.kronecker_shared:
                self._share_rule(adapter_name, config)
        if not config.init_weights:
            for made in (down, up, self.bottleneck_rule):
                draw(made[adapter_name] if adapter_name in made else nn.Module())

    def _share_rule(self, adapter_name: str, config: Any) -> None:
        """Take the model's left-hand matrices; the first layer makes and owns them."""
        if config.made.rule is None:
            config.made.rule = self.bottleneck_rule[adapter_name] = KroneckerRule(config.kronecker)
        self.rules[adapter_name] = config.made.rule

    def change(self, adapter_name: str, hidden: Tensor) -> Tensor:
        """Return s (U f(D h + d) + u), (..., O), of h (..., I)."""
        activation, scale, rate = self.settings[adapter_name]
        more = (self.rules[adapter_name](),) if adapter_name in self.rules else ()
        narrow = dropout(activation(self.bottleneck_down[adapter_name](hidden, *more)), rate, self.training)
        wide: Tensor = self.bottleneck_up[adapter_name](narrow, *more)
        return wide if scale == 1 else scale * wide


class BottleneckModel(BlockTuner):
    """Puts bottleneck adapters into a model."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer


register("bottleneck", BottleneckConfig, BottleneckModel)
