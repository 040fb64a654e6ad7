"""A YAML file and key.sub=value words -> PretrainConfig: frozen dataclasses, a section each.

sections.py: the keys, their defaults and units, and what is refused. loading.py: files, dicts and what may change on
resume. reading.py: YAML and overrides for any dataclasses.
"""

from ijepa_scale.config.loading import (
    FREE_KEYS,
    changed_keys,
    from_dict,
    load_config,
    to_dict,
    to_yaml,
    valid_keys,
)
from ijepa_scale.config.sections import (
    ATTENTION,
    CheckpointConfig,
    DataConfig,
    EngineConfig,
    LoggingConfig,
    LossConfig,
    MaskConfig,
    ModelConfig,
    OptimizationConfig,
    PredictorConfig,
    PretrainConfig,
    ReportConfig,
)

__all__ = [
    "ATTENTION",
    "FREE_KEYS",
    "CheckpointConfig",
    "DataConfig",
    "EngineConfig",
    "LoggingConfig",
    "LossConfig",
    "MaskConfig",
    "ModelConfig",
    "OptimizationConfig",
    "PredictorConfig",
    "PretrainConfig",
    "ReportConfig",
    "changed_keys",
    "from_dict",
    "load_config",
    "to_dict",
    "to_yaml",
    "valid_keys",
]
