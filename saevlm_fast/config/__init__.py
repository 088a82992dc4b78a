"""Every setting of the engine, declared once: what an SAE is, how it is trained, what is harvested and scored.

Nothing here imports torch, so that the command line can show its help without it.
"""

from saevlm_fast.config.common import (
    ARCHITECTURES,
    CALIBRATED,
    CONTROL_WORDS,
    CONTROLS,
    DEVICE_HELP,
    EXPANSION,
    MATRYOSHKA_FRACTIONS,
    PENALISED,
    PROMPT,
    SELECTING,
    WHITE,
    Architecture,
    Control,
    DataOn,
    K,
    keyword_settings,
)
from saevlm_fast.config.demo import DemoOptions
from saevlm_fast.config.harvesting import HarvestOptions, HarvestSettings
from saevlm_fast.config.sae import SAEConfig, SAESize, group_sizes_from_fractions
from saevlm_fast.config.steering import ScoreConfig, ScoreRun, SteerabilityConfig
from saevlm_fast.config.streaming import StreamSettings
from saevlm_fast.config.training import RunOptions, TrainConfig

__all__ = [
    "ARCHITECTURES",
    "CALIBRATED",
    "CONTROLS",
    "CONTROL_WORDS",
    "DEVICE_HELP",
    "EXPANSION",
    "MATRYOSHKA_FRACTIONS",
    "PENALISED",
    "PROMPT",
    "SELECTING",
    "WHITE",
    "Architecture",
    "Control",
    "DataOn",
    "DemoOptions",
    "HarvestOptions",
    "HarvestSettings",
    "K",
    "RunOptions",
    "SAEConfig",
    "SAESize",
    "ScoreConfig",
    "ScoreRun",
    "SteerabilityConfig",
    "StreamSettings",
    "TrainConfig",
    "group_sizes_from_fractions",
    "keyword_settings",
]
