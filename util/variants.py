"""The paper's alternatives to its own design: other projections, other fusions, and PixMIM's target.

    python main_pretrain.py ... --fuse_proj none|mlp --fusion uniform|attention --target lowpass

The paper compares projections and fusions, concludes that linear projection and weighted average are enough, and also
fuses PixMIM. Its own choice is models_mff.py, where --fuse_layers chooses the levels. Downstream all of this is
dropped, as the fusion always is.
"""

import torch
import torch.nn as nn
from timm.models.vision_transformer import Attention

from models_mff import LayerNorm, MaskedAutoencoderMFF

CHOICES = {  # the first of each is the paper's own
    'fuse_proj': (['linear', 'none', 'mlp'], 'projection of the levels below the last; mlp: two layers with GELU'),
    'fusion': (['average', 'uniform', 'attention'], 'learned weights, 1/K each, or self-attention over the levels'),
    'target': (['pixels', 'lowpass'], "lowpass: PixMIM's target, without high frequencies"),
}


def add_arguments(parser):
    """Add --fuse_proj, --fusion and --target."""
    group = parser.add_argument_group("the paper's alternatives (util/variants.py)")
    for name, (options, text) in CHOICES.items():
        group.add_argument(f'--{name}', choices=options, default=options[0], help=text)


def chosen(args):
    """{name: option} of CHOICES; the flags of files of other projects lack these, or hold None."""
    return {name: getattr(args, name, None) or options[0] for name, (options, _) in CHOICES.items()}


def is_default(args):
    """Whether a run's flags ask for the paper's own choices, which MaskedAutoencoderMFF implements."""
    return all(option == CHOICES[name][0][0] for name, option in chosen(args).items())


def create_model(args, settings):
    """The model of a run's flags and settings (.sizes, .mean, .std). Raises ValueError as its class does."""
    sizes = settings.sizes | {'norm_pix_loss': getattr(args, 'norm_pix_loss', None) is not False}
    if is_default(args):
        return MaskedAutoencoderMFF(**sizes)
    return VariantMFF(**chosen(args), mean=settings.mean, std=settings.std, **sizes)


class VariantMFF(MaskedAutoencoderMFF):
    """MaskedAutoencoderMFF with other parts.

    Args:
        fuse_proj, fusion, target: as in CHOICES.
        mean, std: of the pixels, per channel, by which images are normalised; for target='lowpass'.
        sizes: as for MaskedAutoencoderMFF.

    Raises:
        ValueError: as MaskedAutoencoderMFF does, or where there is one level only, so that nothing is fused.
    """

    def __init__(self, fuse_proj='linear', fusion='average', target='pixels', mean=None, std=None, **sizes):
        super().__init__(**sizes)
        self.fusion, self.target = fusion, target
        D, K = self.cls_token.shape[-1], len(self.fuse_layers)
        if K == 1 and (fuse_proj != 'linear' or fusion != 'average'):
            raise ValueError('--fuse_proj and --fusion need several --fuse_layers; a single one is plain MAE')

        # --- Projection P_k, k < K (paper, design choices: projection) ---------------------------------------
        if fuse_proj == 'none':
            self.fuse_projs = nn.ModuleList(nn.Identity() for _ in self.fuse_projs)
        elif fuse_proj == 'mlp':
            self.fuse_projs = nn.ModuleList(
                nn.Sequential(proj, nn.GELU(), initialised(nn.Linear(D, D))) for proj in self.fuse_projs
            )

        # --- Fusion (paper, design choices: fusion) ----------------------------------------------------------
        if fusion != 'average':
            del self.fuse_logits
        if fusion == 'uniform':  # equal weights, which are not trained
            self.register_buffer('fuse_logits', torch.ones(K, 1, 1, 1))
        elif fusion == 'attention':
            self.fuse_norm = LayerNorm(D)
            self.fuse_attn = Attention(D, self.blocks[0].attn.num_heads, qkv_bias=True)
            initialised(self.fuse_attn.qkv)
            initialised(self.fuse_attn.proj)

        # --- Target (PixMIM, arXiv 2303.02416) ---------------------------------------------------------------
        if target == 'lowpass':
            self.register_buffer('pixel_mean', torch.tensor(mean).view(-1, 1, 1), persistent=False)
            self.register_buffer('pixel_std', torch.tensor(std).view(-1, 1, 1), persistent=False)
            self.register_buffer('frequencies', low_frequencies(*self.patch_embed.img_size), persistent=False)

    @property
    def fusion_weights(self):
        """As in MaskedAutoencoderMFF; none, shape (0,), where attention decides for each token."""
        return self.cls_token.new_empty(0) if self.fusion == 'attention' else super().fusion_weights

    def fuse(self, levels):
        """K tensors (N, 1+V, D) -> (N, 1+V, D); by attention: mean_k (y + Attention(LayerNorm(y)))_k, y_k = P_k(x_k).

        The K levels of a token are the sequence, so tokens do not mix. The paper names self-attention as the
        alternative; norm, residual and mean are ours.
        """
        if self.fusion != 'attention':
            return super().fuse(levels)
        projected = [proj(x) for proj, x in zip(self.fuse_projs, levels)] + [levels[-1]]
        y = torch.stack(projected, dim=2).flatten(0, 1)  # (N*(1+V), K, D)
        y = y + self.fuse_attn(self.fuse_norm(y))
        return y.mean(1).view_as(levels[-1])

    def forward_loss(self, imgs, pred, mask):
        """As in MaskedAutoencoderMFF, with the target image in the place of the image."""
        return super().forward_loss(self.target_image(imgs), pred, mask)

    def target_image(self, imgs):
        """What the decoder is to predict, (N, C, H, W) normalised like imgs; util/visualize.py shows it.

        PixMIM: (|IFFT2(fftshift(FFT2(x)) * M)| - mean) / std of the un-normalised x. Without a shift back before the
        inverse; the modulus removes the modulation that this leaves.
        """
        if self.target == 'pixels':
            return imgs
        pixels = imgs.float() * self.pixel_std + self.pixel_mean
        spectrum = torch.fft.fftshift(torch.fft.fft2(pixels), dim=(-2, -1))
        return (torch.fft.ifft2(spectrum * self.frequencies).abs() - self.pixel_mean) / self.pixel_std


def low_frequencies(height, width, radius=40 / 224):
    """PixMIM's M (H, W): 1 in the disc around ((H-1)/2, (W-1)/2), of radius 40 at 224 pixels.

    At other sizes in proportion, which is ours: of 32 pixels, a radius of 40 would leave out nothing.
    """
    rows, columns = torch.arange(height) - (height - 1) / 2, torch.arange(width) - (width - 1) / 2
    distance = ((rows / height).square()[:, None] + (columns / width).square()).sqrt()  # in units of the side
    return (distance <= radius).float()


def initialised(linear):
    """As every Linear of the model: xavier-uniform weight, zero bias."""
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
