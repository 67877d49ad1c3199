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
    keep_penalty,
    penalty_weight,
)
from slot_models.attention import MultiHeadSlotAttention, SlotAttention
from slot_models.autoencoder import SlotAutoencoder, SlotOutput
from slot_models.average_precision import SetResults, average_precision
from slot_models.build import build_autoencoder
from slot_models.codebook import Codebook
from slot_models.counts import SlotCounts, count_confusion
from slot_models.decoders import Decoded, Decoder, MixtureDecoder, SpatialBroadcastDecoder
from slot_models.encoders import ConvEncoder, FeatureEncoder
from slot_models.interop import from_package
from slot_models.meta import MetaSlotAttention, MetaSlots
from slot_models.metrics import (
    MetricSums,
    adjusted_rand_index,
    correct_localization,
    foreground_ari,
    mean_best_overlap,
    mean_iou,
    segmentation_metrics,
)
from slot_models.mixture import keep_differences, masked_mixture
from slot_models.object_finder import ObjectFinder
from slot_models.ortho import OrthoSlotWrapper
from slot_models.patch_decoders import MLPPatchDecoder
from slot_models.set_prediction import SetClassifier, SetPredictor, build_set_predictor, clevr_targets, set_loss
from slot_models.transformer_decoder import TransformerDecoder
from slot_models.upsampling_decoder import UpsamplingBroadcastDecoder
from slot_models.vit import ViTBackbone

__all__ = [
    "AdaptiveSlotWrapper",
    "Codebook",
    "ConvEncoder",
    "Decoded",
    "Decoder",
    "FeatureEncoder",
    "MLPPatchDecoder",
    "MetaSlotAttention",
    "MetaSlots",
    "MetricSums",
    "MixtureDecoder",
    "MultiHeadSlotAttention",
    "ObjectFinder",
    "OrthoSlotWrapper",
    "PackageGate",
    "SetClassifier",
    "SetPredictor",
    "SetResults",
    "SlotAttention",
    "SlotAutoencoder",
    "SlotCounts",
    "SlotGate",
    "SlotOutput",
    "SpatialBroadcastDecoder",
    "Stage",
    "TransformerDecoder",
    "UpsamplingBroadcastDecoder",
    "ViTBackbone",
    "adjusted_rand_index",
    "average_precision",
    "build_autoencoder",
    "build_set_predictor",
    "clevr_targets",
    "correct_localization",
    "count_confusion",
    "foreground_ari",
    "from_package",
    "gumbel_noise",
    "keep_differences",
    "keep_penalty",
    "masked_mixture",
    "mean_best_overlap",
    "mean_iou",
    "penalty_weight",
    "segmentation_metrics",
    "set_loss",
]
