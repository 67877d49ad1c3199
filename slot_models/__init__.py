"""What is learnt: slot attention, its adaptive gate, encoders, decoders, autoencoders and their metrics.

torch, einops and numpy alone. Modules take tensors and return tensors; randomness is handed in as noise, so a result
is a function of its arguments.
"""

from slot_models.adaptive import (
    AdaptiveSlotWrapper,
    PackageGate,
    SlotGate,
    Stage,
    gumbel_noise,
    keep_differences,
    keep_penalty,
    masked_mixture,
    penalty_weight,
)
from slot_models.attention import MultiHeadSlotAttention, SlotAttention
from slot_models.autoencoder import SlotAutoencoder, SlotOutput, build_autoencoder
from slot_models.codebook import Codebook
from slot_models.counts import SlotCounts, count_confusion
from slot_models.decoders import SpatialBroadcastDecoder
from slot_models.encoders import ConvEncoder
from slot_models.interop import from_package
from slot_models.meta import MetaSlotAttention, MetaSlots
from slot_models.metrics import adjusted_rand_index, foreground_ari
from slot_models.ortho import OrthoSlotWrapper

__all__ = [
    "AdaptiveSlotWrapper",
    "Codebook",
    "ConvEncoder",
    "MetaSlotAttention",
    "MetaSlots",
    "MultiHeadSlotAttention",
    "OrthoSlotWrapper",
    "PackageGate",
    "SlotAttention",
    "SlotAutoencoder",
    "SlotCounts",
    "SlotGate",
    "SlotOutput",
    "SpatialBroadcastDecoder",
    "Stage",
    "adjusted_rand_index",
    "build_autoencoder",
    "count_confusion",
    "foreground_ari",
    "from_package",
    "gumbel_noise",
    "keep_differences",
    "keep_penalty",
    "masked_mixture",
    "penalty_weight",
]
