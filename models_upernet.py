"""Semantic segmentation with a pre-trained ViT: UperNet, in one file.

Xiao, Liu, Zhou, Jiang, Sun: "Unified Perceptual Parsing for Scene Understanding", ECCV 2018, arXiv
1807.10221, figure 4; on a plain ViT, as BEiT, MAE and MFF use it. tests/test_segment.py compares
every number with mmsegmentation 1.2.2 (configs/mae), whose recipe is that of MFF's authors.

    image -> ViT block ... block ... block ... last block    with relative positions, layer scale
                   |         |         |           |
                 x 4       x 2       x 1         x 1/2       neck: a ViT has one resolution
                   |         |         |           |
                   |         |         |     pyramid pooling 1, 2, 3 and 6 cells per side
                lateral   lateral   lateral        |
                   + <------ + <------ + <---------+         top-down: enlarge what is above, add
                   |         |         |           |
                  3x3       3x3       3x3          |
                   +---------+----+----+-----------+         enlarge to the finest, concatenate
                                  |
                           3x3, classifier -> logits at 1/4 (patch 16), enlarged to the image

An auxiliary head (3x3, classifier) on the third level, before the neck, is trained along with it.
Shapes: N images, D encoder width, C channels of the head, K classes, h x w patches.
"""

from functools import partial

import torch
import torch.nn as nn
from timm.layers import to_2tuple
from timm.models.beit import Beit
from torch.nn.functional import interpolate
from torchvision.ops import Conv2dNormActivation as ConvNormReLU  # its convolution has no bias

from models_mff import check_image_size, check_layers, check_width

DROPOUT = 0.1  # of whole channels, before both classifiers


class UperNet(nn.Module):
    """UperNet on a ViT.

    Args:
        img_size: side, or (H, W), of the only input size, which the relative positions fix.
        patch_size, embed_dim, depth, num_heads, mlp_ratio, in_chans: the ViT.
        num_classes: K.
        levels: indices of the four blocks whose outputs are used; the last is depth - 1.
        channels, aux_channels: width of the head and of the auxiliary head.
        drop_path: rate at the last block, growing linearly from 0 at the first.
        classifier_std: deviation of the classifiers' first weights. With the reference's 0.01,
            heads of 16 channels tell no classes apart for hundreds of steps; with 0.1 they do.

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
        check_layers('levels', levels, depth)
        if len(levels) != 4 or min(img_size) < 2 * patch_size:  # the pyramid halves the patches
            raise ValueError(
                f'levels {list(levels)} must be four, and {img_size} two patches of {patch_size}'
            )

        # mmsegmentation's MAE backbone. It starts equal to the plain ViT: biases 0, layer scales 1.
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
        self.img_size, self.levels = img_size, tuple(levels)
        self.encoder.prune_intermediate_layers(self.levels, prune_norm=True)  # raw block outputs

        double = partial(nn.ConvTranspose2d, embed_dim, embed_dim, kernel_size=2, stride=2)
        twice = nn.Sequential(double(), nn.BatchNorm2d(embed_dim), nn.GELU(), double())
        self.neck = nn.ModuleList([twice, double(), nn.Identity(), nn.MaxPool2d(2)])
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(cells), ConvNormReLU(embed_dim, channels, 1))
            for cells in (1, 2, 3, 6)
        )
        self.pool_conv = ConvNormReLU(embed_dim + 4 * channels, channels, 3)
        self.laterals = nn.ModuleList(ConvNormReLU(embed_dim, channels, 1) for _ in range(3))
        self.smooth = nn.ModuleList(ConvNormReLU(channels, channels, 3) for _ in range(3))
        self.fuse = ConvNormReLU(4 * channels, channels, 3)
        self.classifier = nn.Sequential(nn.Dropout2d(DROPOUT), nn.Conv2d(channels, num_classes, 1))
        self.aux_head = nn.Sequential(
            ConvNormReLU(embed_dim, aux_channels, 3),
            nn.Dropout2d(DROPOUT),
            nn.Conv2d(aux_channels, num_classes, 1),
        )
        self.initialize_weights(classifier_std)

    def initialize_weights(self, classifier_std):
        """The reference's for the heads; the encoder keeps timm's, the neck torch's."""
        heads = [self.pools, self.pool_conv, self.laterals, self.smooth, self.fuse, self.aux_head]
        for module in nn.ModuleList(heads).modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
        for classifier in (self.classifier[-1], self.aux_head[-1]):
            nn.init.normal_(classifier.weight, std=classifier_std)
            nn.init.zeros_(classifier.bias)

    def no_weight_decay(self):
        """Only norms and biases: the reference's rule misses 'backbone.pos_embed'."""
        return set()

    def group_matcher(self, coarse=False):
        """Layers, for timm's layer decay: embeddings, each block, and all the rest."""
        stem = r'^encoder\.(?:cls_token|pos_embed|patch_embed)'
        return {'stem': stem, 'blocks': r'^encoder\.blocks\.(\d+)'}

    def forward(self, imgs, resize=True):
        """imgs (N, 3, H, W) -> logits (N, K, H, W); in training mode (logits, auxiliary logits).

        resize=False leaves both at the heads' resolutions: 150 classes at full size take gigabytes.
        """
        blocks = self.encoder.forward_intermediates(imgs, self.levels, intermediates_only=True)
        outputs = [self.forward_head([scale(x) for scale, x in zip(self.neck, blocks)])]
        if self.training:
            outputs.append(self.aux_head(blocks[2]))  # of 4 x (N, D, h, w)
        if resize:
            outputs = [enlarge(output, imgs) for output in outputs]
        return tuple(outputs) if self.training else outputs[0]

    def forward_head(self, pyramid):
        """(N, D, 4h, 4w), (N, D, 2h, 2w), (N, D, h, w), (N, D, h/2, w/2) -> (N, K, 4h, 4w)."""
        top = pyramid[-1]
        pooled = [enlarge(pool(top), top) for pool in self.pools]  # 4 x (N, C, h/2, w/2)
        features = [lateral(level) for lateral, level in zip(self.laterals, pyramid)]
        features.append(self.pool_conv(torch.cat([top, *pooled], dim=1)))  # 4 x (N, C, ...)
        for i in (2, 1, 0):
            features[i] = features[i] + enlarge(features[i + 1], features[i])
        features = [smooth(x) for smooth, x in zip(self.smooth, features)] + [features[-1]]
        features = torch.cat([enlarge(x, features[0]) for x in features], dim=1)  # (N, 4C, 4h, 4w)
        return self.classifier(self.fuse(features))


def enlarge(x, like):
    """x (N, C, ...) at the height and width of `like`, bilinearly."""
    return interpolate(x, like.shape[-2:], mode='bilinear', align_corners=False)


def default_levels(depth):
    """At a third, half, two thirds and the end: (3, 5, 7, 11) of 12, (7, 11, 15, 23) of 24."""
    ends = depth // 3, depth // 2, 2 * depth // 3, depth
    return tuple(max(end - 1, place) for place, end in enumerate(ends))
