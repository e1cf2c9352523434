from torch import nn


class Thumbnail(nn.Module):
    """The picture itself, 8 x 8 grey: (B, height, width, 3) uint8 -> (B, 64)."""

    def __init__(self, resolution):
        super().__init__()
        self.size = 64

    def forward(self, image):
        grey = image.float().mean(dim=-1, keepdim=True).permute(0, 3, 1, 2) / 255
        return nn.functional.interpolate(grey, size=(8, 8), mode="bilinear").flatten(1)
