"""Models of the PyPI package slot-attention, as ours: the same weights, the same outputs."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slot_models.adaptive import AdaptiveSlotWrapper, PackageGate
from slot_models.attention import AttentionOptions, MultiHeadSlotAttention, SlotAttention
from slot_models.meta import MetaSlotAttention
from slot_models.ortho import OrthoSlotWrapper


def from_package(module: nn.Module) -> nn.Module:
    """Turns a module of the package ``slot-attention`` (1.5.2) into ours.

    The package is not imported: a module is known by its class's name. The weights are copied, in their dtype and on
    their device. The package draws its noise from torch's global generator; hand the same noise to ours for the same
    output. What it keeps of every batch beyond the weights (running means of the codebook) is copied too.

    Args:
        module: a SlotAttention, MultiHeadSlotAttention, AdaptiveSlotWrapper, MetaSlotAttention or OrthoSlotWrapper.

    Raises:
        ValueError: a class that we have not, or a codebook that ours cannot be (several heads, a projection, cosine
            similarity).
    """
    source: Any = module
    converters = {
        "SlotAttention": _attention,
        "MultiHeadSlotAttention": _attention,
        "AdaptiveSlotWrapper": _adaptive,
        "MetaSlotAttention": _meta,
        "OrthoSlotWrapper": _ortho,
    }
    name = type(module).__name__
    if name not in converters:
        raise ValueError(f"module: there is no counterpart of a {name}; take one of {', '.join(converters)}")
    ours: nn.Module = converters[name](source)
    return ours.train(module.training)


def _attention(theirs: Any) -> nn.Module:
    options: AttentionOptions = {"qkv_bias": True, "norm_eps": theirs.norm_slots.eps}
    options["input_dim"] = theirs.to_k.in_features
    hidden_dim = theirs.mlp[0].out_features
    ours: SlotAttention | MultiHeadSlotAttention
    if hasattr(theirs, "combine_heads"):
        dim_head = round(theirs.scale**-2)
        heads = theirs.to_q.out_features // dim_head
        ours = MultiHeadSlotAttention(
            theirs.num_slots, theirs.dim, heads, dim_head, theirs.iters, theirs.eps, hidden_dim, **options
        )
    else:
        ours = SlotAttention(theirs.num_slots, theirs.dim, theirs.iters, theirs.eps, hidden_dim, **options)
    modules = {
        "norm_input": "norm_inputs",
        "norm_slots": "norm_slots",
        "norm_pre_ff": "mlp.0",
        "mlp.0": "mlp.1",
        "mlp.2": "mlp.3",
        "gru": "gru",
        "combine_heads": "combine_heads",
    }
    parameters = {"slots_mu": "slots_mu", "slots_logsigma": "slots_log_sigma"}
    for short, name in (("q", "query"), ("k", "key"), ("v", "value")):
        parameters |= {f"to_{short}.weight": f"to_{name}", f"to_{short}.bias": f"{name}_bias"}
    weights = {}
    for name, tensor in theirs.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        weights[parameters[name] if name in parameters else f"{modules[owner]}.{leaf}"] = tensor
    for name in ("slots_mu", "slots_log_sigma"):
        weights[name] = weights[name].flatten(0, 1)  # [1, 1, D] -> [1, D]
    return _with_weights(ours, weights)


def _adaptive(theirs: Any) -> nn.Module:
    attention: Any = from_package(theirs.slot_attn)
    gate = _with_weights(PackageGate(attention.dim), {"logits.weight": theirs.pred_keep_slot.weight})
    assert isinstance(gate, PackageGate)
    return AdaptiveSlotWrapper(attention, theirs.temperature, gate)


def _meta(theirs: Any) -> nn.Module:
    quantizer = theirs.vq
    book = quantizer._codebook
    codes = book.embed
    euclidean = codes.shape[0] == 1 and not getattr(book, "use_cosine_sim", False)
    if not euclidean or not isinstance(quantizer.project_in, nn.Identity):
        raise ValueError("module: its codebook has heads, a projection or cosine similarity, which ours has not")
    attention: Any = from_package(theirs.slot_attention)
    ours = MetaSlotAttention(attention, codebook_size=codes.shape[1], decay=book.decay, second_pass=False)
    ours.codebook.to(codes)
    ours.codebook.load_state_dict({"codes": codes[0], "counts": book.cluster_size[0]})
    return ours


def _ortho(theirs: Any) -> nn.Module:
    return OrthoSlotWrapper(from_package(theirs.slot_attention))


def _with_weights(ours: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    some = next(iter(weights.values()))
    ours = ours.to(device=some.device, dtype=some.dtype)
    with torch.no_grad():
        ours.load_state_dict(dict(weights))
    return ours
