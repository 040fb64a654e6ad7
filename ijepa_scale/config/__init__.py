"""A YAML file and key.sub=value words -> PretrainConfig: frozen dataclasses, a section each.

sections.py: the keys, their defaults and units, what may change on resume and what is refused; those of objectives
beside I-JEPA: objective_sections.py. loading.py: files, and configs of earlier versions. reading.py: YAML and overrides
for any dataclasses. comparison.py: a comparison of several. redaction.py: what of it may be shown and kept.
"""

from ijepa_scale.config.comparison import CompareConfig, load_comparison
from ijepa_scale.config.loading import (
    by_key,
    changed_keys,
    check_source_given,
    from_dict,
    load_config,
    to_dict,
    to_yaml,
    valid_keys,
)
from ijepa_scale.config.objective_sections import CaeConfig, Data2VecConfig, MaeConfig, SketchConfig
from ijepa_scale.config.reading import over
from ijepa_scale.config.redaction import without_secrets
from ijepa_scale.config.sections import (
    ATTENTION,
    OBJECTIVE_SECTIONS,
    CheckpointConfig,
    DataConfig,
    EngineConfig,
    LoggingConfig,
    LossConfig,
    MaskConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizationConfig,
    PredictorConfig,
    PretrainConfig,
    ReportConfig,
)

__all__ = [
    "ATTENTION",
    "OBJECTIVE_SECTIONS",
    "CaeConfig",
    "CheckpointConfig",
    "CompareConfig",
    "Data2VecConfig",
    "DataConfig",
    "EngineConfig",
    "LoggingConfig",
    "LossConfig",
    "MaeConfig",
    "MaskConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizationConfig",
    "PredictorConfig",
    "PretrainConfig",
    "ReportConfig",
    "SketchConfig",
    "by_key",
    "changed_keys",
    "check_source_given",
    "from_dict",
    "load_comparison",
    "load_config",
    "over",
    "to_dict",
    "to_yaml",
    "valid_keys",
    "without_secrets",
]
