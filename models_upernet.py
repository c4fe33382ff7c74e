"""Semantic segmentation with a pre-trained ViT: UperNet, in one file.

Xiao, Liu, Zhou, Jiang, Sun: "Unified Perceptual Parsing for Scene Understanding", ECCV 2018, arXiv 1807.10221,
figure 4; on a plain ViT, as BEiT, MAE and MFF use it. tests/test_segment.py compares every number with
mmsegmentation 1.2.2 (configs/mae), whose recipe is that of MFF's authors.

    image -> ViT block ... block ... block ... last block       plus relative position bias and layer scale
                   |         |         |           |
                 x 4       x 2       x 1         x 1/2          neck: a ViT has one resolution, a pyramid four
                   |         |         |           |
                   |         |         |     pyramid pooling    1, 2, 3 and 6 cells per side
                lateral   lateral   lateral        |
                   + <------ + <------ + <---------+            top-down: what is above, enlarged, is added
                   |         |         |           |
                  3x3       3x3       3x3          |
                   +---------+----+----+-----------+            enlarged to the finest, concatenated
                                  |
                           3x3, classifier -> logits at 1/4 (patch 16), enlarged to the image

An auxiliary head (3x3, classifier) on the third level, before the neck, is trained along with it.

Shapes: N images, D encoder width, C channels of the head, K classes, h x w patches.
"""

import torch
import torch.nn as nn
from timm.layers import to_2tuple
from timm.models.beit import Beit
from torch.nn.functional import interpolate
from torchvision.ops import Conv2dNormActivation as ConvNormReLU  # its convolution has no bias

from models_mff import check_image_size, check_layers, check_width

DROPOUT = 0.1  # of whole channels, before both classifiers


class Pool(nn.AdaptiveAvgPool2d):
    def forward(self, x):  # on MPS, only cells of equal size work (pytorch issue 143864)
        return super().forward(x.cpu()).to(x.device) if x.device.type == 'mps' else super().forward(x)


class UperNet(nn.Module):
    """UperNet on a ViT.

    Args:
        img_size: side, or (H, W), of the only input size: relative positions fix it. A multiple of patch_size.
        patch_size, embed_dim, depth, num_heads, mlp_ratio, in_chans: the ViT.
        num_classes: K.
        levels: indices of the four blocks whose outputs are used, increasing, the last one depth - 1.
        channels, aux_channels: width of the head and of the auxiliary head.
        drop_path: rate at the last block, growing linearly from 0 at the first.
        classifier_std: deviation of the classifiers' weights at the start. The reference's 0.01 keeps narrow heads, of
            16 channels, from telling classes apart for hundreds of steps; 0.1 does not.

    Raises:
        ValueError: if sizes do not divide, or levels is not a valid choice.
    """

    def __init__(
        self,
        img_size,
        patch_size,
        embed_dim,
        depth,
        num_heads,
        num_classes,
        levels,
        channels,
        aux_channels=256,
        drop_path=0.0,
        mlp_ratio=4.0,
        in_chans=3,
        classifier_std=0.01,
    ):
        super().__init__()
        img_size = to_2tuple(img_size)
        check_image_size(img_size, patch_size)
        check_width(embed_dim, num_heads)
        if min(img_size) < 2 * patch_size:
            raise ValueError(f'image size {img_size} must be two patches of {patch_size} at least')
        self.levels = tuple(levels)
        if len(self.levels) != 4:
            raise ValueError(f'levels {list(levels)} must be four blocks, one for each size of the pyramid')
        check_layers('levels', self.levels, depth)

        # timm's Beit is mmsegmentation's MAE backbone. It starts equal to the plain ViT: biases 0, layer scales 1.
        self.encoder = Beit(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            num_classes=0,
            init_values=1.0,
            use_rel_pos_bias=True,
            drop_path_rate=drop_path,
        )
        self.encoder.prune_intermediate_layers(self.levels, prune_norm=True)  # levels are raw block outputs

        self.neck = nn.ModuleList([
            nn.Sequential(double(embed_dim), nn.BatchNorm2d(embed_dim), nn.GELU(), double(embed_dim)),
            double(embed_dim),
            nn.Identity(),
            nn.MaxPool2d(2),
        ])  # fmt: skip
        self.pools = nn.ModuleList(
            nn.Sequential(Pool(cells), ConvNormReLU(embed_dim, channels, 1)) for cells in (1, 2, 3, 6)
        )
        self.pool_conv = ConvNormReLU(embed_dim + 4 * channels, channels, 3)
        self.laterals = nn.ModuleList(ConvNormReLU(embed_dim, channels, 1) for _ in range(3))
        self.smooth = nn.ModuleList(ConvNormReLU(channels, channels, 3) for _ in range(3))
        self.fuse = ConvNormReLU(4 * channels, channels, 3)
        self.classifier = nn.Sequential(nn.Dropout2d(DROPOUT), nn.Conv2d(channels, num_classes, 1))
        self.aux_head = nn.Sequential(
            ConvNormReLU(embed_dim, aux_channels, 3), nn.Dropout2d(DROPOUT), nn.Conv2d(aux_channels, num_classes, 1)
        )
        self.initialize_weights(classifier_std)

    def initialize_weights(self, classifier_std):
        """The reference's initialisation of the heads; the encoder keeps timm's, the neck torch's."""
        for part in (self.pools, self.pool_conv, self.laterals, self.smooth, self.fuse, self.aux_head):
            for module in part.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
        for classifier in (self.classifier[-1], self.aux_head[-1]):
            nn.init.normal_(classifier.weight, std=classifier_std)
            nn.init.zeros_(classifier.bias)

    def no_weight_decay(self):
        """Names without weight decay besides norms and biases: none. Position embeddings and tables decay, too.

        (mmsegmentation's rule looks for 'pos_embed', but the parameter is called 'backbone.pos_embed'.)
        """
        return set()

    def group_matcher(self, coarse=False):
        """Layers, for timm's layer decay: embeddings, each block, and all the rest with the rate itself."""
        return {'stem': r'^encoder\.(?:cls_token|pos_embed|patch_embed)', 'blocks': r'^encoder\.blocks\.(\d+)'}

    def forward(self, imgs, resize=True):
        """imgs (N, 3, H, W) -> logits (N, K, H, W); in training mode (logits, auxiliary logits), both of that shape.

        resize=False leaves logits at the heads' own resolution: those of many classes are large, and the loss enlarges
        them a few images at a time.
        """
        levels = self.encoder.forward_intermediates(imgs, self.levels, intermediates_only=True)  # 4 x (N, D, h, w)
        logits = self.forward_head([scale(level) for scale, level in zip(self.neck, levels)])
        outputs = [logits, self.aux_head(levels[2])] if self.training else [logits]
        if resize:
            outputs = [enlarge(output, imgs) for output in outputs]
        return tuple(outputs) if self.training else outputs[0]

    def forward_head(self, pyramid):
        """pyramid: (N, D, 4h, 4w), (N, D, 2h, 2w), (N, D, h, w), (N, D, h/2, w/2) -> logits (N, K, 4h, 4w)."""
        top = pyramid[-1]
        pooled = [enlarge(pool(top), top) for pool in self.pools]  # 4 x (N, C, h/2, w/2)
        features = [lateral(level) for lateral, level in zip(self.laterals, pyramid)]
        features.append(self.pool_conv(torch.cat([top, *pooled], dim=1)))  # 4 x (N, C, ...)
        for i in (2, 1, 0):
            features[i] = features[i] + enlarge(features[i + 1], features[i])
        features = [smooth(x) for smooth, x in zip(self.smooth, features)] + [features[-1]]
        features = torch.cat([enlarge(x, features[0]) for x in features], dim=1)  # (N, 4C, 4h, 4w)
        return self.classifier(self.fuse(features))


def double(channels):
    """Twice the height and width."""
    return nn.ConvTranspose2d(channels, channels, kernel_size=2, stride=2)


def enlarge(x, like):
    """x (N, C, ...) at the height and width of `like`, bilinearly."""
    return interpolate(x, like.shape[-2:], mode='bilinear', align_corners=False)


def default_levels(depth):
    """Blocks at a third, half, two thirds and the end: (3, 5, 7, 11) of 12, (7, 11, 15, 23) of 24, as published."""
    levels = [max(0, depth // 3 - 1)]
    for index in (depth // 2 - 1, 2 * depth // 3 - 1, depth - 1):
        levels.append(max(index, levels[-1] + 1))
    return tuple(levels)
