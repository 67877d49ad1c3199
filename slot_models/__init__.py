"""What is learnt: slot attention, its adaptive gate, encoders, decoders, autoencoders and their metrics.

torch, einops and numpy alone. Modules take tensors and return tensors; randomness is handed in as noise, so a result
is a function of its arguments.
"""

from slot_models.adaptive import AdaptiveSlotWrapper, SlotGate, Stage, keep_differences, masked_mixture
from slot_models.attention import MultiHeadSlotAttention, SlotAttention
from slot_models.autoencoder import SlotAutoencoder, SlotOutput, build_autoencoder
from slot_models.counts import SlotCounts, count_confusion
from slot_models.decoders import SpatialBroadcastDecoder
from slot_models.encoders import ConvEncoder
from slot_models.metrics import adjusted_rand_index, foreground_ari

__all__ = [
    "AdaptiveSlotWrapper",
    "ConvEncoder",
    "MultiHeadSlotAttention",
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
    "keep_differences",
    "masked_mixture",
]
