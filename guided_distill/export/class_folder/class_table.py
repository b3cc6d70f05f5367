"""The vectors of classes that a U-Net of latents attends to."""

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn


class ClassTable(ModelMixin, ConfigMixin):
    """label i64 [B] -> [B, 1, dim]; the last row means "no condition"."""

    @register_to_config
    def __init__(self, num_classes, dim):
        super().__init__()
        self.table = nn.Embedding(num_classes + 1, dim)

    def forward(self, label):
        return self.table(label)[:, None]
