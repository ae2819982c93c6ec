"""``from_pretrained`` for converted Hugging Face models. Import this module to make it work.

transformers lets a package change a model between its construction and the loading of its weights, if
``quantization_config`` in ``config.json`` names the package. This module uses that; nothing is quantised.
"""

from typing import Any

from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from gatelet.convert.describe import restore
from gatelet.convert.place import blocks
from gatelet.convert.save import check_format


@register_quantization_config("gatelet")
class GateletConfig(QuantizationConfigMixin):
    """What was converted with which options, in ``config.json``."""

    def __init__(self, **described: Any) -> None:
        self.__dict__.update(described)
        self.quant_method = "gatelet"  # type: ignore[assignment]


@register_quantizer("gatelet")
class Converter(HfQuantizer):
    """Gives a model its gates before its weights are loaded."""

    @property
    def is_trainable(self) -> bool:
        """Converted models train as dense ones do."""
        return True

    def is_serializable(self) -> bool:
        """Converted models are saved as dense ones are."""
        return True

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        described = self.quantization_config.to_dict()
        if "why_not" in described:
            raise ValueError(f"the model was saved without a description of its gates: {described['why_not']}")
        check_format(described, "config.json")
        restore(model, described["blocks"])
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> nn.Module:
        for _, gating in blocks(model).values():
            gating.reset_statistics()
        self.remove_quantization_config(model)  # nothing is quantised: it moves and trains like other models
        model.config.quantization_config = self.quantization_config.to_dict()
        model.config._is_quantized = False
        found: nn.Module = model
        return found
