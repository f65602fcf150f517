"""Values that methods of PEFT derive from a layer's weight when they are injected, and keep.

A merge injects the adapter into a model without weights, and gives each layer its weight when its turn comes: then
this is computed again. None of it is saved, for it follows from the base.
"""

from typing import Any

import torch
from peft.tuners.delora.layer import DeloraLayer
from peft.tuners.osf.layer import OSFLayer
from peft.tuners.osf.utils import decompose_weight_matrix
from peft.tuners.psoft.layer import PsoftLayer
from peft.tuners.supertuning.layer import SupertuningLayer


@torch.no_grad()
def derive(layer: Any, config: Any) -> None:
    """Compute it again for a layer that has its weight now; other methods keep nothing of the kind.

    Args:
        layer: of PEFT, with one adapter.
        config: of the adapter.
    """
    weight = layer.get_base_layer().weight
    for name in layer.active_adapters:
        if isinstance(layer, DeloraLayer):
            layer.delora_w_norm[name] = weight.norm(dim=0)
        elif isinstance(layer, OSFLayer):
            parts = decompose_weight_matrix(weight, top_k=layer.effective_rank[name])
            for part in ("U_low", "S_low", "V_low"):
                getattr(layer, f"_osf_{part}_init")[name] = parts[part].detach().clone()
        elif isinstance(layer, PsoftLayer):
            layer._build_psoft_ab_cache_buffers(name, layer.ab_svd_init[name])
        elif isinstance(layer, SupertuningLayer):
            scores, count = weight.abs().flatten(), len(layer.supertuning_values[name])
            largest = torch.topk(scores, k=count, largest=config.select_top)
            layer.supertuning_indices[name] = largest.indices.to(torch.int32)
